// Sums over keys, S = Σ φ(k)ᵀv and z = Σ φ(k), or over queries, R = Σ φ(q)ᵀdT and r = Σ φ(q) dn.
#pragma once

#include "tiles.cuh"

namespace attn::linear {

template <class Memory>
struct State {
    using Element = typename Memory::Element;
    using Real = typename Memory::Real;

    const LinearParams& p;
    // D′ × this block's value columns, both in whole blocks, filled up with zeros.
    WideTile<Real> s;
    Real* z;

    DEVICE explicit State(const LinearParams& params)
        : p(params), s(tile_piece<Memory>(params, kPieceS, params.values_row)), z(piece<Memory>(params, kPieceZ)) {}

    // S(f, c) and z(f) from functions. A barrier must follow.
    template <class S, class Z>
    DEVICE void fill(S take_s, Z take_z) {
        int columns = ptx::min(p.value_width, p.value_tile);
        each_element(p.features_padded, p.value_tile, [&](int f, int c) {
            s.at(f, c) = f < p.features && c < columns ? take_s(f, c) : Real(0);
        });
        for (int f = ptx::thread(); f < p.features_padded; f += ptx::threads()) {
            z[f] = f < p.features ? take_z(f) : Real(0);
        }
    }

    DEVICE void clear() {
        fill([](int, int) { return Real(0); }, [](int) { return Real(0); });
    }

    // Sums of a slot of the segments' workspaces.
    DEVICE void load_slot(const void* all_s, const void* all_z, int64_t slot, const Place& place) {
        auto from_s = static_cast<const Real*>(all_s) + slot * p.features * p.value_width + place.first_column(p);
        auto from_z = static_cast<const Real*>(all_z) + slot * p.features;
        int columns = place.columns(p);
        fill([&](int f, int c) { return c < columns ? from_s[int64_t(f) * p.value_width + c] : Real(0); },
             [&](int f) { return from_z[f]; });
    }

    // Writes S at rows of `value_width`, and z by the first of the value tiles.
    DEVICE void store(Real* to_s, Real* to_z, const Place& place) const {
        int columns = place.columns(p);
        each_element(p.features, columns, [&](int f, int c) {
            to_s[int64_t(f) * p.value_width + place.first_column(p) + c] = s.at(f, c);
        });
        if (place.value_tile != 0) return;
        for (int f = ptx::thread(); f < p.features; f += ptx::threads()) to_z[f] = z[f];
    }

    DEVICE void store_slot(void* all_s, void* all_z, int64_t slot, const Place& place) const {
        store(static_cast<Real*>(all_s) + slot * p.features * p.value_width,
              static_cast<Real*>(all_z) + slot * p.features, place);
    }

    // S ← decay S + φᵀ values and z ← decay z + φᵀ weights (1 where null). Between barriers.
    template <class Math>
    DEVICE void absorb(const WideTile<Real>& phi, const WideTile<Real>& values, const Real* weights, Real decay) {
        constexpr int kRowBlocks = sizeof(Real) == sizeof(double) ? 1 : 2;
        product<Math, kRowBlocks, Memory::kBlocks>(
            p.features_padded, p.value_tile, kTile, left_transposed<Math>(phi), right_rows<Math>(values),
            [&](int f, int c) { return decay * s.at(f, c); }, [&](int f, int c, Real x) { s.at(f, c) = x; });
        for (int f = ptx::thread(); f < p.features_padded; f += ptx::threads()) {
            Real sum = decay * z[f];
            for (int r = 0; r < kTile; ++r) sum += weights ? phi.at(r, f) * weights[r] : phi.at(r, f);
            z[f] = sum;
        }
    }
};

// S, z and the stabiliser of the keys before the block's segment, or all of them.
template <class Memory>
struct KeyState : State<Memory> {
    using typename State<Memory>::Real;
    using State<Memory>::p;
    using State<Memory>::State;

    // The state handed in, or empty sums. A barrier must follow.
    DEVICE void initial(const Tiles<Memory>& tiles) {
        if (!p.state_s) return empty(tiles);
        const Place& place = tiles.place;
        const Real* given_s = place.given<Real>(p.state_s, p.state_s_strides) + place.first_column(p);
        const Real* given_z = place.given<Real>(p.state_z, p.state_z_strides);
        const Real* stabilizer = place.given<Real>(p.state_stabilizer, p.state_stabilizer_strides);
        int columns = place.columns(p);
        this->fill([&](int f, int c) { return c < columns ? given_s[f * p.state_s_strides.row + c] : Real(0); },
                   [&](int f) { return given_z[f]; });
        tiles.set_stabilizer(stabilizer ? *stabilizer : negative_infinity<Real>());
    }

    DEVICE void empty(const Tiles<Memory>& tiles) {
        this->clear();
        tiles.set_stabilizer(negative_infinity<Real>());
    }

    // What enters the block's segment; a full scan reads the sums of all keys.
    DEVICE void enter(const Tiles<Memory>& tiles) {
        if (p.segments == 1) {
            initial(tiles);
            return ptx::barrier_sync();
        }
        int64_t slot = tiles.place.slot(p, is_full(p) ? p.segments : tiles.place.segment);
        this->load_slot(p.segment_s, p.segment_z, slot, tiles.place);
        tiles.set_stabilizer(static_cast<const Real*>(p.entering_stabilizer)[slot]);
        ptx::barrier_sync();
    }

    // Adds the loaded keys, whose features are used up.
    DEVICE void absorb_keys(const Tiles<Memory>& tiles) {
        bool has_decay = decays(p);
        if (has_decay) {
            tiles.scale_features(tiles.key_phi, tiles.rows->to_end);
            ptx::barrier_sync();
        }
        using Math = typename Arithmetic<typename Memory::Element>::SumsMath;
        const Real* ones = nullptr;
        this->template absorb<Math>(tiles.key_phi, tiles.values, ones, has_decay ? tiles.rows->decay : Real(1));
        ptx::barrier_sync();
    }

    // The state after the last key.
    DEVICE void store_final(const Tiles<Memory>& tiles) const {
        if (!p.final_s) return;
        int64_t head = tiles.place.state_head(p);
        this->store(static_cast<Real*>(p.final_s) + head * p.features * p.value_width,
                    static_cast<Real*>(p.final_z) + head * p.features, tiles.place);
        bool is_first = tiles.place.value_tile == 0 && ptx::thread() == 0;
        if (p.final_stabilizer && is_first) static_cast<Real*>(p.final_stabilizer)[head] = tiles.rows->stabilizer;
    }
};

// Given log-decay summed over the keys of a segment, by a warp.
template <class Memory>
DEVICE double segment_log_decay(const Tiles<Memory>& tiles) {
    const LinearParams& p = tiles.p;
    Range segment = tiles.place.positions(p);
    int64_t end = ptx::min(segment.end - p.first_key, p.keys);
    double sum = 0.0;
    for (int64_t key = ptx::max(segment.start - p.first_key, int64_t(0)) + ptx::lane(); key < end; key += 32) {
        sum += tiles.log_decay(key);
    }
    return warp_sum(sum);
}

}  // namespace attn::linear
