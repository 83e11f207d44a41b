// Outputs of scans in which no query reads keys of its own chunk, on warpgroups: chunks of 64 positions, S in registers.
//
//     o_i = finish(φ(q_i) S)    S of all keys (full), or of the chunks before that of i (exclusive; no map)
//
// Block, warps and memory as in outputs.sm90.cu. For a full scan, S is that of other kernels, and only queries are copied.
#include "reader.sm90.cuh"

namespace attn::linear {

// The scale of sums that are read at a position of a batch entry.
template <class Values, class RowAt>
DEVICE Values scale_of_rows(const LinearParams& p, int64_t batch, float unit, RowAt position) {
    Values scale = Values::filled(unit);
    if (p.finish == kChunkNorm) scale.each([&](int row, float& x) { x *= chunk_norm<float>(p, batch, position(row)); });
    return scale;
}

template <class Config>
struct FullReads : ReaderOfWarpgroup<Config> {
    using Base = ReaderOfWarpgroup<Config>;
    using typename Base::Values;
    using Base::Base, Base::out, Base::p, Base::shared, Base::state_scale, Base::tiles, Base::turn;
    using Base::barrier_of_all, Base::chunk_row;

    DEVICE void step(Range chunk) {
        // Scratch of the chunk before is free.
        barrier_of_all();
        shared.pipeline.wait(turn);
        this->map_queries(shared.queries(turn.stage));
        ptx::fence_proxy_async();
        barrier_of_all();
        this->read_state();
        Values weights = Values::filled(0.0f);
        if (p.finish == kNormalize) weights.each([&](int row, float& x) { x = shared.scratch->norm[chunk_row(row)]; });
        tile::wait_products<0>(out);
        shared.pipeline.release(turn);
        auto position = [&](int row) { return chunk.start + chunk_row(row); };
        this->finish(chunk, scale_of_rows<Values>(p, tiles.place.batch, state_scale, position),
                     weights);
        turn.advance();
    }

    DEVICE void run() {
        this->walk([&](Range chunk) { step(chunk); });
    }
};

template <class Config>
struct ExclusiveReads : ReaderOfWarpgroup<Config> {
    using Base = ReaderOfWarpgroup<Config>;
    using typename Base::Values;
    using Base::Base, Base::out, Base::p, Base::shared, Base::state_scale, Base::tiles, Base::turn;
    using Base::barrier_of_all, Base::chunk_row;

    DEVICE void step(Range chunk) {
        const ChunkRows& rows = shared.rows[turn.stage];
        // Scratch of the chunk before is free.
        barrier_of_all();
        shared.pipeline.wait(turn);
        this->map_keys(shared.keys(turn.stage), rows);
        if (!rows.is_whole) this->clear_values(shared.values(turn.stage), rows);
        ptx::fence_proxy_async();
        barrier_of_all();
        this->add_features(rows);
        this->read_state();
        this->add_keys();
        tile::wait_products<0>(out);
        shared.pipeline.release(turn);
        auto position = [&](int row) { return chunk.start + chunk_row(row); };
        this->finish(chunk, scale_of_rows<Values>(p, tiles.place.batch, state_scale, position),
                     Values::filled(0.0f));
        if (chunk.end % p.chunk == 0) this->publish_state();
        turn.advance();
    }

    DEVICE void run() {
        this->walk([&](Range chunk) { step(chunk); });
    }
};

template <class Config>
DEVICE void full_reads(const LinearMappedParams& params) {
    run_block<Config, FullReads<Config>>(params);
}

template <class Config>
DEVICE void exclusive_reads(const LinearMappedParams& params) {
    run_block<Config, ExclusiveReads<Config>>(params);
}

using ptx::bf16;
using ptx::f16;

template <class E, int Width, int Columns>
using Full = ChunkConfig<E, Width, Columns, 0>;
template <class E, int Width, int Columns>
using Exclusive = ChunkConfig<E, Width, Columns, 2>;

}  // namespace attn::linear

using namespace attn::linear;

ATTN_KERNEL(linear_full_sm90_bf16_64_64, full_reads<Full<bf16, 64, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_full_sm90_bf16_64_128, full_reads<Full<bf16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_full_sm90_bf16_128_64, full_reads<Full<bf16, 128, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_full_sm90_bf16_128_128, full_reads<Full<bf16, 128, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_full_sm90_bf16_256_64, full_reads<Full<bf16, 256, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_full_sm90_f16_64_64, full_reads<Full<f16, 64, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_full_sm90_f16_64_128, full_reads<Full<f16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_full_sm90_f16_128_64, full_reads<Full<f16, 128, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_full_sm90_f16_128_128, full_reads<Full<f16, 128, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_full_sm90_f16_256_64, full_reads<Full<f16, 256, 64>>, LinearMappedParams, 160)
ATTN_KERNEL(linear_exclusive_sm90_bf16_64_128, exclusive_reads<Exclusive<bf16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_exclusive_sm90_bf16_128_128, exclusive_reads<Exclusive<bf16, 128, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_exclusive_sm90_f16_64_128, exclusive_reads<Exclusive<f16, 64, 128>>, LinearMappedParams, 384)
ATTN_KERNEL(linear_exclusive_sm90_f16_128_128, exclusive_reads<Exclusive<f16, 128, 128>>, LinearMappedParams, 384)
