// What all kernels of the linear engine share: where a block stands, its memory, and products by all of its warps.
#pragma once

#include "../ptx/barrier.cuh"
#include "../ptx/math.cuh"
#include "../tile/multiply.cuh"
#include "params.cuh"

namespace attn::linear {

using tile::Accumulator;
using tile::Rows;
using tile::WideTile;

// Positions of a tile.
constexpr int kTile = 32;
constexpr int kThreads = 128;

// Math: products whose result is rounded to the element type. SumsMath: (features)ᵀ values, kept in the type of sums;
// 16-bit values are exact on the right. ExactMath: both sides are in the type of sums.
template <class Element>
struct Arithmetic {
    using Real = float;
    using Math = tile::Wide<float, 1>;
    using SumsMath = tile::Wide<float, 2>;
    using ExactMath = tile::Wide<float, 3>;
};

template <>
struct Arithmetic<float> {
    using Real = float;
    using Math = tile::Wide<float, 3>;
    using SumsMath = Math;
    using ExactMath = Math;
};

template <>
struct Arithmetic<double> {
    using Real = double;
    using Math = tile::Wide<double, 1>;
    using SumsMath = Math;
    using ExactMath = Math;
};

// f(arithmetic) for the products of gradients: exact where they add up to the gradient of a log-decay, in which they
// cancel.
template <class Element, class F>
DEVICE void with_math(const LinearParams& p, F f) {
    using Own = Arithmetic<Element>;
    if constexpr (sizeof(Element) < sizeof(float)) {
        if (p.d_log) return f(typename Own::ExactMath{});
    }
    f(typename Own::Math{});
}

DEVICE int warps() { return ptx::threads() / 32; }

template <class Real>
DEVICE Real negative_infinity() {
    return -Real(INFINITY);
}

// 1/x, or 0 for 0.
template <class Real>
DEVICE Real inverse(Real x) {
    return x == Real(0) ? Real(0) : Real(1) / x;
}

// The sum over the lanes of a warp, on every lane.
template <class Real>
DEVICE Real warp_sum(Real x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
    return x;
}

template <class Real>
DEVICE Real warp_max(Real x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x = ptx::max(x, ptx::shuffle_xor(x, mask));
    return x;
}

// f(row) for each row of a tile, by one warp each.
template <class F>
DEVICE void each_row(F f) {
    for (int r = ptx::warp(); r < kTile; r += warps()) f(r);
}

// f(row, column) for each element of a tile, neighbours in a row by neighbouring threads.
template <class F>
DEVICE void each_element(int rows, int columns, F f) {
    int r = ptx::thread() / columns, c = ptx::thread() % columns;
    int down = ptx::threads() / columns, right = ptx::threads() % columns;
    while (r < rows) {
        f(r, c);
        r += down, c += right;
        if (c >= columns) c -= columns, ++r;
    }
}

// f(row, column) for each block of 16·M × 8·N of a tile, by one warp each.
template <int M, int N, class F>
DEVICE void each_block(int rows, int columns, F f) {
    int across = columns / (8 * N), count = rows / (16 * M) * across;
    for (int index = ptx::warp(); index < count; index += warps()) f(index / across * 16 * M, index % across * 8 * N);
}

// sums += left · right. Unrolled further, the loads of later steps take the registers of the sums.
template <class Math, int M, int N, class Left, class Right>
DEVICE void accumulate(Accumulator<typename Math::Real, M, N>& sums, const Left& left, const Right& right, int inner) {
#pragma unroll 2
    for (int k = 0; k < inner; k += Math::kStep) tile::multiply_step<Math>(sums, left, k, right, k);
}

// store(row, column, prior(row, column) + (left · right)(row, column)) for a tile of rows × columns, where left(row)
// and right(column) are the operands from there on.
template <class Math, int M, int N, class Left, class Right, class Prior, class Store>
DEVICE void product(int rows, int columns, int inner, Left left, Right right, Prior prior, Store store) {
    using Real = typename Math::Real;
    each_block<M, N>(rows, columns, [&](int row, int column) {
        Accumulator<Real, M, N> sums;
        sums.take([&](int r, int c) { return prior(row + r, column + c); });
        accumulate<Math>(sums, left(row), right(column), inner);
        sums.put([&](int r, int c, Real x) { store(row + r, column + c, x); });
    });
}

// Operands of `product`.
template <class Math>
DEVICE auto left_rows(typename Math::Tile tile) {
    return [=](int row) { return typename Math::LeftRows{tile.from(row, 0)}; };
}
template <class Math>
DEVICE auto left_transposed(typename Math::Tile tile) {
    return [=](int row) { return typename Math::LeftTransposed{tile.from(0, row)}; };
}
template <class Math>
DEVICE auto right_rows(typename Math::Tile tile) {
    return [=](int column) { return typename Math::RightRows{tile.from(0, column)}; };
}
template <class Math>
DEVICE auto right_transposed(typename Math::Tile tile) {
    return [=](int column) { return typename Math::RightTransposed{tile.from(column, 0)}; };
}

// Positions [start, end).
struct Range {
    int64_t start, end;
};

// A block's part of the work: a segment of the positions of a state head, and a tile of value columns.
struct Place {
    int64_t batch, head, segment;
    int value_tile;

    // Block x counts value tiles first, then segments, then heads.
    DEVICE static Place of_block(const LinearParams& p) {
        int64_t index = ptx::block_x();
        Place place;
        place.value_tile = int(index % p.value_tiles), index /= p.value_tiles;
        place.segment = index % p.segments, index /= p.segments;
        place.head = index % p.state_heads;
        place.batch = index / p.state_heads;
        return place;
    }

    DEVICE int64_t state_head(const LinearParams& p) const { return batch * p.state_heads + head; }

    DEVICE Range positions(const LinearParams& p) const {
        int64_t start = segment * p.segment_length;
        return {start, ptx::min(start + p.segment_length, p.positions)};
    }

    // This head's part of a state that was handed in; null if there is none.
    template <class Real>
    DEVICE const Real* given(const void* data, const tile::Strides& strides) const {
        return data ? static_cast<const Real*>(data) + batch * strides.batch + head * strides.head : nullptr;
    }

    DEVICE bool is_last(const LinearParams& p) const { return segment + 1 == p.segments; }

    // Entry of `segment_s` and the like for a segment, or for what follows the last.
    DEVICE int64_t slot(const LinearParams& p, int64_t segment) const {
        return state_head(p) * (p.segments + 1) + segment;
    }

    DEVICE int first_column(const LinearParams& p) const { return value_tile * p.value_tile; }

    // Value columns of this block.
    DEVICE int columns(const LinearParams& p) const { return ptx::min(p.value_width - first_column(p), p.value_tile); }
};

// visitor.visit(tile, reads, absorbs) for the visits of a sweep over a segment, in order or from its end: where a tile's
// outputs are read from the carried sums, and where its own part is added to them. Where a tile does not read itself, these are
// two visits: a chunk is read before it is added, and a full scan adds everything first, unless the sums of all
// segments are handed in.
template <class Visitor>
DEVICE void each_visit(const LinearParams& p, Range segment, bool is_backward, Visitor& visitor) {
    bool is_inclusive = p.scan == kCausal, is_full = p.scan == kFull;
    int64_t length = segment.end - segment.start, group = p.scan == kChunkExclusive ? p.chunk : length;
    int64_t groups = length == 0 ? 0 : (length + group - 1) / group;
    for (int64_t g = 0; g < groups; ++g) {
        int64_t first = segment.start + (is_backward ? groups - 1 - g : g) * group;
        int64_t count = ptx::min(group, segment.end - first), tiles = (count + kTile - 1) / kTile;
        for (int pass = 0; pass < (is_inclusive ? 1 : 2); ++pass) {
            bool reads = is_inclusive || (is_full ? pass == 1 : pass == 0);
            bool absorbs = is_inclusive || (is_full ? pass == 0 && p.segments == 1 : pass == 1);
            if (!reads && !absorbs) continue;
            for (int64_t t = 0; t < tiles; ++t) {
                int64_t start = first + (is_backward ? tiles - 1 - t : t) * kTile;
                visitor.visit(Range{start, ptx::min(start + kTile, first + count)}, reads, absorbs);
            }
        }
    }
}

// Where the pieces of a block's memory lie: all in shared memory, which the compiler then knows them to be in, or some of
// them in the block's spill.
template <class E>
struct InShared {
    using Element = E;
    using Real = typename Arithmetic<E>::Real;
    // Blocks of a product side by side that a warp has at once.
    static constexpr int kBlocks = 4;

    DEVICE static char* at(const LinearParams&, int64_t offset) { return ptx::shared_memory<char>() + offset; }
};

template <class E>
struct Spilled {
    using Element = E;
    using Real = typename Arithmetic<E>::Real;
    // Addresses take the other registers.
    static constexpr int kBlocks = 2;

    DEVICE static char* at(const LinearParams& p, int64_t offset) {
        if (offset >= 0) return ptx::shared_memory<char>() + offset;
        return static_cast<char*>(p.spill) + ptx::block_x() * p.spill_bytes + ~offset;
    }
};

// A piece of the block's memory.
template <class Memory, class T = typename Memory::Real>
DEVICE T* piece(const LinearParams& p, Piece index) {
    return reinterpret_cast<T*>(Memory::at(p, p.pieces[index]));
}

template <class Memory>
DEVICE WideTile<typename Memory::Real> tile_piece(const LinearParams& p, Piece index, int row) {
    return {piece<Memory>(p, index), row};
}

DEVICE bool is_favor(const LinearParams& p) { return p.map >= kPositive; }
DEVICE bool is_stabilized(const LinearParams& p) { return p.map == kPositive || p.map == kHyperbolic; }
DEVICE bool is_full(const LinearParams& p) { return p.scan == kFull; }

// Whether a query reads keys of its own tile.
DEVICE bool is_inclusive(const LinearParams& p) { return p.scan == kCausal; }

// Whether sums shrink from one position to the next.
DEVICE bool decays(const LinearParams& p) { return p.decay != kNoDecay || is_stabilized(p); }

// Scale of the sums read at a position of a batch entry, for FLASH's global branch.
template <class Real>
DEVICE Real chunk_norm(const LinearParams& p, int64_t batch, int64_t position) {
    if (p.inverse_counts) return Real(static_cast<const double*>(p.inverse_counts)[batch]);
    if (p.norm_chunk == 0) return Real(p.norm_factor);
    int64_t tokens = (p.norm_before + position) / p.norm_chunk * p.norm_chunk;
    return tokens == 0 ? Real(0) : Real(1.0 / double(tokens));
}

// Reads a number in the type of sums or of the elements.
template <class Element, class Real>
DEVICE Real load_as(const void* from, int64_t index, bool is_wide) {
    return is_wide ? static_cast<const Real*>(from)[index] : tile::widen<Real>(static_cast<const Element*>(from)[index]);
}

// Stores in the type of sums or of the elements.
template <class Element, class Real>
DEVICE void store_as(void* to, int64_t index, Real x, bool is_wide) {
    if (is_wide) {
        static_cast<Real*>(to)[index] = x;
    } else {
        static_cast<Element*>(to)[index] = tile::narrow<Element>(x);
    }
}

}  // namespace attn::linear
