// The emulator's own tensor map, in the 128 bytes that a CUtensorMap has.
#pragma once

#include <cstdint>

namespace emulator {

struct TensorMap {
    static constexpr uint64_t kMagic = 0x70616d726f736e74;

    uint64_t magic;
    char* address;
    uint64_t sizes[4];    // innermost first
    uint64_t strides[3];  // of the outer dimensions, in bytes
    uint32_t box[4];
    uint32_t element_bytes;
    uint32_t swizzle;  // 0, or the 128 bytes of a row whose chunks are exchanged
    uint64_t unused[4];

    // What the driver would refuse; null if nothing.
    const char* refusal() const;
};
static_assert(sizeof(TensorMap) == 128, "as large as a CUtensorMap");

}  // namespace emulator
