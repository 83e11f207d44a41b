// Outputs of full scans with FAVOR+ features, on warpgroups: S is that of all keys, from other kernels.
//
//     o_i = (φ(q_i) S) / (φ(q_i)·z + ε)
//
// Block, warps and memory as in favor_outputs.sm90.cu, without keys and values. The next chunk's queries are projected beside
// the end of one.
#include "favor_reader.sm90.cuh"

namespace attn::linear {

template <class Config>
struct FavorFull : FavorReader<Config> {
    using Base = FavorReader<Config>;
    using typename Base::Element;
    using typename Base::Projections;
    using typename Base::Sums;
    using typename Base::Values;
    using Base::Base, Base::kScales, Base::own, Base::p, Base::shared, Base::tiles, Base::turn;

    // Projections of this chunk's queries, which are under way, become those of the next.
    DEVICE void step(Range chunk, bool is_last, Projections& queries) {
        tile::wait_products<0>(queries);
        this->tell_largest(queries, 1);
        this->barrier_of_all();
        Values norm = this->map_queries(queries);
        tile::PackedRows<Element, Config::kOwn> left;
        left.set(queries);
        Sums out;
        tile::AlongRows<Element, Config::kOwn> sums(shared.state_of(own).data);
        tile::multiply_beside(out, left, sums, false);
        tile::wait_products<0>(out);
        if constexpr (kScales) {
            float scale = shared.favor->state_scale[own];
            out.each([scale](int, int, float& x) { x *= scale; });
        }
        auto next = turn;
        next.advance();
        if (!is_last) shared.pipeline.wait(next);
        this->project(queries, shared.queries(next.stage));
        this->end_rows(chunk, out, norm);
        turn.advance();
    }

    DEVICE void run() {
        this->load_omega();
        this->enter();
        Range segment = tiles.place.positions(p);
        Projections queries;
        shared.pipeline.wait(turn);
        this->project(queries, shared.queries(turn.stage));
        each_chunk(segment, [&](Range chunk) { step(chunk, chunk.end == segment.end, queries); });
        tile::wait_products<0>(queries);
        this->hand_out_state(segment);
    }
};

template <class Config>
DEVICE void favor_full(const LinearMappedParams& params) {
    run_block<Config, FavorFull<Config>>(params);
}

using ptx::bf16;
using ptx::f16;

template <class E, int Width, int Features>
using Of = FavorConfig<E, Width, Features, 0>;

}  // namespace attn::linear

using namespace attn::linear;

ATTN_KERNEL(linear_favor_full_sm90_bf16_64_128, favor_full<Of<bf16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_favor_full_sm90_bf16_64_256, favor_full<Of<bf16, 64, 256>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_favor_full_sm90_f16_64_128, favor_full<Of<f16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_favor_full_sm90_f16_64_256, favor_full<Of<f16, 64, 256>>, LinearMappedParams, 384)
