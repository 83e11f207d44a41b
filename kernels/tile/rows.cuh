// Rows of operands in global memory, and their way into tiles and out of accumulators. All threads of a block take part.
#pragma once

#include "../ptx/cp_async.cuh"
#include "../ptx/element.cuh"
#include "../ptx/vector.cuh"
#include "accumulator.cuh"
#include "native.cuh"
#include "wide.cuh"

namespace attn::tile {

// An element in the type of sums, and back with one rounding.
template <class Real, class Element>
DEVICE Real widen(Element x) {
    if constexpr (sizeof(Real) == sizeof(double)) {
        return ptx::to_double(x);
    } else {
        return ptx::to_float(x);
    }
}

template <class Element, class Real>
DEVICE Element narrow(Real x) {
    if constexpr (sizeof(Element) < sizeof(Real)) {
        return ptx::from_float<Element>(float(x));
    } else {
        return x;
    }
}

// Eight elements as floats.
template <class Element>
DEVICE void widen_vector(const ptx::Vector<Element, 8>& from, float (&x)[8]) {
    auto pairs = ptx::bit_cast<ptx::Vector<uint32_t, 4>>(from);
#pragma unroll
    for (int j = 0; j < 4; ++j) ptx::unpack<Element>(pairs.value[j], x[2 * j], x[2 * j + 1]);
}

// And back with one rounding, two with each instruction.
template <class Element>
DEVICE ptx::Vector<Element, 8> narrow_vector(const float (&x)[8]) {
    ptx::Vector<uint32_t, 4> pairs;
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs.value[j] = ptx::pack<Element>(x[2 * j], x[2 * j + 1]);
    return ptx::bit_cast<ptx::Vector<Element, 8>>(pairs);
}

// The rows of one head: `count` rows of `width` elements, `stride` elements apart.
template <class Element>
struct Rows {
    Element* data;
    int64_t stride;
    int64_t count;
    int width;

    DEVICE Element* row(int64_t r) const { return data + r * stride; }

    // The same rows from a column on.
    DEVICE Rows from_column(int c) const { return {data + c, stride, count, width - c}; }

    // Whether every row starts at a multiple of 16 bytes and consists of whole 16-byte vectors.
    DEVICE bool is_aligned() const {
        uint64_t bits = reinterpret_cast<uint64_t>(data) | stride * sizeof(Element) | width * sizeof(Element);
        return bits % 16 == 0;
    }
};

// A row-major array of more than two dimensions: the strides of batch entry, head and row, in elements.
struct Strides {
    int64_t batch, head, row;
};

template <class Element>
DEVICE Rows<Element> rows_of_head(Element* data, const Strides& strides, int64_t batch, int64_t head, int64_t count,
                                  int width) {
    return {data + batch * strides.batch + head * strides.head, strides.row, count, width};
}

// The vectors of a tile that fall to a thread, row by row.
struct VectorOfThread {
    int row, index;
    // From one to the next.
    int rows, indices;

    DEVICE static VectorOfThread first(int vectors) {
        return {ptx::thread() / vectors, ptx::thread() % vectors, ptx::threads() / vectors, ptx::threads() % vectors};
    }

    DEVICE void advance(int vectors) {
        row += rows, index += indices;
        if (index >= vectors) index -= vectors, ++row;
    }
};

// Rows first … first + rows of `from` into a tile of `rows` × `columns`, converted. Rows outside `from` or refused by
// keep(row), and columns past its width, are zeros; what they would be is not read.
template <class Real, class Element, class Keep>
DEVICE void load(const WideTile<Real>& into, const Rows<const Element>& from, int64_t first, int rows, int columns,
                 Keep keep) {
    // 16 bytes of the tile, so that neighbouring lanes write neighbouring banks.
    constexpr int kVector = 16 / sizeof(Real);
    bool is_aligned = from.is_aligned();
    bool is_tile_aligned = (reinterpret_cast<uint64_t>(into.data) | into.row * sizeof(Real)) % 16 == 0;
    int vectors = (columns + kVector - 1) / kVector;
#pragma unroll 2
    for (auto at = VectorOfThread::first(vectors); at.row < rows; at.advance(vectors)) {
        int r = at.row, c = at.index * kVector;
        int64_t row = first + r;
        bool is_present = row >= 0 && row < from.count && keep(row);
        int present = is_present ? ptx::min(from.width - c, kVector) : 0;
        ptx::Vector<Element, kVector> x;
        if (is_aligned && present == kVector) x = ptx::load_constant<Element, kVector>(from.row(row) + c);
        ptx::Vector<Real, kVector> wide;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            bool is_read = i < present;
            if (is_read && !is_aligned) x.value[i] = from.row(row)[c + i];
            wide.value[i] = is_read ? widen<Real>(x.value[i]) : Real(0);
        }
        if (is_tile_aligned && c + kVector <= columns) {
            ptx::store_vector(&into.at(r, c), wide);
            continue;
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (c + i < columns) into.at(r, c + i) = wide.value[i];
        }
    }
}

// The same into a swizzled tile, by asynchronous copies where alignment allows; `columns` is a multiple of 8.
template <class Element, class Keep>
DEVICE void load(const SwizzledTile<Element>& into, const Rows<const Element>& from, int64_t first, int rows,
                 int columns, Keep keep) {
    constexpr int kVector = 8;
    bool is_aligned = from.is_aligned();
    int vectors = columns / kVector;
#pragma unroll 1
    for (auto at = VectorOfThread::first(vectors); at.row < rows; at.advance(vectors)) {
        int r = at.row, c = at.index * kVector;
        int64_t row = first + r;
        bool is_present = row >= 0 && row < from.count && keep(row);
        int present = is_present ? ptx::max(ptx::min(from.width - c, kVector), 0) : 0;
        Element* to = into.chunk(r, c);
        if (is_aligned) {
            ptx::cp_async_16(to, present > 0 ? from.row(row) + c : from.data, present > 0);
            continue;
        }
        ptx::Vector<Element, kVector> x;
#pragma unroll
        for (int i = 0; i < kVector; ++i) x.value[i] = i < present ? from.row(row)[c + i] : Element{};
        ptx::store_vector(to, x);
    }
}

// The numbers of an accumulator whose first row and column are given into rows of `into`, converted; what lies outside
// is left out.
template <class Real, int M, int N, class Element>
DEVICE void store(const Accumulator<Real, M, N>& sums, const Rows<Element>& into, int64_t first, int column) {
    bool is_even = (reinterpret_cast<uint64_t>(into.data) | into.stride * sizeof(Element)) % (2 * sizeof(Element)) == 0;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int64_t row = first + 16 * m + block_row(2 * half);
            if (row < 0 || row >= into.count) continue;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                int c = column + 8 * n + block_column(0);
                ptx::Vector<Element, 2> pair;
                for (int i = 0; i < 2; ++i) pair.value[i] = narrow<Element>(sums.value[m][n][2 * half + i]);
                if (is_even && c + 1 < into.width) {
                    ptx::store_vector(into.row(row) + c, pair);
                } else {
                    for (int i = 0; i < 2; ++i) {
                        if (c + i < into.width) into.row(row)[c + i] = pair.value[i];
                    }
                }
            }
        }
    }
}

}  // namespace attn::tile
