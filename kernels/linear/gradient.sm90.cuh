// A warpgroup of a sweep of the backward pass: 64 columns of the output, and 64 rows of the state in registers.
#pragma once

#include "sweep_state.sm90.cuh"

namespace attn::linear {

// φ as map_vector and φ′, in code of a size that bears to be repeated for each number.
DEVICE void map_with_slope(int map, float x, float& phi, float& slope) {
    float positive = ptx::max(x, 0.0f);
    phi = x, slope = 1.0f;
    if (map == kRelu) phi = positive, slope = x > 0.0f ? 1.0f : 0.0f;
    if (map == kReluSquared) phi = positive * positive, slope = 2.0f * positive;
    if (map != kEluPlusOne && map != kExp && map != kSilu) return;
    if (map == kSilu) {
        float power = ptx::exp2(-x * float(kLog2E));
        float sigmoid = ptx::reciprocal(1.0f + power);
        phi = x * sigmoid, slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
    } else {
        float power = ptx::exp2(x * float(kLog2E));
        bool is_linear = map == kEluPlusOne && x >= 0.0f;
        phi = is_linear ? x + 1.0f : power, slope = is_linear ? 1.0f : power;
    }
}

template <class Config, Gradient G>
struct SweepOfWarpgroup : StateOfSweep<Config, G> {
    using Base = StateOfSweep<Config, G>;
    using typename Base::Element;
    using typename Base::Tile;
    using Values = tile::RowValues<float, 1>;
    using Base::before, Base::first_column, Base::own, Base::p, Base::params, Base::shared, Base::state;
    using Base::barrier_of_all, Base::chunk_row, Base::has_norm, Base::is_exact, Base::kIsOfFeatures, Base::kScales;
    using Base::state_scale, Base::tiles, Base::turn;
    // Whether there are registers for scores and x stateᵀ at once.
    static constexpr bool kIsNarrow = Config::kInner <= 128;

    tile::WarpgroupSums<64> scores, out;
    tile::PackedRows<Element, 64> weights;
    // ⟨φ, dφ⟩ per row, of this warpgroup's columns; the weights of rows with themselves, which have no part in it.
    Values along, own_weight;

    using Base::Base;

    // Whether rows with themselves are kept apart.
    DEVICE bool has_log() const { return kIsOfFeatures && p.d_log; }

    // Products of rows of x and y become weights, and what these are scaled by.
    DEVICE void weigh(const SweepRows& rows, Values& scale) {
        auto each_pair = [&](auto f) {
            scores.each([&](int row, int column, float& x) {
                int r = chunk_row(row), query = is_backward<G> ? column : r, key = is_backward<G> ? r : column;
                f(query, key, x);
            });
        };
        auto weight = [&](int query, float x) { return x * rows.factor[query] + rows.d_norm[query]; };
        if (p.decay == kNoDecay) {
            each_pair([&](int query, int key, float& x) { x = key <= query ? weight(query, x) : 0.0f; });
        } else {
            if (has_log()) {
                own_weight = Values::filled(0.0f);
                scores.each_indexed([&](int m, int i, int row, int column, float& x) {
                    if (column == chunk_row(row)) own_weight.value[m][i / 2] = weight(column, x);
                });
            }
            // Without branches: what later rows come to is thrown away.
            int nearest = has_log();
            each_pair([&](int query, int key, float& x) {
                float left = weight(query, x) * rows.decay_between(query, key);
                x = key + nearest <= query && key >= rows.cut[query] ? left : 0.0f;
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

    DEVICE void read_rest() {
        tile::AlongColumns<Element, kChunk> x(shared.x(turn.stage).data);
        tile::AlongColumns<Element, 64> rows(shared.rest_of(own).data);
        tile::multiply_beside<Config::kInner>(out, x, rows, true);
        tile::wait_products<0>(out);
    }

    // ⟨φ, dφ⟩ of what was read of the state, less what `unmap` adds for it. Of the features it takes what the state of the
    // sweep the other way is made of: then sums over all queries and over all keys cancel but for roundings of f32.
    DEVICE void begin_log(const SweepRows& rows) {
        auto x = own_rows();
        auto of_row = [&](const float (&all)[kChunk]) {
            Values values = Values::filled(0.0f);
            values.each([&](int row, float& x) { x = all[chunk_row(row)]; });
            return values;
        };
        Values back = of_row(rows.back), left = of_row(rows.left), extra = of_row(rows.extra);
        float unit = is_backward<G> ? 1.0f : 1.0f / rows.unit;
        const float* z = shared.scratch->z[before] + 64 * own;
        out.with_indexed(x, [&](int m, int i, int, int column, float& read, float& x) {
            float phi, slope;
            map_with_slope(p.map, x, phi, slope);
            float rounded = ptx::to_float(ptx::from_float<Element>(phi));
            float term = unit * ptx::to_float(ptx::from_float<Element>(phi * back.at(m, i)));
            float d = (term - rounded * left.at(m, i)) * state_scale * read;
            if (has_norm()) d += (phi - rounded) * extra.at(m, i) * z[column];
            along.value[m][i / 2] += d;
        });
    }

    // What was read of the state, and of z, at each row.
    DEVICE void decay_out(const SweepRows& rows, const Values& scale) {
        along = Values::filled(0.0f);
        if constexpr (kIsOfFeatures) {
            if (is_exact()) begin_log(rows);
        }
        Values left = scale, extra = scale;
        left.each([&](int row, float& x) { x *= state_scale * rows.left[chunk_row(row)]; });
        out.scale_rows(left);
        if (!has_norm()) return;
        extra.each([&](int row, float& x) { x *= rows.extra[chunk_row(row)]; });
        const float* z = shared.scratch->z[before] + 64 * own;
        out.each_indexed([&](int m, int i, int, int column, float& x) { x += extra.at(m, i) * z[column]; });
    }

    DEVICE void step(Range chunk) {
        const SweepRows& rows = shared.rows[turn.stage];
        shared.pipeline.wait(turn);
        this->map(rows);
        tile::AlongColumns<Element, kChunk> x(shared.x(turn.stage).data), y(shared.y(turn.stage).data);
        tile::multiply_beside<Config::kInner>(scores, x, y, false);
        if constexpr (kIsNarrow) read_state();
        tile::wait_products<kIsNarrow>(scores);
        Values scale = Values::filled(kScales ? 0.0f : 1.0f);
        weigh(rows, scale);
        if constexpr (!kIsNarrow) read_state();
        tile::wait_products<0>(out);
        if (is_exact()) read_rest();
        decay_out(rows, scale);
        tile::AlongRows<Element, kChunk> z(shared.z(turn.stage).data, 64 * own);
        tile::multiply_beside(out, weights, z, true);
        this->add_to_state(rows);
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
        this->publish_state();
    }

    // 64 columns of what the gradient is of, and then of the gradient itself.
    DEVICE Tile own_panel() const { return {shared.own(turn.stage).data + own * kChunk * 64, kChunk}; }

    DEVICE tile::WarpgroupSums<64> own_rows() const {
        tile::PackedRows<Element, 64> packed;
        tile::load(own_panel(), tile::first_row_of_warp(), packed);
        return packed.widened();
    }

    // From dφ of the rows to their own gradient, and the rest of ⟨φ, dφ⟩.
    DEVICE void unmap(Range chunk, const SweepRows& rows) {
        auto slopes = own_rows();
        bool is_logged = has_log();
        out.with_indexed(slopes, [&](int m, int i, int, int, float& d, float& x) {
            float phi, slope;
            map_with_slope(p.map, x, phi, slope);
            if (is_logged) along.value[m][i / 2] += ptx::to_float(ptx::from_float<Element>(phi)) * d;
            x = slope;
        });
        if (is_logged) add_own_rows();
        out.with_indexed(slopes, [](int, int, int, int, float& d, float& slope) { d *= slope; });
        if (is_logged) store_log(chunk, rows);
    }

    // What rows with themselves add to the output.
    DEVICE void add_own_rows() {
        auto weights = own_weight.fold_lanes([](float a, float b) { return a + b; });
        tile::PackedRows<Element, 64> packed;
        tile::load(Tile{shared.z(turn.stage).data + own * kChunk * 64, kChunk}, tile::first_row_of_warp(), packed);
        auto z = packed.widened();
        out.with_indexed(z, [&](int m, int i, int, int, float& d, float& z) { d += weights.at(m, i) * z; });
    }

    // ⟨φ(q), dφ(q)⟩ − ⟨φ(k), dφ(k)⟩, the latter by the later kernel.
    DEVICE void store_log(Range chunk, const SweepRows& rows) {
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
        if constexpr (kIsOfFeatures) {
            if (params.has_own) unmap(chunk, rows);
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
        tile::store(own_panel(), row, packed);
        ptx::warp_sync();
        tile::copy_out(own_panel(), row, rows_of<Element>(), first_row, first_column());
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
        this->enter();
        each_chunk_of_sweep<is_backward<G>>(tiles.place.positions(p), [&](Range chunk) { step(chunk); });
    }
};

// What the warpgroups of a block do for its output from column `first` on.
template <Gradient G, class Config>
DEVICE void run_sweep(const LinearSweepParams& params, const SweepShared<Config>& shared, int first) {
    SweepOfWarpgroup<Config, G>(params, shared, first).run();
}

}  // namespace attn::linear
