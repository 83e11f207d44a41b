// Collectives of a warp: every lane posts its operands, the last to come computes the results of all.
#include <cstring>

#include "block.hpp"
#include "ptx/element.cuh"
#include "sums.hpp"

namespace emulator {

template <class Complete>
static void rendezvous(Operation operation, const Operands& operands, Complete complete) {
    Warp& warp = block.warps[here.thread / 32];
    if (warp.arrived && warp.operation != operation) {
        fail("divergence: at %s, while %d lanes of the warp are at %s", name_of(operation), warp.arrived,
             name_of(warp.operation));
    }
    warp.operation = operation;
    warp.posted[here.thread % 32] = operands;
    if (++warp.arrived < 32) {
        wait(operation, warp.generation);
    } else {
        warp.arrived = 0;
        complete(warp.posted);
        ++warp.generation;
    }
}

void warp_barrier() {
    Warp& warp = block.warps[here.thread / 32];
    const uint64_t* tag = &warp.tags.of[warp.generation % 2];
    release(tag);
    rendezvous(Operation::warp_sync, {}, [](Operands*) {});
    acquire(tag);
}

uint64_t shuffle(uint64_t bits, int source_lane) {
    uint64_t result;
    rendezvous(Operation::shuffle, {&result, &bits, nullptr, source_lane}, [](Operands* lanes) {
        for (int i = 0; i < 32; ++i) memcpy(lanes[i].result, lanes[lanes[i].source].a, sizeof(uint64_t));
    });
    return result;
}

// Rows of 16 bytes in the same eighth of 128 bytes, unless they are the same row, are read one after the other.
static int passes(const Operands* rows) {
    int most = 0;
    for (int i = 0; i < 8; ++i) {
        int rivals = 0;
        for (int j = i; j < 8; ++j) {
            ptrdiff_t distance = static_cast<const char*>(rows[i].a) - static_cast<const char*>(rows[j].a);
            rivals += j == i || (distance && distance % 128 == 0);
        }
        most = rivals > most ? rivals : most;
    }
    return most;
}

// Register i of lane l takes of matrix i row l/4, columns 2(l%4) + {0, 1}.
static void load_matrices(Operands* lanes, int matrices, bool transpose) {
    counters.matrices += matrices;
    for (int i = 0; i < matrices; ++i) {
        counters.conflicts += passes(lanes + 8 * i) - 1;
        uint16_t tile[8][8], transposed[8][8];
        for (int row = 0; row < 8; ++row) memcpy(tile[row], lanes[8 * i + row].a, 16);
        for (int row = 0; transpose && row < 8; ++row) {
            for (int column = 0; column < 8; ++column) transposed[column][row] = tile[row][column];
        }
        const char* source = reinterpret_cast<const char*>(transpose ? transposed : tile);
        for (int lane = 0; lane < 32; ++lane)
            memcpy(static_cast<char*>(lanes[lane].result) + 4 * i, source + 4 * lane, 4);
    }
}

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transpose) {
    if (here.thread % 32 < 8 * matrices) {
        check_aligned(row, 16, "ldmatrix");
        shared_offset(row, 16, "ldmatrix");
        note_read(row, 16, __builtin_return_address(0));
    }
    Operation operation = Operation(int(Operation::ldmatrix_x2) + (matrices == 4 ? 2 : 0) + (transpose ? 1 : 0));
    rendezvous(operation, {registers, row, nullptr, 0},
               [=](Operands* lanes) { load_matrices(lanes, matrices, transpose); });
}

// The reverse of load_matrices.
static void store_matrices(Operands* lanes, bool transpose) {
    for (int i = 0; i < 4; ++i) {
        uint16_t tile[8][8];
        for (int lane = 0; lane < 32; ++lane) {
            uint16_t pair[2];
            memcpy(pair, static_cast<const char*>(lanes[lane].b) + 4 * i, 4);
            for (int j = 0; j < 2; ++j) {
                int row = lane / 4, column = lane % 4 * 2 + j;
                (transpose ? tile[column][row] : tile[row][column]) = pair[j];
            }
        }
        for (int row = 0; row < 8; ++row) memcpy(lanes[8 * i + row].result, tile[row], 16);
    }
}

void stmatrix(void* row, const uint32_t* registers, bool transpose) {
    check_aligned(row, 16, "stmatrix");
    shared_offset(row, 16, "stmatrix");
    wrote(row, 16);
    note_write(row, 16, __builtin_return_address(0));
    rendezvous(transpose ? Operation::stmatrix_x4_trans : Operation::stmatrix_x4, {row, nullptr, registers, 0},
               [=](Operands* lanes) { store_matrices(lanes, transpose); });
}

// Whether all products are 0, as many are in tiles that are padded: one side is, and the other finite.
static bool add_nothing(const float* a, const float* b, int count_of_a, int count_of_b) {
    auto bits = [](float x) { return attn::ptx::bit_cast<int32_t>(x) & 0x7fffffff; };
    auto are_zeros = [=](const float* x, int count) {
        int32_t any = 0;
        for (int i = 0; i < count; ++i) any |= bits(x[i]);
        return any == 0;
    };
    auto are_finite = [=](const float* x, int count) {
        int32_t infinite = 0;
        for (int i = 0; i < count; ++i) infinite |= bits(x[i]) >= 0x7f800000;
        return !infinite;
    };
    return (are_zeros(b, count_of_b) && are_finite(a, count_of_a)) ||
           (are_zeros(a, count_of_a) && are_finite(b, count_of_b));
}

// Products are exact in float: operands have at most 11 significant bits.
template <int depth, const Group& group>
static void multiply(Operands* lanes, const float (&a)[depth][16], const Row (&b)[depth]) {
    Row d[16];
    auto accumulators = [&](int lane) { return static_cast<float*>(lanes[lane].result); };
    auto block = [&](int lane, int i) { return reinterpret_cast<float*>(d + lane / 4 + 8 * i) + lane % 4 * 2; };
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 2; ++i) memcpy(block(lane, i), accumulators(lane) + 2 * i, 8);
    }
    constexpr int count = group.products;
    for (int first = 0; first < depth; first += count) {
        if (add_nothing(a[first], reinterpret_cast<const float*>(b + first), 16 * count, 8 * count)) continue;
        for (int row = 0; row < 16; ++row) {
            Row products[count];
            for (int k = 0; k < count; ++k) products[k] = a[first + k][row] * b[first + k];
            d[row] = add_products<count, group.extra_bits>(d[row], products);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 2; ++i) memcpy(accumulators(lane) + 2 * i, block(lane, i), 8);
    }
}

template <class E>
static void multiply_16_bit(Operands* lanes) {
    E a[16][16], b[16][8];  // [k][row], [k][column]
    for (int lane = 0; lane < 32; ++lane) {
        int group = lane / 4, pair = lane % 4 * 2;
        const E* registers_a = static_cast<const E*>(lanes[lane].a);
        const E* registers_b = static_cast<const E*>(lanes[lane].b);
        for (int i = 0; i < 8; ++i) a[pair + i / 4 * 8 + i % 2][group + i / 2 % 2 * 8] = registers_a[i];
        for (int i = 0; i < 4; ++i) b[pair + i / 2 * 8 + i % 2][group] = registers_b[i];
    }
    float floats_a[16][16];
    Row floats_b[16];
    for (int k = 0; k < 16; ++k) {
        for (int row = 0; row < 16; ++row) floats_a[k][row] = attn::ptx::to_float(a[k][row]);
        for (int column = 0; column < 8; ++column) floats_b[k][column] = attn::ptx::to_float(b[k][column]);
    }
    multiply<16, of_16_bit_elements>(lanes, floats_a, floats_b);
}

static void multiply_tf32(Operands* lanes) {
    float a[8][16];
    Row b[8];
    auto operand = [](const void* registers, int i) {
        return attn::ptx::bit_cast<float>(static_cast<const uint32_t*>(registers)[i] & 0xffffe000);
    };
    for (int lane = 0; lane < 32; ++lane) {
        int group = lane / 4, in_group = lane % 4;
        for (int i = 0; i < 4; ++i) a[in_group + i / 2 * 4][group + i % 2 * 8] = operand(lanes[lane].a, i);
        for (int i = 0; i < 2; ++i) b[in_group + i * 4][group] = operand(lanes[lane].b, i);
    }
    multiply<8, of_tf32>(lanes, a, b);
}

static void multiply_f64(Operands* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        double* d = static_cast<double*>(lanes[lane].result);
        for (int k = 0; k < 4; ++k) {
            double a = *static_cast<const double*>(lanes[lane / 4 * 4 + k].a);
            for (int i = 0; i < 2; ++i) d[i] += a * *static_cast<const double*>(lanes[(lane % 4 * 2 + i) * 4 + k].b);
        }
    }
}

void mma(Operation kind, void* d, const void* a, const void* b) {
    rendezvous(kind, {d, a, b, 0}, [=](Operands* lanes) {
        ++counters.products;
        if (kind == Operation::mma_f16) multiply_16_bit<attn::ptx::f16>(lanes);
        if (kind == Operation::mma_bf16) multiply_16_bit<attn::ptx::bf16>(lanes);
        if (kind == Operation::mma_tf32) multiply_tf32(lanes);
        if (kind == Operation::mma_f64) multiply_f64(lanes);
    });
}

}  // namespace emulator
