// Cuts a block's dynamic shared memory into pieces, in order; the plan adds up the same sizes.
#pragma once

#include "../ptx/device.cuh"

namespace attn::tile {

class SharedPieces {
public:
    DEVICE SharedPieces() : next_(ptx::shared_memory<char>()) {}

    // Room for `count` numbers, at a multiple of 128 bytes.
    template <class T>
    DEVICE T* take(int64_t count) {
        char* piece = next_;
        next_ += (count * sizeof(T) + 127) / 128 * 128;
        return reinterpret_cast<T*>(piece);
    }

private:
    char* next_;
};

}  // namespace attn::tile
