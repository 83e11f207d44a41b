#include "guarded.hpp"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace emulator {

static constexpr size_t alignment = 256;
#ifdef ATTN_ADDRESS_SANITIZER
static constexpr size_t guard = 0;
#else
static constexpr size_t guard = 1024;
#endif
// NaN as f16, bf16, float and double, and no pattern that poison() writes.
static constexpr uint8_t pattern[2] = {0xda, 0xff};

void Guarded::Free::operator()(char* memory) const { free(memory); }

Guarded::Guarded(size_t bytes) : bytes(bytes) {
    void* pointer;
    if (posix_memalign(&pointer, alignment, guard + bytes + guard) != 0) throw std::bad_alloc();
    memory.reset(static_cast<char*>(pointer));
    start = memory.get() + guard;
    for (size_t i = 0; i < guard; ++i) memory.get()[i] = start[bytes + i] = char(pattern[i % 2]);
    poison();
}

void Guarded::poison() { memset(start, 0xff, bytes); }

bool Guarded::overrun() const {
    for (size_t i = 0; i < guard; ++i) {
        if (memory.get()[i] != char(pattern[i % 2]) || start[bytes + i] != char(pattern[i % 2])) return true;
    }
    return false;
}

}  // namespace emulator
