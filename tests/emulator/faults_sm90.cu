// As faults.cu, for tensor copies, mbarriers and products of warpgroups.
#include "ptx/barrier.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/vector.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"

namespace attn::faults {

using namespace ptx;

struct Params {
    TensorMap map;        // of 64 × 256 elements, boxes of 64 × 64
    const float* input;
    float* output;  // 1 per thread of two blocks
};

enum Fault {
    none,
    no_barrier,
    no_full_wait,
    no_empty_wait,
    wrong_phase,
    more_bytes,
    fewer_bytes,
    no_bytes,
    early_release,
    more_arrivals,
    no_product_wait,
    no_fence,
    touched_sums,
    wrong_stride,
    own_descriptor,
    missing_warp,
    copy_at_exit,
    copy_outside,
    misaligned_copy,
    // Tiles are read by ordinary loads too, and released by one thread for all, or without waiting for the warp's others.
    read_tile,
    released_by_one,
    released_unsynced,
    // Tiles are written again, as they were; without the fence, and when they have been used.
    rewrite,
    rewrite_unfenced,
    rewrite_behind,
};

constexpr int kTiles = 4, kStages = 2, kTileBytes = 64 * 64 * 2;

struct Stages {
    char* tiles;
    Mbarrier *full, *empty;
};

template <Fault fault>
DEVICE void produce(const Params& params, const Stages& stages) {
    for (int i = 0; i < kTiles; ++i) {
        int stage = i % kStages, use = i / kStages;
        if (fault != no_empty_wait) mbarrier_try_wait_parity(stages.empty + stage, use % 2 ^ 1);
        int bytes = kTileBytes + (fault == more_bytes ? 16 : fault == fewer_bytes ? -16 : 0);
        if (fault == no_bytes) mbarrier_arrive(stages.full + stage);
        if (fault != no_bytes) mbarrier_arrive_expect_tx(stages.full + stage, bytes);
        char* to = stages.tiles + stage * kTileBytes;
        if (fault == copy_outside) to += 4 * kTileBytes;
        if (fault == misaligned_copy) to += 512;
        tensor_load(to, params.map, stages.full + stage, {0, 64 * i, 0, 0});
    }
    if (fault == copy_at_exit) {
        mbarrier_try_wait_parity(stages.empty, 0);
        tensor_load(stages.tiles, params.map, stages.full, {0, 0, 0, 0});
    }
}

DEVICE void rewrite_tile(char* tile) {
    for (int i = thread() % 128; i < kTileBytes / 16; i += 128) {
        auto* at = reinterpret_cast<uint32_t*>(tile) + 4 * i;
        store_vector(at, load_vector<uint32_t, 4>(at));
    }
}

constexpr bool reads_tiles(Fault fault) {
    return fault == read_tile || fault == released_by_one || fault == released_unsynced;
}

// By each warp when all of its threads have read the stage.
template <Fault fault>
DEVICE void release(const Stages& stages, int stage) {
    if (fault != released_unsynced && fault != released_by_one) warp_sync();
    if (thread() % (fault == released_by_one ? 128 : 32) == 0) mbarrier_arrive(stages.empty + stage);
}

template <Fault fault>
DEVICE void consume(const Params& params, const Stages& stages) {
    float d[32] = {}, sum = 0;
    for (int i = 0; i < kTiles; ++i) {
        int stage = i % kStages, use = i / kStages;
        if (fault != no_full_wait) {
            mbarrier_try_wait_parity(stages.full + stage, fault == wrong_phase ? use % 2 ^ 1 : use % 2);
        }
        if (fault == missing_warp && i == 2 && warp() == 3) return;
        char* tile = stages.tiles + stage * kTileBytes;
        if (fault == rewrite || fault == rewrite_unfenced) {
            rewrite_tile(tile);
            if (fault == rewrite) fence_proxy_async();
            barrier_sync(1, 128);
        }
        if (fault != no_fence || i == 0) wgmma_fence();
        for (int k = 0; k < 4; ++k) {
            int b = fault == own_descriptor && warp() == 2 ? 0 : 32 * k;
            wgmma_m64k16<f16, Major::inner, Major::inner>(
                d, matrix_descriptor(tile + 32 * k, 1024, 0),
                matrix_descriptor(tile + b, fault == wrong_stride ? 512 : 1024, 0), true);
        }
        wgmma_commit();
        if (fault == early_release) release<fault>(stages, stage);
        if (fault == touched_sums) d[0] += 1;
        if (fault != no_product_wait) wgmma_wait<0>();
        if (fault == rewrite_behind) {
            barrier_sync(1, 128);
            rewrite_tile(tile);
            barrier_sync(1, 128);
        }
        if (reads_tiles(fault)) sum += to_float(reinterpret_cast<const f16*>(tile)[128 * i + 8 * (thread() % 128)]);
        if (fault != early_release) release<fault>(stages, stage);
        if (fault == more_arrivals && thread() % 32 == 1) mbarrier_arrive(stages.empty + stage);
    }
    for (int i = 0; i < 32; ++i) sum += d[i];
    params.output[block_x() * 128 + thread() % 128] = sum;
}

// Sums of products of tiles with themselves: one warpgroup loads them, the other multiplies.
template <Fault fault>
DEVICE void pipeline(const Params& params) {
    char* shared = shared_memory<char>();
    Mbarrier* barriers = reinterpret_cast<Mbarrier*>(shared + kStages * kTileBytes);
    Stages stages{shared, barriers, barriers + kStages};
    if (thread() == 0) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(stages.full + i, 1);
            mbarrier_init(stages.empty + i, fault == released_by_one ? 1 : 4);
        }
        fence_mbarrier_init();
    }
    if (fault != no_barrier) barrier_sync();
    if (warpgroup() == 1) {
        setmaxnreg_dec<40>();
        if (elect()) produce<fault>(params, stages);
    } else {
        consume<fault>(params, stages);
    }
}

// Registers that nobody gave back.
DEVICE void taken_registers(const Params&) {
    if (warpgroup() > 0) setmaxnreg_inc<240>();
}

ATTN_KERNEL(sound_pipeline, pipeline<none>, Params, 160)
ATTN_KERNEL(sound_read_tile, pipeline<read_tile>, Params, 160)
ATTN_KERNEL(fault_released_by_one, pipeline<released_by_one>, Params, 160)
ATTN_KERNEL(fault_released_unsynced, pipeline<released_unsynced>, Params, 160)
ATTN_KERNEL(sound_rewrite, pipeline<rewrite>, Params, 160)
ATTN_KERNEL(fault_rewrite_unfenced, pipeline<rewrite_unfenced>, Params, 160)
ATTN_KERNEL(fault_rewrite_behind, pipeline<rewrite_behind>, Params, 160)
ATTN_KERNEL(fault_no_barrier, pipeline<no_barrier>, Params, 160)
ATTN_KERNEL(fault_no_full_wait, pipeline<no_full_wait>, Params, 160)
ATTN_KERNEL(fault_no_empty_wait, pipeline<no_empty_wait>, Params, 160)
ATTN_KERNEL(fault_wrong_phase, pipeline<wrong_phase>, Params, 160)
ATTN_KERNEL(fault_more_bytes, pipeline<more_bytes>, Params, 160)
ATTN_KERNEL(fault_fewer_bytes, pipeline<fewer_bytes>, Params, 160)
ATTN_KERNEL(fault_no_bytes, pipeline<no_bytes>, Params, 160)
ATTN_KERNEL(fault_early_release, pipeline<early_release>, Params, 160)
ATTN_KERNEL(fault_more_arrivals, pipeline<more_arrivals>, Params, 160)
ATTN_KERNEL(fault_no_product_wait, pipeline<no_product_wait>, Params, 160)
ATTN_KERNEL(fault_no_fence, pipeline<no_fence>, Params, 160)
ATTN_KERNEL(fault_touched_sums, pipeline<touched_sums>, Params, 160)
ATTN_KERNEL(fault_wrong_stride, pipeline<wrong_stride>, Params, 160)
ATTN_KERNEL(fault_own_descriptor, pipeline<own_descriptor>, Params, 160)
ATTN_KERNEL(fault_missing_warp, pipeline<missing_warp>, Params, 160)
ATTN_KERNEL(fault_copy_at_exit, pipeline<copy_at_exit>, Params, 160)
ATTN_KERNEL(fault_no_registers, taken_registers, Params, 384)
ATTN_KERNEL(fault_tensor_copy_outside, pipeline<copy_outside>, Params, 160)
ATTN_KERNEL(fault_misaligned_copy, pipeline<misaligned_copy>, Params, 160)

}  // namespace attn::faults
