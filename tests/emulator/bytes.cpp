// What builtins.hpp has in place of the C library's functions.
#include <cstddef>
#include <cstdint>

// Keeps a loop from being taken for one of the functions that it is the body of.
static inline void step() { asm volatile("" ::: "memory"); }

using Chunk = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));
static Chunk& chunk(void* at) { return *static_cast<Chunk*>(at); }
static const Chunk& chunk(const void* at) { return *static_cast<const Chunk*>(at); }

extern "C" {

void* emulator_memcpy(void* to, const void* from, size_t bytes) {
    char* target = static_cast<char*>(to);
    const char* source = static_cast<const char*>(from);
    for (; bytes >= 16; bytes -= 16, target += 16, source += 16) chunk(target) = chunk(source), step();
    for (; bytes; --bytes) *target++ = *source++, step();
    return to;
}

void* emulator_memmove(void* to, const void* from, size_t bytes) {
    char* target = static_cast<char*>(to);
    const char* source = static_cast<const char*>(from);
    if (target <= source || target >= source + bytes) return emulator_memcpy(to, from, bytes);
    while (bytes--) target[bytes] = source[bytes], step();
    return to;
}

void* emulator_memset(void* to, int value, size_t bytes) {
    char* target = static_cast<char*>(to);
    Chunk filled = Chunk{} + uint8_t(value);
    for (; bytes >= 16; bytes -= 16, target += 16) chunk(target) = filled, step();
    for (; bytes; --bytes) *target++ = char(value), step();
    return to;
}

int emulator_memcmp(const void* left, const void* right, size_t bytes) {
    const uint8_t *a = static_cast<const uint8_t*>(left), *b = static_cast<const uint8_t*>(right);
    for (; bytes; --bytes, ++a, ++b, step()) {
        if (*a != *b) return *a - *b;
    }
    return 0;
}

size_t emulator_strlen(const char* text) {
    size_t length = 0;
    for (; text[length]; ++length) step();
    return length;
}

}  // extern "C"
