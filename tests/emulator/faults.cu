// Kernels with a planted fault each, and their sound twins, for checks of the emulator.
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/shuffle.cuh"

namespace attn::faults {

using namespace ptx;

struct Params {
    const float* input;
    float* output;
    int64_t count;
};

// Measures: `count` products per warp.
DEVICE void products(const Params& params) {
    uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00}, b[2] = {0x3c003c00, 0x3c003c00};
    float d[4] = {};
    for (int64_t i = 0; i < params.count; ++i) mma_m16n8k16(f16{}, d, a, b);
    params.output[thread()] = d[0];
}

DEVICE void shuffles(const Params& params) {
    float sum = float(lane());
    for (int64_t i = 0; i < params.count; ++i) sum += shuffle_xor(sum, 1);
    params.output[thread()] = sum;
}

DEVICE void nothing(const Params& params) { params.output[thread()] = 1; }

}  // namespace attn::faults

ATTN_KERNEL(measure_products, attn::faults::products, attn::faults::Params, 128)
ATTN_KERNEL(measure_shuffles, attn::faults::shuffles, attn::faults::Params, 128)
ATTN_KERNEL(measure_nothing, attn::faults::nothing, attn::faults::Params, 128)
