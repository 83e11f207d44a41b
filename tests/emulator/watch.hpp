// What the sanitizers are told of: they see what kernels do by themselves, and nothing that the emulator does for itself.
#pragma once

#include <cstddef>

namespace emulator {

#ifdef ATTN_ADDRESS_SANITIZER
constexpr bool has_address_sanitizer = true;
#else
constexpr bool has_address_sanitizer = false;
#endif
#ifdef ATTN_THREAD_SANITIZER
constexpr bool has_thread_sanitizer = true;
#else
constexpr bool has_thread_sanitizer = false;
#endif

// For the race checker: what was done before release(at) is seen after acquire(at). Without it, nothing.
void release(const void* at);
void acquire(const void* at);

// An instruction of the running thread accesses these bytes, at most 16; `line` is an address in the kernel's code.
void note_read(const void* at, size_t bytes, const void* line);
void note_write(const void* at, size_t bytes, const void* line);

}  // namespace emulator
