// A warpgroup of a sweep of the backward pass: 64 columns of the output, and 64 rows of the state in registers.
#pragma once

#include "../ptx/barrier.cuh"
#include "../tile/packed.cuh"
#include "state.cuh"
#include "state.sm90.cuh"
#include "sweep.sm90.cuh"

namespace attn::linear {

// f(map) with the number of an elementwise map as a constant: one choice for all that f does.
template <int Map>
struct MapNumber {
    static constexpr int value = Map;
};

template <class F>
DEVICE void with_map(int map, F f) {
    switch (map) {
        case kEluPlusOne: return f(MapNumber<kEluPlusOne>{});
        case kRelu: return f(MapNumber<kRelu>{});
        case kReluSquared: return f(MapNumber<kReluSquared>{});
        case kSilu: return f(MapNumber<kSilu>{});
        case kExp: return f(MapNumber<kExp>{});
        default: return f(MapNumber<kIdentity>{});
    }
}

template <class Config, Gradient G>
struct SweepOfWarpgroup {
    using Element = typename Config::Element;
    using Shared = SweepShared<Config>;
    using Tile = typename Shared::Tile;
    using Values = tile::RowValues<float, 1>;
    static constexpr bool kIsOfFeatures = G != Gradient::d_values;
    // Whether numbers must be brought into the range of the elements.
    static constexpr bool kScales = !ptx::is_bf16<Element>;
    // Whether there are registers for scores and x stateᵀ at once.
    static constexpr bool kIsNarrow = Config::kInner <= 128;

    const LinearSweepParams& params;
    const Shared& shared;
    // First column of the block's output.
    int first;
    Tiles<Element> tiles;
    int own;
    const LinearParams& p;
    tile::Turn<kStages> turn;
    // Which of the two z is that before the chunk.
    int before = 0;
    // What the state is multiplied by, and 1 over that of the rounded one.
    float unit = 1.0f, state_scale = 1.0f;
    tile::WarpgroupSums<Config::kInner> state;
    tile::WarpgroupSums<64> scores, out;
    tile::PackedRows<Element, 64> weights;

    DEVICE SweepOfWarpgroup(const LinearSweepParams& params, const Shared& shared, int first)
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
            const auto &s = p.state_s_strides, &z = p.state_z_strides;
            from_s = static_cast<const float*>(p.state_s) + place.batch * s.batch + place.head * s.head;
            from_z = static_cast<const float*>(p.state_z) + place.batch * z.batch + place.head * z.head;
            stride = s.row;
        }
        state = tile::WarpgroupSums<Config::kInner>::zero();
        if (from_s) each_of_state([&](int feature, int value, float& x) { x = from_s[feature * stride + value]; });
        if (int f = ptx::thread(); f < Config::kOuter) {
            shared.scratch->z[before][f] = from_z && first + f < p.features ? from_z[first + f] : 0.0f;
        }
        publish_state();
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
            Tile panel{shared.state_of(own).data + i * 64 * 64, 64};
            tile::store(panel, tile::first_row_of_warp(), packed);
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
        auto vector = ptx::load_vector<Element, 8>(at);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = ptx::to_float(vector.value[j]);
    }

    DEVICE void narrow(Element* at, const float (&x)[8]) const {
        ptx::Vector<Element, 8> vector;
#pragma unroll
        for (int j = 0; j < 8; ++j) vector.value[j] = ptx::from_float<Element>(x[j]);
        ptx::store_vector(at, vector);
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
            int column = ptx::thread() % kAcross * 8 + j;
            if (ptx::lane() < kAcross) shared.scratch->sums[ptx::warp() * Config::kOuter + column] = sums[j];
        }
    }

    DEVICE void map(const SweepRows& rows) {
        map_z(rows);
        if constexpr (G == Gradient::d_values) {
            if (p.map != kIdentity) {
                auto in_place = [&](int, int column, Element* at) {
                    float x[8];
                    widen(at, x);
                    map_features(x, p.features - column);
                    narrow(at, x);
                };
                each_vector<Config::kInner>(shared.x(turn.stage), in_place);
                each_vector<Config::kInner>(shared.y(turn.stage), in_place);
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

    // Products of rows of x and y become weights, and what these are scaled by.
    DEVICE void weigh(const SweepRows& rows, Values& scale) {
        auto each_pair = [&](auto f) {
            scores.each([&](int row, int column, float& x) {
                int r = chunk_row(row), query = is_backward<G> ? column : r, key = is_backward<G> ? r : column;
                f(query, key, x);
            });
        };
        each_pair([&](int query, int key, float& x) {
            x = key <= query ? x * rows.factor[query] + rows.d_norm[query] : 0.0f;
        });
        if (p.decay != kNoDecay) {
            each_pair([&](int query, int key, float& x) {
                if (key <= query) x *= rows.decay_between(query, key);
            });
        }
        if constexpr (kScales) {
            scale = scores.fold_rows(scale, [](float a, float b) { return ptx::max(ptx::abs(a), ptx::abs(b)); });
            scale.each([](int, float& x) { x = fitting_scale(x); });
            scores.scale_rows(scale);
        }
        weights.set(scores);
    }

    DEVICE void read_state() {
        tile::AlongColumns<Element, kChunk> x(shared.x(turn.stage).data);
        tile::AlongColumns<Element, 64> rows(shared.state_of(own).data);
        tile::multiply_beside<Config::kInner>(out, x, rows, false);
    }

    // What was read of the state, and of z, at each row.
    DEVICE void decay_out(const SweepRows& rows, const Values& scale) {
        Values left = scale, extra = scale;
        left.each([&](int row, float& x) { x *= state_scale * rows.left[chunk_row(row)]; });
        out.scale_rows(left);
        if (!has_norm()) return;
        extra.each([&](int row, float& x) { x *= rows.extra[chunk_row(row)]; });
        const float* z = shared.scratch->z[before] + 64 * own;
        out.each_indexed([&](int m, int i, int, int column, float& x) { x += extra.at(m, i) * z[column]; });
    }

    // Adds zᵀ y to the state, beside the threads.
    DEVICE void add_to_state(const SweepRows& rows) {
        float left = (p.decay == kNoDecay ? 1.0f : rows.decay) * (rows.unit / unit);
        unit = rows.unit;
        if (left != 1.0f) state.each([&](int, int, float& x) { x *= left; });
        const Element* added = params.has_term ? shared.term().data : shared.z(turn.stage).data;
        tile::AlongRows<Element, kChunk> z(added, 64 * own), y(shared.y(turn.stage).data);
        tile::multiply_beside<kChunk>(state, z, y, true);
    }

    DEVICE void step(Range chunk) {
        const SweepRows& rows = shared.rows[turn.stage];
        shared.pipeline.wait(turn);
        map(rows);
        tile::AlongColumns<Element, kChunk> x(shared.x(turn.stage).data), y(shared.y(turn.stage).data);
        tile::multiply_beside<Config::kInner>(scores, x, y, false);
        if constexpr (kIsNarrow) read_state();
        tile::wait_products<kIsNarrow>(scores);
        Values scale = Values::filled(kScales ? 0.0f : 1.0f);
        weigh(rows, scale);
        if constexpr (!kIsNarrow) read_state();
        tile::wait_products<0>(out);
        decay_out(rows, scale);
        tile::AlongRows<Element, kChunk> z(shared.z(turn.stage).data, 64 * own);
        tile::multiply_beside(out, weights, z, true);
        add_to_state(rows);
        tile::wait_products<1>(out);
        if constexpr (kScales) {
            scale.each([](int, float& x) { x = 1.0f / x; });
            out.scale_rows(scale);
        }
        store(chunk, rows);
        tile::wait_products<0>(state);
        ptx::fence_proxy_async();
        // Whoever reads scratch, terms, the stage or the state has done so.
        barrier_of_all();
        shared.pipeline.release(turn);
        turn.advance();
        before ^= 1;
        publish_state();
    }

    // From dφ of the rows to their own gradient, and ⟨φ, dφ⟩.
    DEVICE void unmap(Range chunk, const SweepRows& rows, const Tile& panel) {
        tile::PackedRows<Element, 64> packed;
        tile::load(panel, tile::first_row_of_warp(), packed);
        auto x = packed.widened();
        Values along = Values::filled(0.0f);
        with_map(p.map, [&](auto map) {
            out.with_indexed(x, [&](int m, int i, int, int, float& d, float& x) {
                float phi = map_element(map.value, x);
                along.value[m][i / 2] += ptx::to_float(ptx::from_float<Element>(phi)) * d;
                d *= map_slope(map.value, x, phi);
            });
        });
        if (p.d_log) store_log(chunk, rows, along);
    }

    // ⟨φ(q), dφ(q)⟩ − ⟨φ(k), dφ(k)⟩, the latter by the later kernel.
    DEVICE void store_log(Range chunk, const SweepRows& rows, Values& along) {
        along = along.fold_lanes([](float a, float b) { return a + b; });
        auto& all = shared.scratch->along;
        along.each_once([&](int row, float x) { all[own][chunk_row(row)] = x; });
        barrier_of_all();
        int r = ptx::thread();
        if (r >= kChunk || !tiles.has_key(chunk, r)) return;
        double sum = all[0][r];
        if constexpr (Config::kGroups == 2) sum += all[1][r];
        double& d_log = static_cast<double*>(p.d_log)[tiles.place.state_head(p) * p.keys + tiles.key_at(chunk, r)];
        if constexpr (!is_backward<G>) d_log = sum;
        else if (rows.present[r]) d_log -= sum;
    }

    DEVICE void store(Range chunk, const SweepRows& rows) {
        Tile panel{shared.own(turn.stage).data + own * kChunk * 64, kChunk};
        if constexpr (kIsOfFeatures) {
            if (params.has_own) unmap(chunk, rows, panel);
        }
        if constexpr (is_backward<G>) {
            if (!rows.is_whole) {
                out.each([&](int row, int, float& x) {
                    if (!rows.present[chunk_row(row)]) x = 0.0f;
                });
            }
        }
        int row = tile::first_row_of_warp();
        int64_t first_row = (is_backward<G> ? tiles.key_at(chunk, 0) : tiles.query_at(chunk, 0)) + row;
        if (is_wide()) return tile::store(out, rows_of<float>(), first_row, first_column());
        tile::PackedRows<Element, 64> packed;
        packed.set(out);
        ptx::warp_sync();
        tile::store(panel, row, packed);
        ptx::warp_sync();
        tile::copy_out(panel, row, rows_of<Element>(), first_row, first_column());
    }

    // In the type of sums: parts of the gradient of what several heads share.
    DEVICE bool is_wide() const {
        return G == Gradient::d_queries ? p.is_d_q_wide : G == Gradient::d_keys ? p.is_d_k_wide : p.is_d_v_wide;
    }

    template <class T>
    DEVICE tile::Rows<T> rows_of() const {
        int64_t head, batch = tiles.place.batch, count = is_backward<G> ? p.keys : p.queries;
        int width = kIsOfFeatures ? p.width : p.value_width;
        void* to;
        if constexpr (G == Gradient::d_queries) {
            to = p.d_q, head = batch * p.query_heads + tiles.query_head(0);
        } else if constexpr (G == Gradient::d_keys) {
            to = p.d_k, head = batch * p.key_heads + tiles.key_head();
        } else {
            to = p.d_v, head = batch * p.value_heads + tiles.value_head();
        }
        if (is_wide()) head = tiles.place.state_head(p);
        return {static_cast<T*>(to) + head * count * width, width, count, width};
    }

    DEVICE void run() {
        enter();
        each_chunk_of_sweep<is_backward<G>>(tiles.place.positions(p), [&](Range chunk) { step(chunk); });
    }
};

// What the last warp of a block does, and what its warpgroups do, for the block's output from column `first` on.
template <class Config, Gradient G>
DEVICE void copy_for_sweep(const LinearSweepParams& params, const SweepShared<Config>& shared, int first) {
    SweepCopies<Config, G>{params, shared, first, Tiles<typename Config::Element>(params.problem), {}}.run();
}

template <class Config, Gradient G>
DEVICE void run_sweep(const LinearSweepParams& params, const SweepShared<Config>& shared, int first) {
    SweepOfWarpgroup<Config, G>(params, shared, first).run();
}

// The block's own warps and the others, whose number of registers is theirs from here on.
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
