// Parameters of every kernel of the linear engine; src/gpu/linear/params.rs is the twin.
#pragma once

#include "../tile/rows.cuh"

namespace attn::linear {

enum Map : int32_t {
    kIdentity,
    kEluPlusOne,
    kRelu,
    kReluSquared,
    kSilu,
    kExp,
    kSoftmax,
    kTaylor,
    kCosine,
    kPositive,
    kHyperbolic,
    kReluFeatures,
};

enum Scan : int32_t { kFull, kCausal, kChunkExclusive };
enum Decay : int32_t { kNoDecay, kDecayPerHead, kDecayPerToken };

// kRaw: sums are stored as they are, for the kernel that normalises them.
enum Finish : int32_t { kNone, kNormalize, kRmsNorm, kRmsNormAllHeads, kChunkNorm, kRaw };

// Pieces of a block's memory; which ones a kernel has is in its file.
enum Piece : int32_t {
    kPieceRows,
    kPieceWeights,
    kPiecePairs,
    kPieceQueryPhi,
    kPieceKeyPhi,
    kPieceX,
    kPieceValues,
    kPieceSums,
    kPieceDPhi,
    kPieceDValues,
    kPieceZ,
    kPieceS,
    kPieces,
};

struct LinearParams {
    // Operands.
    const void* q;
    const void* k;
    const void* v;
    const void* key_mask;
    const void* log_decay;
    const void* omega;
    const void* state_s;
    const void* state_z;
    const void* state_stabilizer;
    const void* d_out;

    // Results. The backward pass reads `out` and `statistic`.
    void* out;
    void* statistic;
    void* final_s;
    void* final_z;
    void* final_stabilizer;
    void* d_q;
    void* d_k;
    void* d_v;
    void* d_log_decay;

    // Workspaces, in the type of sums unless it says otherwise.
    // ω·D^{-1/4}: rows of `width_row`, filled up with zeros to whole blocks.
    void* directions;
    // [B, H, N, E] sums before their norm.
    void* raw;
    // ⟨d_out, out⟩ per row, laid out as the statistic.
    void* deltas;
    // Gradients of the sums of a norm, but for its divisor: elements, in rows of E filled up to whole 8.
    void* d_sums;
    // Per state head and segment, and one more at the end: [.., D', E] and [.., D'].
    void* segment_s;
    void* segment_z;
    // Of the sums of a segment alone, and entering it (one more at the end).
    void* segment_stabilizer;
    void* entering_stabilizer;
    // Log-decay of a whole segment, double.
    void* segment_log_decay;
    // Gradients of S and z, as the sums.
    void* segment_d_s;
    void* segment_d_z;
    // Stabiliser entering each tile: [B, state heads, tiles].
    void* tile_stabilizers;
    // [B, state heads, M], double: ⟨φ(q), dφ(q)⟩ − ⟨φ(k), dφ(k)⟩.
    void* d_log;
    // Likewise, in the type of sums: what the pairs of each key's tile add to the gradient of its log-decay, where they are
    // not in `d_log`; null where they are.
    void* crossing;
    // 1/n of the keys that the mask leaves in each batch entry, double; null where no norm counts them.
    void* inverse_counts;
    // Pieces that do not fit in shared memory, `spill_bytes` for each block.
    void* spill;

    // In elements.
    tile::Strides q_strides;
    tile::Strides k_strides;
    tile::Strides v_strides;
    tile::Strides out_strides;
    tile::Strides d_out_strides;
    tile::Strides state_s_strides;
    // `row` is unused in what follows.
    tile::Strides state_z_strides;
    tile::Strides state_stabilizer_strides;
    tile::Strides log_decay_strides;
    tile::Strides statistic_strides;
    int64_t key_mask_stride;
    int64_t omega_stride;

    int64_t batch;
    int64_t heads;
    int64_t query_heads;
    int64_t key_heads;
    int64_t value_heads;
    int64_t state_heads;
    // N, M, and the line of positions on which both lie.
    int64_t queries;
    int64_t keys;
    int64_t positions;
    int64_t first_query;
    int64_t first_key;
    // Positions that share the sums they read, for the chunk-exclusive scan.
    int64_t chunk;
    int64_t segments;
    int64_t segment_length;
    int64_t spill_bytes;
    // Byte offset in shared memory, or, if negative, the complement of that in the block's spill.
    int64_t pieces[kPieces];

    double epsilon;
    // Scale of the chunk norm; where `norm_chunk` is above 0, that of position p is 1/⌊(p + norm_before)/norm_chunk⌋
    // norm_chunk.
    double norm_factor;
    int64_t norm_chunk;
    int64_t norm_before;

    // D, D', E and m, and the first three in whole blocks of 32.
    int32_t width;
    int32_t features;
    int32_t value_width;
    int32_t directions_count;
    int32_t width_padded;
    int32_t features_padded;
    // Columns of values of one block, and such blocks beside each other.
    int32_t value_tile;
    int32_t value_tiles;
    // Distances of rows of tiles, in elements.
    int32_t width_row;
    int32_t features_row;
    int32_t values_row;
    int32_t weights_row;

    int32_t map;
    int32_t scan;
    int32_t decay;
    int32_t finish;
    // Whether results are stored in the type of sums.
    int32_t is_out_wide;
    int32_t is_d_q_wide;
    int32_t is_d_k_wide;
    int32_t is_d_v_wide;
};

}  // namespace attn::linear
