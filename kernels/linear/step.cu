// One token of the causal scan: each number of the state is read, moved on, multiplied with the query's and stored.
//
//   S ← e^g S + φ(k)ᵀ v    z ← e^g z + φ(k)    o = finish(φ(q) S)
//
// Block: a state head, for a tile of value columns and all output heads that read it, one after the other. A thread has a
// vector of columns in every n-th row of S, and asks for several rows at once.
//
//     shared memory      numbers                  written by, and read until
//     φ(k), φ(q), z      D′ each, padded          one warp each, all for FAVOR+ and z; the head's last row
//     k, q               D each, padded           one warp each; the projection, for FAVOR+
//     sums               a vector for each thread all; a warp finishes the row
//     decay              1                        the warp of the key; the end
#include "finish.cuh"
#include "state.cuh"

namespace attn::linear {

constexpr int kStepThreads = 256;
// Rows of S whose vectors a thread asks for at once.
constexpr int kAtOnce = 8;

template <class Element>
struct Step {
    using Real = typename Arithmetic<Element>::Real;
    static constexpr int kVector = 16 / sizeof(Real);
    using Vector = ptx::Vector<Real, kVector>;

    const LinearParams& p;
    Tiles<InShared<Element>> tiles;
    bool is_present;
    // src/gpu/linear/mod.rs adds up the same.
    Real *key, *query, *z, *x_key, *x_query, *sums, *decay;

    DEVICE explicit Step(const LinearParams& params) : p(params), tiles(params), is_present(tiles.keeps(0)) {
        key = ptx::shared_memory<Real>(), query = key + p.features_padded, z = query + p.features_padded;
        x_key = z + p.features_padded, x_query = x_key + p.width_padded;
        sums = x_query + p.width_padded, decay = sums + kVector * kStepThreads;
    }

    // x where its features are computed, by a warp.
    DEVICE void load(Real* phi, Real* x, const Rows<const Element>& from, bool is_there) const {
        Real* to = &x_tile(p, WideTile<Real>{phi, 0}, WideTile<Real>{x, 0}).at(0, 0);
        each_column(p.width, [&](int c) { to[c] = is_there ? tile::widen<Real>(from.data[c]) : Real(0); });
    }

    // ωx̃ of the query and, before the first, of the key, by all warps.
    DEVICE void project(bool is_first) const {
        Real factor = Real(1) / ptx::sqrt(ptx::sqrt(Real(p.width)));
        auto omega = static_cast<const Real*>(p.omega);
        for (int d = ptx::warp(); d < p.directions_count; d += warps()) {
            const Real* direction = omega + d * p.omega_stride;
            Real of_key = Real(0), of_query = Real(0);
            each_column(p.width, [&](int c) { of_key += direction[c] * x_key[c], of_query += direction[c] * x_query[c]; });
            of_key = warp_sum(of_key), of_query = warp_sum(of_query);
            if (ptx::lane() != 0) continue;
            if (is_first) key[d] = of_key * factor;
            query[d] = of_query * factor;
        }
    }

    // What the exponents of the key are relative to, of which the largest is given. A key that raises the stabiliser lets
    // the sums before it shrink by e^{log}.
    DEVICE Real raise_stabilizer(Real largest, double& log) const {
        const Real* state = tiles.place.template given<Real>(p.state_stabilizer, p.state_stabilizer_strides);
        Real half = half_square(p, WideTile<Real>{x_key, 0}, 0), before = state ? *state : negative_infinity<Real>();
        Real now = is_present ? ptx::max(before, largest - half) : before;
        if (before > negative_infinity<Real>()) log += double(before - now);
        bool is_first = ptx::lane() == 0 && tiles.place.value_tile == 0;
        if (p.final_stabilizer && is_first) static_cast<Real*>(p.final_stabilizer)[tiles.place.state_head(p)] = now;
        return now + half;
    }

    // φ of key or query and, of the key, what is left of the sums before it, by a warp.
    DEVICE void map(bool is_key) {
        Real* phi = is_key ? key : query;
        bool is_kept = is_present || !is_key;
        double log = is_key ? tiles.log_decay(0) : 0.0;
        if (is_stabilized(p)) {
            Real shift = largest_exponent(p, phi);
            if (is_key) shift = raise_stabilizer(shift, log);
            exponential_row(p, phi, shift, is_kept);
        } else {
            map_row(p, phi, is_kept);
        }
        if (is_key && ptx::lane() == 0) *decay = ptx::exp(Real(log));
    }

    // Features of a reader's query and, before the first, of the key.
    DEVICE void prepare(int64_t reader) {
        bool is_key = ptx::warp() == 0, is_mine = ptx::warp() == 1 || (is_key && reader == 0);
        if (is_mine) {
            auto from = is_key ? tiles.key_rows() : tiles.query_rows(reader);
            load(is_key ? key : query, is_key ? x_key : x_query, from, is_present || !is_key);
        }
        ptx::barrier_sync();
        if (is_favor(p)) {
            project(reader == 0);
            ptx::barrier_sync();
        }
        if (is_mine) map(is_key);
        ptx::barrier_sync();
    }

    DEVICE void move_z() const {
        const Real* from = tiles.place.template given<Real>(p.state_z, p.state_z_strides);
        bool stores = p.final_z && tiles.place.value_tile == 0;
        Real* to = static_cast<Real*>(p.final_z) + tiles.place.state_head(p) * p.features;
        for (int f = ptx::thread(); f < p.features; f += ptx::threads()) {
            z[f] = (from ? *decay * from[f] : Real(0)) + key[f];
            if (stores) to[f] = z[f];
        }
    }

    // Columns of a vector that this block has.
    DEVICE int columns_from(int column) const { return ptx::min(tiles.place.columns(p) - column, kVector); }

    // A vector of which `count` numbers are there; one access where `is_whole`.
    template <class T>
    DEVICE static ptx::Vector<T, kVector> load_some(const T* from, int count, bool is_whole) {
        if (is_whole) return ptx::load_vector<T, kVector>(from);
        ptx::Vector<T, kVector> x{};
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (i < count) x.value[i] = from[i];
        }
        return x;
    }

    DEVICE static void store_some(Real* to, const Vector& x, int count, bool is_whole) {
        if (is_whole) return ptx::store_vector(to, x);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            if (i < count) to[i] = x.value[i];
        }
    }

    // φ(q) S of this thread's vectors, from a row and column of the block on; they are moved on and, if asked for, stored.
    DEVICE Vector move_vectors(int first, int step, int column, bool stores) const {
        int count = columns_from(column), at = tiles.place.first_column(p) + column;
        int64_t row = p.state_s_strides.row;
        const Real* from = tiles.place.template given<Real>(p.state_s, p.state_s_strides);
        Real* to = static_cast<Real*>(p.final_s) + (tiles.place.state_head(p) * p.features + first) * p.value_width + at;
        auto whole = [&](const Real* data, int64_t row) {
            return count == kVector && reinterpret_cast<uint64_t>(data) % 16 == 0 && row % kVector == 0;
        };
        if (from) from += first * row + at;
        bool is_from_whole = whole(from, row), is_to_whole = whole(to, p.value_width);
        auto values = static_cast<const Element*>(p.v) + tiles.place.batch * p.v_strides.batch +
                      tiles.value_head() * p.v_strides.head + at;
        auto given_value = load_some(values, is_present ? count : 0, false);
        Vector value, sum{};
#pragma unroll
        for (int i = 0; i < kVector; ++i) value.value[i] = tile::widen<Real>(given_value.value[i]);
        Real left = *decay;
#pragma unroll 1
        for (int f = first; f < p.features; f += kAtOnce * step) {
            // All of them before the first is stored, behind which the compiler moves no load.
            Vector s[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                bool is_there = from && f + i * step < p.features;
                s[i] = load_some(from + int64_t(i) * step * row, is_there ? count : 0, is_there && is_from_whole);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (f + i * step >= p.features) break;
                Real k = key[f + i * step], q = query[f + i * step];
#pragma unroll
                for (int c = 0; c < kVector; ++c) {
                    s[i].value[c] = left * s[i].value[c] + k * value.value[c];
                    sum.value[c] += q * s[i].value[c];
                }
                if (stores) store_some(to + int64_t(i) * step * p.value_width, s[i], count, is_to_whole);
            }
            if (from) from += kAtOnce * step * row;
            to += int64_t(kAtOnce) * step * p.value_width;
        }
        return sum;
    }

    // The output of a reader; the first one's stores the state.
    DEVICE void read(int64_t reader) {
        int across = p.value_tile / kVector, parts = kStepThreads / across;
        int column = ptx::thread() % across * kVector, part = ptx::thread() / across;
        auto sum = move_vectors(part, parts, column, p.final_s && reader == 0);
        ptx::store_vector(sums + part * p.value_tile + column, sum);
        ptx::barrier_sync();
        if (ptx::warp() != 0) return;
        auto norm = [&] { return row_sum<Real>(p.features, [&](int f) { return query[f] * z[f]; }); };
        auto total = [&](int c) {
            Real total = Real(0);
            for (int i = 0; i < parts; ++i) total += sums[i * p.value_tile + c];
            return total;
        };
        finish_row<Element>(p, tiles.place, tiles.reader_head(reader), 0, 0, norm, total);
    }

    DEVICE void run() {
        for (int64_t reader = 0; reader < tiles.readers(); ++reader) {
            prepare(reader);
            if (reader == 0) move_z();
            read(reader);
            ptx::barrier_sync();
        }
    }
};

template <class Element>
DEVICE void step(const LinearParams& p) {
    Step<Element>(p).run();
}

ATTN_KERNEL(linear_step_f32, step<float>, LinearParams, kStepThreads)
ATTN_KERNEL(linear_step_f64, step<double>, LinearParams, kStepThreads)
ATTN_KERNEL(linear_step_f16, step<ptx::f16>, LinearParams, kStepThreads)
ATTN_KERNEL(linear_step_bf16, step<ptx::bf16>, LinearParams, kStepThreads)

}  // namespace attn::linear
