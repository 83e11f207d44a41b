// What the kernels of the quadratic engine are given. Every kernel takes the same struct; its twin is in
// src/gpu/quadratic.
#pragma once

#include "../tile/rows.cuh"
#include "mask.cuh"

namespace attn::quadratic {

// The type of sums for an element type.
template <class Element>
struct Sums {
    using Real = float;
};
template <>
struct Sums<double> {
    using Real = double;
};

enum WeightKind : int32_t { kSoftmax, kRelu, kReluSquared };
enum FinishKind : int32_t { kNone, kScale, kRowSum, kRmsNorm };
// What is multiplied by the inverse number of keys.
enum PerKey : int32_t { kNothing, kScores, kSums };

// What the backward pass needs to know of a query row.
template <class Real>
struct alignas(4 * sizeof(Real)) RowFactors {
    // log-sum-exp times log2 e, +inf where no weight is left (softmax); else the factor of the finish.
    Real statistic;
    // d_score = weight' (d_weight - delta), times the factor
    Real delta;
    // The gradient of the row's sum is d_out - from_out out, times the factor.
    Real from_out;
    Real reserved;
};

template <class Element>
struct QuadraticParams {
    using Real = typename Sums<Element>::Real;

    // Inputs; null where the problem has none.
    const Element* q;
    const Element* k;
    const Element* v;
    const uint8_t* key_mask;
    const Element* bias;
    const Real* d_statistic;
    // Elements of the type of sums if `is_out_wide`. Written by the forward pass, read by the backward pass.
    void* out;
    const void* d_out;
    Real* statistic;
    // Gradients, contiguous.
    Element* d_q;
    Element* d_k;
    Element* d_v;
    Element* d_bias;
    // Workspaces: sums [splits, B, H, N, E]; their maxima and sums of weights [splits, B, H, N, 2]; [B, H, N].
    Real* partial_sums;
    Real* partial_weights;
    RowFactors<Real>* factors;
    // Gradients of the bias from each block of queries of a launch [blocks, bias_span], the distance that its first one
    // belongs to, and their sums over the launches so far [heads of the bias, 2R + 1].
    Real* partial_bias;
    int64_t* first_distance;
    Real* bias_sums;
    // 1/n of the keys that the mask leaves in each batch entry, if anything is multiplied by it.
    double* inverse_counts;
    // In elements.
    tile::Strides q_strides, k_strides, v_strides, out_strides, d_out_strides, statistic_strides, d_statistic_strides;
    int64_t key_mask_stride, bias_stride;
    int64_t batch, heads, key_heads, queries, keys;
    int64_t bias_radius, bias_span;
    // Blocks of queries that this launch is about.
    int64_t first_block, blocks;
    Mask mask;
    double scale;
    // 0: none
    double soft_cap;
    // scale / soft_cap
    double cap_scale;
    // The constant of the finish: the factor, or epsilon.
    double constant;
    int32_t width, value_width;
    int32_t weight, finish;
    int32_t is_out_wide;
    // Key tiles are divided among this many blocks; with partial sums, workspaces take the place of outputs.
    int32_t splits, has_partial_sums;
    // Whether the block's own rows stay in shared memory; 1 or 2 stages for the others.
    int32_t is_resident, stages;
    int32_t bias_heads;
    int32_t per_key;

    DEVICE double scale_of(int64_t batch_entry) const {
        return per_key == kScores ? scale * inverse_counts[batch_entry] : scale;
    }
    DEVICE double constant_of(int64_t batch_entry) const {
        return per_key == kSums ? constant * inverse_counts[batch_entry] : constant;
    }

    DEVICE int offset() const { return int(keys - queries); }
    DEVICE int group() const { return int(heads) / int(key_heads); }

    // Keys that query i sees, key mask aside.
    DEVICE Range visible_keys(int i) const { return mask.around(i + offset(), 0, 0, int(keys)); }

    // Queries that see key j, key mask aside.
    DEVICE Range seeing_queries(int j) const { return mask.mirrored().around(j, offset(), 0, int(queries)); }

    DEVICE const uint8_t* mask_of(int64_t batch_entry) const {
        return key_mask == nullptr ? nullptr : key_mask + batch_entry * key_mask_stride;
    }

    DEVICE Real* statistic_of(int64_t batch_entry, int64_t head, int64_t query) const {
        const tile::Strides& strides = statistic_strides;
        return statistic + batch_entry * strides.batch + head * strides.head + query * strides.row;
    }

    DEVICE int64_t row(int64_t batch_entry, int64_t head, int64_t query) const {
        return (batch_entry * heads + head) * queries + query;
    }
};

// A block of rows of one head, out of `heads` heads of `count` rows in each batch entry.
struct RowBlock {
    int batch, head, first;

    // Neighbours along x share a head; the last rows, which see most keys of a causal mask, come first.
    DEVICE static RowBlock of(int64_t x, int64_t heads, int64_t count, int rows) {
        unsigned blocks = unsigned((count + rows - 1) / rows);
        unsigned unit = unsigned(x) / blocks;
        return {int(unit / unsigned(heads)), int(unit % unsigned(heads)), int(blocks - 1 - unsigned(x) % blocks) * rows};
    }
};

// Rows of the keys or values that a query head reads.
template <class Element>
DEVICE tile::Rows<const Element> key_rows(const QuadraticParams<Element>& params, int64_t batch, int64_t key_head) {
    return tile::rows_of_head(params.k, params.k_strides, batch, key_head, params.keys, params.width);
}

template <class Element>
DEVICE tile::Rows<const Element> value_rows(const QuadraticParams<Element>& params, int64_t batch, int64_t key_head) {
    return tile::rows_of_head(params.v, params.v_strides, batch, key_head, params.keys, params.value_width);
}

template <class Element>
DEVICE tile::Rows<const Element> query_rows(const QuadraticParams<Element>& params, int64_t batch, int64_t head) {
    return tile::rows_of_head(params.q, params.q_strides, batch, head, params.queries, params.width);
}

// Says whether a row of keys or values is there: all, or those that the key mask keeps.
struct KeptKeys {
    const uint8_t* mask;
    DEVICE bool operator()(int64_t key) const { return mask == nullptr || mask[key] != 0; }
};

struct EveryRow {
    DEVICE bool operator()(int64_t) const { return true; }
};

}  // namespace attn::quadratic
