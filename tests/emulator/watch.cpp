#include "watch.hpp"

#ifdef ATTN_ADDRESS_SANITIZER
extern "C" void __asan_loadN(const void* at, size_t bytes);
extern "C" void __asan_storeN(const void* at, size_t bytes);
#endif
#ifdef ATTN_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read16_pc(const void* at, const void* line);
extern "C" void __tsan_write16_pc(const void* at, const void* line);
extern "C" void __tsan_read8_pc(const void* at, const void* line);
extern "C" void __tsan_write8_pc(const void* at, const void* line);
extern "C" void __tsan_read1_pc(const void* at, const void* line);
extern "C" void __tsan_write1_pc(const void* at, const void* line);
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }
#endif

namespace emulator {

// Reads a byte: of memory that is not there the system tells here, where the kernel is on the stack.
static void touch(const void* at) { asm volatile("" ::"r"(*static_cast<const volatile char*>(at))); }

#if defined(ATTN_ADDRESS_SANITIZER)

void release(const void*) {}
void acquire(const void*) {}

void note_read(const void* at, size_t bytes, const void*) {
    __asan_loadN(at, bytes);
    touch(at);
}

void note_write(const void* at, size_t bytes, const void*) { __asan_storeN(at, bytes); }

#elif defined(ATTN_THREAD_SANITIZER)

void release(const void* at) { __tsan_release(const_cast<void*>(at)); }
void acquire(const void* at) { __tsan_acquire(const_cast<void*>(at)); }

void note_read(const void* at, size_t bytes, const void* line) {
    if (bytes == 16) return __tsan_read16_pc(at, line);
    if (bytes == 8) return __tsan_read8_pc(at, line);
    for (size_t i = 0; i < bytes; ++i) __tsan_read1_pc(static_cast<const char*>(at) + i, line);
}

void note_write(const void* at, size_t bytes, const void* line) {
    if (bytes == 16) return __tsan_write16_pc(at, line);
    if (bytes == 8) return __tsan_write8_pc(at, line);
    for (size_t i = 0; i < bytes; ++i) __tsan_write1_pc(static_cast<const char*>(at) + i, line);
}

#else

void release(const void*) {}
void acquire(const void*) {}
void note_read(const void* at, size_t, const void*) { touch(at); }
void note_write(const void*, size_t, const void*) {}

#endif

}  // namespace emulator
