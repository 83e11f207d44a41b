// The state of a sweep of the backward pass: 64 rows of it in the registers of each warpgroup, and what they are made of.
#pragma once

#include "../ptx/barrier.cuh"
#include "../tile/packed.cuh"
#include "state.sm90.cuh"
#include "sweep.sm90.cuh"

namespace attn::linear {

template <class Config, Gradient G>
struct StateOfSweep {
    using Element = typename Config::Element;
    using Shared = SweepShared<Config>;
    using Tile = typename Shared::Tile;
    static constexpr bool kIsOfFeatures = G != Gradient::d_values;
    // Whether numbers must be brought into the range of the elements.
    static constexpr bool kScales = !ptx::is_bf16<Element>;

    const LinearSweepParams& params;
    const Shared& shared;
    // First column of the block's output.
    int first;
    Tiles<InShared<Element>> tiles;
    int own;
    const LinearParams& p;
    tile::Turn<kStages> turn;
    // Which of the two z is that before the chunk.
    int before = 0;
    // What the state is multiplied by, and 1 over that of the rounded one.
    float unit = 1.0f, state_scale = 1.0f;
    tile::WarpgroupSums<Config::kInner> state;

    DEVICE StateOfSweep(const LinearSweepParams& params, const Shared& shared, int first)
        : params(params),
          shared(shared),
          first(first),
          tiles(params.problem),
          own(ptx::warpgroup()),
          p(params.problem) {}

    DEVICE void barrier_of_all() const { ptx::barrier_sync(kBarrierOfAll, Config::kMappers); }
    DEVICE void barrier_of_one() const { ptx::barrier_sync(kBarrierOfOne + own, 128); }
    // Row of the chunk of a row of this warp.
    DEVICE int chunk_row(int row) const { return tile::first_row_of_warp() + row; }
    DEVICE int first_column() const { return first + 64 * own; }
    // Whether the state is read as the sum of two numbers: for the gradient of the log-decay, in which all but little of
    // ⟨φ, dφ⟩ cancels.
    DEVICE bool is_exact() const { return Config::kInner <= 128 && p.d_log; }
    DEVICE bool has_norm() const { return kIsOfFeatures && p.finish == kNormalize; }

    // f(feature, value column, number) for those of the state that exist.
    template <class F>
    DEVICE void each_of_state(F f) {
        state.each([&](int row, int column, float& x) {
            int outer = first_column() + chunk_row(row);
            int feature = kIsOfFeatures ? outer : column, value = kIsOfFeatures ? column : outer;
            if (feature < p.features && value < p.value_width) f(feature, value, x);
        });
    }

    // S and z of the keys before the segment, or R and r of the queries after it.
    DEVICE void enter() {
        const float *from_s = nullptr, *from_z = nullptr;
        int64_t stride = p.value_width;
        const Place& place = tiles.place;
        if (p.segments > 1) {
            int64_t slot = place.slot(p, place.segment);
            auto all_s = static_cast<const float*>(is_backward<G> ? p.segment_d_s : p.segment_s);
            auto all_z = static_cast<const float*>(is_backward<G> ? p.segment_d_z : p.segment_z);
            from_s = all_s + slot * p.features * p.value_width, from_z = all_z + slot * p.features;
        } else if (p.state_s && !is_backward<G>) {
            from_s = place.template given<float>(p.state_s, p.state_s_strides);
            from_z = place.template given<float>(p.state_z, p.state_z_strides);
            stride = p.state_s_strides.row;
        }
        clear();
        if (from_s) each_of_state([&](int feature, int value, float& x) { x = from_s[feature * stride + value]; });
        int f = ptx::thread();
        if (from_z && f < Config::kOuter && first + f < p.features) shared.scratch->z[before][f] = from_z[first + f];
        publish_state();
    }

    DEVICE void clear() {
        state = tile::WarpgroupSums<Config::kInner>::zero();
        if (ptx::thread() < Config::kOuter) shared.scratch->z[before][ptx::thread()] = 0.0f;
    }

    // The state, rounded, to where the next products read it.
    DEVICE void publish_state() {
        float scale = 1.0f;
        if constexpr (kScales) {
            float largest = 0.0f;
            state.each([&](int, int, float& x) { largest = ptx::max(largest, ptx::abs(x)); });
            largest = warp_max(largest);
            float* all = shared.scratch->largest + 4 * own;
            if (ptx::lane() == 0) all[ptx::warp() % 4] = largest;
            barrier_of_one();
            scale = fitting_scale(ptx::max(ptx::max(all[0], all[1]), ptx::max(all[2], all[3])));
        }
        state_scale = 1.0f / (scale * unit);
#pragma unroll
        for (int i = 0; i < Config::kInner / 64; ++i) {
            tile::PackedRows<Element, 64> packed;
            auto columns = tile::columns_of(state, i);
            if constexpr (kScales) columns.each([&](int, int, float& x) { x *= scale; });
            packed.set(columns);
            auto panel = [&](const Tile& tile) { return Tile{tile.data + i * 64 * 64, 64}; };
            tile::store(panel(shared.state_of(own)), tile::first_row_of_warp(), packed);
            if (!is_exact()) continue;
            auto rounded = packed.widened();
            columns.with_indexed(rounded, [](int, int, int, int, float& x, float& y) { x -= y; });
            packed.set(columns);
            tile::store(panel(shared.rest_of(own)), tile::first_row_of_warp(), packed);
        }
        ptx::fence_proxy_async();
        barrier_of_one();
    }

    // f(row, column, eight elements) for this thread's vectors of a tile.
    template <int Columns, class F>
    DEVICE void each_vector(const Tile& tile, F f) const {
        constexpr int kAcross = Columns / 8, kDown = Config::kMappers / kAcross;
        int thread = tile::thread_here();
#pragma unroll 2
        for (int i = 0; i < kChunk / kDown; ++i) {
            int r = thread / kAcross + i * kDown, column = thread % kAcross * 8;
            f(r, column, tile.chunk(r, column));
        }
    }

    // φ of a vector, of which `there` elements are features.
    DEVICE void map_features(float (&x)[8], int there) const {
        map_vector(p.map, x);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (j >= there) x[j] = 0.0f;
        }
    }

    DEVICE void widen(const Element* at, float (&x)[8]) const {
        tile::widen_vector(ptx::load_vector<Element, 8>(at), x);
    }

    DEVICE void narrow(Element* at, const float (&x)[8]) const {
        ptx::store_vector(at, tile::narrow_vector<Element>(x));
    }

    // φ of z, its rows as the state takes them up, and their sums.
    DEVICE void map_z(const SweepRows& rows) {
        constexpr int kAcross = Config::kOuter / 8;
        float sums[8] = {};
        bool is_mapped = kIsOfFeatures && (p.map != kIdentity || (!is_backward<G> && !rows.is_whole));
        if (!is_mapped && !params.has_term && !has_norm()) return;
        Tile terms = shared.term();
        each_vector<Config::kOuter>(shared.z(turn.stage), [&](int r, int column, Element* at) {
            float x[8];
            widen(at, x);
            if constexpr (kIsOfFeatures) {
                bool is_there = is_backward<G> || rows.present[r];
                map_features(x, is_there ? p.features - first - column : 0);
                if (is_mapped) narrow(at, x);
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[j] += x[j] * rows.sum[r];
            }
            if (!params.has_term) return;
#pragma unroll
            for (int j = 0; j < 8; ++j) x[j] *= rows.term[r];
            narrow(terms.chunk(r, column), x);
        });
        if (!has_norm()) return;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int mask = kAcross; mask < 32; mask *= 2) sums[j] += ptx::shuffle_xor(sums[j], mask);
        }
        if (ptx::lane() >= kAcross) return;
        float* to = shared.scratch->sums + ptx::warp() * Config::kOuter + 8 * ptx::lane();
        ptx::store_vector(to, ptx::Vector<float, 4>{sums[0], sums[1], sums[2], sums[3]});
        ptx::store_vector(to + 4, ptx::Vector<float, 4>{sums[4], sums[5], sums[6], sums[7]});
    }

    DEVICE void map(const SweepRows& rows) {
        map_z(rows);
        if constexpr (G == Gradient::d_values) {
#pragma unroll 1
            for (int side = 0; side < 2 && p.map != kIdentity; ++side) {
                Tile tile = side == 0 ? shared.x(turn.stage) : shared.y(turn.stage);
                each_vector<Config::kInner>(tile, [&](int, int column, Element* at) {
                    float x[8];
                    widen(at, x);
                    map_features(x, p.features - column);
                    narrow(at, x);
                });
            }
        }
        // Values of rows without a key become zeros, whatever they were.
        if (G == Gradient::d_queries && !rows.is_whole) {
            each_vector<Config::kInner>(shared.y(turn.stage), [&](int r, int, Element* at) {
                if (!rows.present[r]) ptx::store_vector(at, ptx::Vector<Element, 8>{});
            });
        }
        ptx::fence_proxy_async();
        barrier_of_all();
        add_features(rows);
    }

    // z or r after the chunk.
    DEVICE void add_features(const SweepRows& rows) {
        int f = ptx::thread();
        if (!has_norm() || f >= Config::kOuter) return;
        float sum = (p.decay == kNoDecay ? 1.0f : rows.decay) * shared.scratch->z[before][f];
        for (int warp = 0; warp < 4 * Config::kGroups; ++warp) sum += shared.scratch->sums[warp * Config::kOuter + f];
        shared.scratch->z[before ^ 1][f] = sum;
    }

    // Adds zᵀ y to the state, beside the threads.
    DEVICE void add_to_state(const SweepRows& rows) {
        float left = p.decay == kNoDecay ? 1.0f : rows.decay;
        if constexpr (is_backward<G>) left *= rows.unit / unit, unit = rows.unit;
        if (left != 1.0f) state.each([&](int, int, float& x) { x *= left; });
        const Element* added = params.has_term ? shared.term().data : shared.z(turn.stage).data;
        tile::AlongRows<Element, kChunk> z(added, 64 * own), y(shared.y(turn.stage).data);
        tile::multiply_beside<kChunk>(state, z, y, true);
    }
};

// The block's last warp, and its warpgroups, whose number of registers is theirs from here on.
template <class Config, class Copy, class Run>
DEVICE void divide_block(Copy copy, Run run) {
    auto shared = SweepShared<Config>::of_block();
    shared.initialise();
    if (ptx::warpgroup() == Config::kGroups) {
        if constexpr (Config::kGroups == 2) ptx::setmaxnreg_dec<56>();
        if (ptx::warp() == 4 * Config::kGroups) copy(shared);
    } else {
        if constexpr (Config::kGroups == 2) ptx::setmaxnreg_inc<224>();
        run(shared);
    }
}

}  // namespace attn::linear
