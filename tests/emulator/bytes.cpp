// What builtins.hpp has in place of the C library's functions.
#include <cstddef>
#include <cstdint>

// Keeps a loop from being taken for one of the functions that it is the body of.
static inline void step() { asm volatile("" ::: "memory"); }

// Eight bytes at any address.
struct __attribute__((packed, may_alias)) Chunk {
    uint64_t value;
};

extern "C" {

void* emulator_memcpy(void* to, const void* from, size_t bytes) {
    char* target = static_cast<char*>(to);
    const char* source = static_cast<const char*>(from);
    for (; bytes >= 8; bytes -= 8, target += 8, source += 8, step()) {
        reinterpret_cast<Chunk*>(target)->value = reinterpret_cast<const Chunk*>(source)->value;
    }
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
    uint64_t filled = uint8_t(value) * 0x0101010101010101u;
    for (; bytes >= 8; bytes -= 8, target += 8) reinterpret_cast<Chunk*>(target)->value = filled, step();
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
