// Sums of products as tensor cores form them (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores,
// PeerJ CS 330): products are exact; a group of them and the sum so far are aligned to the largest exponent among them, with
// a few bits below the 24 of a float, and cut off there; their sum, which is exact, is cut off to a float.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

using Row = float __attribute__((vector_size(32)));
using Bits = int32_t __attribute__((vector_size(32)));

// A group on a GPU of sm_80, whose products are the warp's, and of one of sm_90, whose products are the warpgroup's.
struct Group {
    int products, extra_bits;
};
constexpr Group of_16_bit_elements{8, 1}, of_tf32{4, 1}, of_warpgroup{16, 2};

// Whether sums are cut off; with ATTN_EMULATOR_SUMS=nearest they are to the nearest float for each product.
bool sums_are_cut_off();

inline Bits bits_of(Row row) { return reinterpret_cast<Bits&>(row); }
inline Row row_of(Bits bits) { return reinterpret_cast<Row&>(bits); }
inline Bits larger(Bits x, Bits y) { return x > y ? x : y; }

inline Row nearest_sum(Row sum, const Row* products, int count) {
    for (int k = 0; k < count; ++k) sum += products[k];
    return sum;
}

template <int count, int extra_bits>
inline Row cut_off_sum(Row sum, const Row* products) {
    constexpr int magnitude = 0x7fffffff, exponent = 0x7f800000, digits = 23 + extra_bits;
    Bits most = bits_of(sum) & magnitude;
    for (int k = 0; k < count; ++k) most = larger(most, bits_of(products[k]) & magnitude);
    bool is_finite = true;
    for (int i = 0; i < 8; ++i) is_finite = is_finite && most[i] < exponent;
    if (!is_finite) return nearest_sum(sum, products, count);
    // Below 2^-100 as if something of that size were there: the unit of the sum must be a float.
    Bits largest = larger(most & exponent, Bits{} + ((digits + 1) << 23));
    Row scale = row_of(Bits{} + ((254 + digits) << 23) - largest), unit = row_of(largest - (digits << 23));
    Bits total = __builtin_convertvector(sum * scale, Bits);
    for (int k = 0; k < count; ++k) total += __builtin_convertvector(products[k] * scale, Bits);
    Row rounded = __builtin_convertvector(total, Row);
    Bits back = __builtin_convertvector(rounded, Bits);
    Bits is_larger = total < 0 ? back < total : back > total;  // -1 where it is
    return row_of(bits_of(rounded) + is_larger) * unit;
}

// sum + Σ products.
template <int count, int extra_bits>
inline Row add_products(Row sum, const Row* products) {
    return sums_are_cut_off() ? cut_off_sum<count, extra_bits>(sum, products) : nearest_sum(sum, products, count);
}

}  // namespace emulator
