// A sweep of the backward pass on warpgroups: what its products are of, its memory, its rows, and their way there.
#pragma once

#include "chunk.sm90.cuh"

namespace attn::linear {

// Every gradient is  out = weights(x yᵀ) z + x stateᵀ,  state ← state + zᵀ y:
//
//               x      y      z      state      chunks
//   d_queries   dT     v      φ(k)   S          in order
//   d_keys      v      dT     φ(q)   R          from the end
//   d_values    φ(k)   φ(q)   dT     Rᵀ         from the end
//   d_states           dT     φ(q)   R          from the end, only the state
enum class Gradient { d_queries, d_keys, d_values, d_states };

template <Gradient G>
constexpr bool is_backward = G != Gradient::d_queries;

// Columns of z and of the output that a block has, 64 for each warpgroup, and all columns of x and y.
template <class E, int Outer, int Inner>
struct SweepConfig {
    using Element = E;
    static constexpr int kOuter = Outer, kInner = Inner;
    static constexpr int kGroups = Outer / 64, kMappers = 128 * kGroups;
    static constexpr int kWide = kChunk * Inner, kNarrow = kChunk * Outer;
    // x, y, z, and what the gradient is of.
    static constexpr int kStage = 2 * kWide + 2 * kNarrow;
};

// What is kept per row of a chunk. dT = factor · the gradient of sums that is copied.
struct SweepRows : ChunkRows {
    float factor[kChunk], d_norm[kChunk];
    // Of rows of x stateᵀ, and of z or r, in the output.
    float left[kChunk], extra[kChunk];
    // Of rows of z in the state, and in z or r; of rows of the output in the state of the sweep the other way.
    float term[kChunk], sum[kChunk], back[kChunk];
    // What R of this chunk is multiplied by, so that factors come to about 1.
    float unit;
};

struct SweepScratch {
    // Σ over a warp's rows of features: rows of the block's columns, one for each warp.
    alignas(16) float sums[8 * 128];
    // z or r before a chunk, in turns.
    float z[2][128];
    // Largest |state| of a warp's rows.
    float largest[8];
    // ⟨φ, dφ⟩ of a warpgroup's columns, per row.
    float along[2][kChunk];
};

template <class Config>
struct SweepShared {
    using Element = typename Config::Element;
    using Tile = tile::SwizzledTile<Element>;
    using Stages = tile::Pipeline<kStages>;
    Element *stages, *state, *terms;
    SweepRows* rows;
    SweepScratch* scratch;
    Stages pipeline;
    // What rounding leaves of the state.
    Element* rest;

    // src/gpu/linear/sweeps.rs adds up the same.
    DEVICE static SweepShared of_block() {
        auto* stages = ptx::shared_memory<Element>();
        Element* state = stages + kStages * Config::kStage;
        Element* terms = state + Config::kOuter * Config::kInner;
        auto* scratch = reinterpret_cast<SweepScratch*>(terms + Config::kNarrow);
        auto* rows = reinterpret_cast<SweepRows*>(scratch + 1);
        auto* barriers = reinterpret_cast<ptx::Mbarrier*>(rows + kStages);
        auto* rest = reinterpret_cast<Element*>(ptx::shared_memory<char>() + kBase);
        return {stages, state, terms, rows, scratch, {barriers}, rest};
    }
    static constexpr int kTiles = kStages * Config::kStage + Config::kOuter * Config::kInner + Config::kNarrow;
    static constexpr int kSmall = sizeof(SweepScratch) + kStages * sizeof(SweepRows) + 8 * Stages::kBarriers;
    // Bytes before the rest.
    static constexpr int kBase = (kTiles * 2 + kSmall + 1023) / 1024 * 1024;

    DEVICE Tile x(int stage) const { return {stages + stage * Config::kStage, kChunk}; }
    DEVICE Tile y(int stage) const { return {x(stage).data + Config::kWide, kChunk}; }
    DEVICE Tile z(int stage) const { return {y(stage).data + Config::kWide, kChunk}; }
    DEVICE Tile own(int stage) const { return {z(stage).data + Config::kNarrow, kChunk}; }
    DEVICE Tile term() const { return {terms, kChunk}; }
    // Rounded, 64 rows of a warpgroup.
    DEVICE Tile state_of(int warpgroup) const { return {state + warpgroup * 64 * Config::kInner, 64}; }
    DEVICE Tile rest_of(int warpgroup) const { return {rest + warpgroup * 64 * Config::kInner, 64}; }

    DEVICE void initialise() const {
        // A stage is filled by who copies, and by who writes the rows.
        tile::initialise_barriers([&] { pipeline.initialise(Config::kGroups, 2); });
    }
};

// f(chunk) for the chunks of a segment, in order or from the end.
template <bool IsBackward, class F>
DEVICE void each_chunk_of_sweep(Range segment, F f) {
    if constexpr (!IsBackward) return each_chunk(segment, f);
    int64_t count = (segment.end - segment.start + kChunk - 1) / kChunk;
#pragma unroll 1
    for (int64_t start = segment.start + (count - 1) * kChunk; start >= segment.start; start -= kChunk) {
        f(Range{start, ptx::min(start + kChunk, segment.end)});
    }
}

// Fills the stages with the chunks of a segment, by a warp.
template <class Config, Gradient G>
struct SweepCopies {
    using Element = typename Config::Element;
    using Tile = tile::SwizzledTile<Element>;

    const LinearSweepParams& params;
    const SweepShared<Config>& shared;
    // First column of z and the output.
    int first;
    Tiles<InShared<Element>> tiles;
    tile::Turn<kStages> turn;

    const LinearParams& p = params.problem;

    // 64 columns each.
    DEVICE void copy(const Tile& into, int panels, int column, const ptx::TensorMap& map, int64_t row, int64_t head) {
#pragma unroll 1
        for (int panel = 0; panel < panels; ++panel) {
            const int at[4] = {column + 64 * panel, int(row), int(head), int(tiles.place.batch)};
            ptx::tensor_load(into.data + panel * kChunk * 64, map, shared.pipeline.full(turn.stage), at);
        }
    }

    DEVICE void copy_tiles(Range chunk) {
        constexpr int kOuter = Config::kOuter / 64, kInner = Config::kInner / 64;
        int stage = turn.stage;
        auto q = [&](const Tile& into, int panels, int column) {
            copy(into, panels, column, params.q_map, tiles.query_at(chunk, 0), tiles.query_head(0));
        };
        auto k = [&](const Tile& into, int panels, int column) {
            copy(into, panels, column, params.k_map, tiles.key_at(chunk, 0), tiles.key_head());
        };
        auto v = [&](const Tile& into) {
            copy(into, kInner, 0, params.v_map, tiles.key_at(chunk, 0), tiles.value_head());
        };
        auto d_sums = [&](const Tile& into, int panels, int column) {
            copy(into, panels, column, params.d_sums_map, tiles.query_at(chunk, 0), tiles.reader_head(0));
        };
        if constexpr (G == Gradient::d_queries) {
            d_sums(shared.x(stage), kInner, 0), v(shared.y(stage)), k(shared.z(stage), kOuter, first);
            if (params.has_own) q(shared.own(stage), kOuter, first);
        } else if constexpr (G == Gradient::d_keys) {
            v(shared.x(stage)), d_sums(shared.y(stage), kInner, 0), q(shared.z(stage), kOuter, first);
            if (params.has_own) k(shared.own(stage), kOuter, first);
        } else if constexpr (G == Gradient::d_states) {
            d_sums(shared.y(stage), kInner, 0), q(shared.z(stage), kOuter, first);
        } else {
            k(shared.x(stage), kInner, 0), q(shared.y(stage), kInner, 0), d_sums(shared.z(stage), kOuter, first);
        }
    }

    // Weights of the rows; other lanes have written their decays.
    DEVICE void weigh_rows(Range chunk, SweepRows& rows) {
        ptx::warp_sync();
        float largest = 0.0f;
#pragma unroll 1
        for (int r = ptx::lane(); r < kChunk; r += 32) {
            float factor = 0.0f, d_norm = 0.0f;
            if (tiles.has_query(chunk, r)) read_finish(tiles.query_at(chunk, r), factor, d_norm);
            rows.factor[r] = factor, rows.d_norm[r] = G == Gradient::d_values ? 0.0f : d_norm;
            largest = ptx::max(largest, factor);
        }
        // Brings the largest below 1.
        float unit = p.finish == kNone ? 1.0f : ptx::scale_to(warp_max(largest), -1);
#pragma unroll 1
        for (int r = ptx::lane(); r < kChunk; r += 32) {
            float from_start = p.decay == kNoDecay ? 1.0f : rows.from_start[r];
            float to_end = p.decay == kNoDecay ? 1.0f : rows.to_end[r];
            float of_query = from_start * rows.factor[r], of_norm = from_start * rows.d_norm[r];
            rows.left[r] = is_backward<G> ? to_end : of_query, rows.extra[r] = is_backward<G> ? to_end : of_norm;
            rows.term[r] = is_backward<G> ? of_query * unit : to_end, rows.sum[r] = is_backward<G> ? of_norm : to_end;
            rows.back[r] = is_backward<G> ? to_end : of_query * unit;
        }
        if (ptx::lane() == 0) rows.unit = unit;
    }

    // dT and dn of a row: of ⟨φ(q), z⟩ only if divided by it.
    DEVICE void read_finish(int64_t query, float& factor, float& d_norm) const {
        factor = 1.0f;
        if (p.finish == kNone) return;
        int64_t head = tiles.reader_head(0), batch = tiles.place.batch;
        const auto& strides = p.statistic_strides;
        factor = inverse(static_cast<const float*>(
            p.statistic)[batch * strides.batch + head * strides.head + query * strides.row]);
        if (p.finish != kNormalize) return;
        d_norm = -factor * static_cast<const float*>(p.deltas)[(batch * p.heads + head) * p.queries + query];
    }

    DEVICE void run() {
        constexpr bool kHasX = G != Gradient::d_states;
        bool has_own = params.has_own && kHasX && G != Gradient::d_values;
        int count = (1 + kHasX) * Config::kWide + (1 + has_own) * Config::kNarrow;
        each_chunk_of_sweep<is_backward<G>>(tiles.place.positions(p), [&](Range chunk) {
            tile::wait_for_phase(shared.pipeline.empty(turn.stage), turn.parity ^ 1);
            if (ptx::elect()) {
                ptx::mbarrier_arrive_expect_tx(shared.pipeline.full(turn.stage), count * sizeof(Element));
                copy_tiles(chunk);
            }
            SweepRows& rows = shared.rows[turn.stage];
            mark_keys(tiles, chunk, rows);
            if (p.decay != kNoDecay) sum_decays(tiles, chunk, rows);
            weigh_rows(chunk, rows);
            ptx::warp_sync();
            if (ptx::lane() == 0) ptx::mbarrier_arrive(shared.pipeline.full(turn.stage));
            turn.advance();
        });
    }
};

template <Gradient G, class Config>
DEVICE void copy_chunks(const LinearSweepParams& params, const SweepShared<Config>& shared, int first) {
    SweepCopies<Config, G>{params, shared, first, Tiles<InShared<typename Config::Element>>(params.problem), {}}.run();
}

}  // namespace attn::linear
