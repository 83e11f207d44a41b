// A chunk of 64 positions on warpgroups: its memory, its rows, and its way there.
#pragma once

#include "../tile/pipeline.cuh"
#include "../tile/warpgroup.cuh"
#include "params.sm90.cuh"
#include "tiles.cuh"

namespace attn::linear {

constexpr int kChunk = 64;
constexpr int kStages = 2;
// Barrier of all warpgroups, and the first of those of one.
constexpr int kBarrierOfAll = 1, kBarrierOfOne = 2;

// D′ and value columns of a block, filled up with zeros; each warpgroup has 64 columns. Sides are the keys and the queries:
// 0 for queries alone, which have no values either, 1 for keys, 2 for both.
template <class E, int Width, int Columns, int Sides>
struct ChunkConfig {
    using Element = E;
    static constexpr int kWidth = Width;
    static constexpr int kColumns = Columns;
    static constexpr int kReaders = Columns / 64;
    static constexpr int kMappers = 128 * kReaders;
    // Elements of queries or keys, of values, and of 64 columns of S.
    static constexpr int kSide = kChunk * Width, kValues = kChunk * Columns, kState = Width * 64;
    static constexpr int kStage = Sides == 0 ? kSide : Sides * kSide + kValues;
    static_assert(4 * kReaders * Width <= 1024, "scratch for the sums of features");
    static constexpr bool kReads = Sides != 1, kAbsorbs = Sides != 0, kHasDecays = kAbsorbs;
    // Vectors of 8 elements: those of a row, rows between a mapping thread's, and how many it has.
    static constexpr int kVectors = Width / 8, kStep = kMappers / kVectors, kRows = kChunk / kStep;
};

constexpr double kLog2E = 1.4426950408889634074;

// What is kept per row of a chunk.
struct ChunkRows {
    // Keys; rows without a key, or whose key is masked, have zero features and values.
    int present[kChunk];
    // As in TileRows; G is a logarithm to base 2.
    int cut[kChunk];
    float high[kChunk], low[kChunk];
    float from_start[kChunk], to_end[kChunk];
    float decay;
    int is_whole;

    // What is left at row i of what row j adds, for j from cut[i] to i; for others, without meaning.
    DEVICE float decay_between(int i, int j) const { return ptx::exp2((high[i] - high[j]) + (low[i] - low[j])); }
};

// Between the warpgroups.
struct ChunkScratch {
    // Σ over a warp's rows of φ(k): rows of D′, one for each warp.
    float z[1024];
    // ⟨φ(q), z⟩ before the chunk, per row.
    float norm[kChunk];
    // √(Σ o²) over a warpgroup's columns, per row.
    float norms[2][kChunk];
    // Largest |S| of a warp's rows.
    float largest[8];
};

template <class Config>
struct ChunkShared {
    using Element = typename Config::Element;
    using Tile = tile::SwizzledTile<Element>;
    using Stages = tile::Pipeline<kStages>;
    Element *stages, *state, *out;
    ChunkRows* rows;
    ChunkScratch* scratch;
    Stages pipeline;
    // `key_terms` tiles as the keys'.
    Element* terms;

    // src/gpu/linear/warpgroups.rs adds up the same.
    DEVICE static ChunkShared of_block() {
        auto* stages = ptx::shared_memory<Element>();
        Element* state = stages + kStages * Config::kStage;
        Element* out = state + kStates * Config::kState;
        auto* scratch = reinterpret_cast<ChunkScratch*>(out + kStates * kChunk * 64);
        auto* rows = reinterpret_cast<ChunkRows*>(scratch + 1);
        auto* barriers = reinterpret_cast<ptx::Mbarrier*>(rows + kStages);
        auto* terms = reinterpret_cast<Element*>(ptx::shared_memory<char>() + kBase);
        return {stages, state, out, rows, scratch, {barriers}, terms};
    }
    // Only outputs need S, and room for themselves.
    static constexpr int kStates = Config::kReads ? Config::kReaders : 0;
    static constexpr int kTiles = (kStages * Config::kStage + kStates * (Config::kState + kChunk * 64)) * 2;
    static constexpr int kSmall = sizeof(ChunkScratch) + kStages * sizeof(ChunkRows) + 8 * Stages::kBarriers;
    // Bytes before the terms.
    static constexpr int kBase = (kTiles + kSmall + 1023) / 1024 * 1024;

    DEVICE Tile queries(int stage) const { return {stages + stage * Config::kStage, kChunk}; }
    DEVICE Tile keys(int stage) const { return {queries(stage).data + (Config::kReads ? Config::kSide : 0), kChunk}; }
    DEVICE Tile values(int stage) const { return {keys(stage).data + Config::kSide, kChunk}; }
    DEVICE Tile term(int index) const { return {terms + index * Config::kSide, kChunk}; }
    // S and the outputs of a warpgroup, 64 columns each.
    DEVICE Tile state_of(int warpgroup) const { return {state + warpgroup * Config::kState, Config::kWidth}; }
    DEVICE Tile out_of(int warpgroup) const { return {out + warpgroup * kChunk * 64, kChunk}; }

    DEVICE void initialise() const {
        // A stage is filled by who copies, and by who writes the rows.
        tile::initialise_barriers([&] { pipeline.initialise(Config::kReaders, 2); });
    }
};

// f(chunk) for the chunks of a segment, in order.
template <class F>
DEVICE void each_chunk(Range segment, F f) {
#pragma unroll 1
    for (int64_t start = segment.start; start < segment.end; start += kChunk) {
        f(Range{start, ptx::min(start + kChunk, segment.end)});
    }
}

// Which keys are there, by a warp.
template <class Element>
DEVICE void mark_keys(const Tiles<InShared<Element>>& tiles, Range chunk, ChunkRows& rows) {
    int missing = 0;
#pragma unroll 1
    for (int r = ptx::lane(); r < kChunk; r += 32) {
        bool is_present = tiles.has_key(chunk, r) && tiles.keeps(tiles.key_at(chunk, r));
        rows.present[r] = is_present;
        missing += !is_present;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) missing += ptx::shuffle_xor(missing, mask);
    if (ptx::lane() == 0) rows.is_whole = missing == 0;
}

// Takes cuts out of the logarithms of rows, two in each lane of a warp; the last of the chunk, or −1.
DEVICE int cut_rows(ChunkRows& rows, double (&logs)[2]) {
    int r = 2 * ptx::lane();
    bool is_cut[2] = {cuts_off<float>(logs[0]), cuts_off<float>(logs[1])};
    int last = is_cut[1] ? r + 1 : is_cut[0] ? r : -1;
#pragma unroll 1
    for (int delta = 1; delta < 32; delta *= 2) last = ptx::max(last, ptx::shuffle_up(last, delta));
    int before = ptx::shuffle_up(last, 1);
    if (r == 0) before = -1;
    rows.cut[r] = is_cut[0] ? r : before;
    rows.cut[r + 1] = last;
#pragma unroll
    for (int i = 0; i < 2; ++i) logs[i] = is_cut[i] ? 0.0 : logs[i];
    return ptx::shuffle(last, 31);
}

// Decays of the rows, two by each lane of a warp.
template <class Element>
DEVICE void sum_decays(const Tiles<InShared<Element>>& tiles, Range chunk, ChunkRows& rows) {
    static_assert(kChunk == 64, "two rows for each lane");
    int r = 2 * ptx::lane();
    auto log_decay = [&](int r) { return tiles.has_key(chunk, r) ? tiles.log_decay(tiles.key_at(chunk, r)) : 0.0; };
    double logs[2] = {log_decay(r), log_decay(r + 1)};
    int cut = cut_rows(rows, logs);
    DoubledSum sum{logs[0], 0.0};
    sum.add({logs[1], 0.0});
    auto from = [](const DoubledSum& sum, auto shuffle) { return DoubledSum{shuffle(sum.high), shuffle(sum.low)}; };
#pragma unroll 1
    for (int delta = 1; delta < 32; delta *= 2) {
        DoubledSum earlier = from(sum, [delta](double x) { return ptx::shuffle_up(x, delta); });
        if (ptx::lane() >= delta) sum.add(earlier);
    }
    DoubledSum all = from(sum, [](double x) { return ptx::shuffle(x, 31); });
    if (ptx::lane() == 0) rows.decay = cut < 0 ? ptx::exp(float(all.high)) : 0.0f;
    sum = from(sum, [](double x) { return ptx::shuffle_up(x, 1); });
    if (ptx::lane() == 0) sum = {0.0, 0.0};
    // Not unrolled, here and below: whoever copies has few registers.
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        sum.add({i == 0 ? logs[0] : logs[1], 0.0});
        double log2 = sum.high * kLog2E;
        rows.high[r + i] = float(log2);
        rows.low[r + i] = float(log2 - double(rows.high[r + i]) + sum.low * kLog2E);
        rows.from_start[r + i] = rows.cut[r + i] < 0 ? ptx::exp(float(sum.high)) : 0.0f;
        rows.to_end[r + i] = r + i < cut ? 0.0f : ptx::exp(float((all.high - sum.high) + (all.low - sum.low)));
    }
}

// Fills the stages with the chunks of a segment, by a warp.
template <class Config>
DEVICE void copy_chunks(const LinearMappedParams& params, const ChunkShared<Config>& shared) {
    using Element = typename Config::Element;
    const LinearParams& p = params.problem;
    Tiles<InShared<Element>> tiles(p);
    tile::Turn<kStages> turn;
    auto copy = [&](const typename ChunkShared<Config>::Tile& into, int panels, const ptx::TensorMap& map, int64_t row,
                    int64_t head) {
        tile::load_panels(into, panels, map, row, head, tiles.place.batch, shared.pipeline.full(turn.stage));
    };
    each_chunk(tiles.place.positions(p), [&](Range chunk) {
        tile::wait_for_phase(shared.pipeline.empty(turn.stage), turn.parity ^ 1);
        if (ptx::elect()) {
            ptx::mbarrier_arrive_expect_tx(shared.pipeline.full(turn.stage), Config::kStage * sizeof(Element));
            if constexpr (Config::kReads) {
                copy(shared.queries(turn.stage), Config::kWidth / 64, params.q_map, tiles.query_at(chunk, 0),
                     tiles.query_head(0));
            }
            if constexpr (Config::kAbsorbs) {
                copy(shared.keys(turn.stage), Config::kWidth / 64, params.k_map, tiles.key_at(chunk, 0),
                     tiles.key_head());
#pragma unroll 1
                for (int panel = 0; panel < Config::kColumns / 64; ++panel) {
                    const int at[4] = {tiles.place.first_column(p) + 64 * panel, int(tiles.key_at(chunk, 0)),
                                       int(tiles.value_head()), int(tiles.place.batch)};
                    ptx::tensor_load(shared.values(turn.stage).data + panel * kChunk * 64, params.v_map,
                                     shared.pipeline.full(turn.stage), at);
                }
            }
        }
        ChunkRows& rows = shared.rows[turn.stage];
        if constexpr (Config::kAbsorbs) mark_keys(tiles, chunk, rows);
        if constexpr (Config::kHasDecays) {
            if (p.decay != kNoDecay) sum_decays(tiles, chunk, rows);
        }
        ptx::warp_sync();
        if (ptx::lane() == 0) ptx::mbarrier_arrive(shared.pipeline.full(turn.stage));
        turn.advance();
    });
}

// A block: its last warp copies, each of its warpgroups runs the `Work` of 64 value columns.
template <class Config, class Work>
DEVICE void run_block(const LinearMappedParams& params) {
    auto shared = Work::Shared::of_block();
    shared.initialise();
    if (ptx::warpgroup() == Config::kReaders) {
        if constexpr (Config::kReaders == 2) ptx::setmaxnreg_dec<40>();
        if (ptx::warp() == 4 * Config::kReaders) copy_chunks(params, shared);
    } else {
        if constexpr (Config::kReaders == 2) ptx::setmaxnreg_inc<232>();
        Work(params, shared).run();
    }
}

}  // namespace attn::linear
