//! Sums of many numbers of one sign, in which nothing cancels: what each addition loses in the same direction adds up.

use attn_kernels::gau::GauOptions;
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::problem::DType;
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::NormOptions;

use super::{Case, Extra, Operation};

const F32: &[DType] = &[DType::F32];
const HALVES: &[DType] = &[DType::F16, DType::BF16];

/// Few rows of the one side and many of the other, then wide rows. Sizes at multiples of 8 are for warpgroups in 16-bit types.
/// The states of more keys, and sums of more log-decays, would be too bad in the plain implementation to set a bound.
pub fn long_sums() -> Vec<Case> {
    let softmax = || Operation::Softmax(SoftmaxOptions::default());
    let gau = || Operation::Gau(GauOptions::default());
    let map = FeatureMap::EluPlusOne;
    let linear = || Operation::Linear(LinearOptions { map, ..Default::default() });
    let fading = || {
        // As 1 − 10⁻⁴: ten thousand keys count.
        let log_decay = Some(Extra::Constant(1));
        Operation::Linear(LinearOptions { map, log_decay, causal: true, ..Default::default() })
    };
    let norm = || Operation::Norm(NormOptions { map, causal: true, ..Default::default() });
    let case = |why, operation, queries, keys, dtypes| {
        let case = Case::new(why, operation).heads(1, 1, 1).widths(8, 8).lengths(queries, keys).only(dtypes);
        Case { is_positive: true, ..case }
    };
    vec![
        case("softmax over 64 Ki keys", softmax(), 16, 65_536, F32),
        case("softmax over 2 Ki keys", softmax(), 16, 2048, F32),
        case("softmax over 16 Ki queries", softmax(), 16_384, 16, F32),
        case("softmax over 16 Ki keys, ragged", softmax(), 16, 16_384, HALVES).widths(9, 9),
        case("softmax over 16 Ki keys, aligned", softmax(), 16, 16_384, HALVES).widths(64, 64),
        case("softmax over 16 Ki queries, aligned", softmax(), 16_384, 16, HALVES).widths(64, 64),
        case("softmax of wide rows", softmax(), 60, 60, F32).widths(512, 40),
        case("GAU over 16 Ki keys", gau(), 16, 16_384, F32),
        case("GAU over 16 Ki queries", gau(), 16_384, 16, F32),
        case("GAU over 16 Ki keys, ragged", gau(), 16, 16_384, HALVES).widths(9, 9),
        case("GAU over 16 Ki keys, aligned", gau(), 16, 16_384, HALVES).widths(64, 64),
        case("GAU of wide rows", gau(), 60, 60, F32).widths(512, 40),
        case("linear over 8 Ki keys", linear(), 16, 8192, F32),
        case("linear over 2 Ki keys", linear(), 16, 2048, F32),
        case("linear over 16 Ki queries", linear(), 16_384, 16, F32),
        case("linear over 8 Ki keys, ragged", linear(), 16, 8192, HALVES).widths(9, 9),
        case("linear over 8 Ki keys, aligned", linear(), 16, 8192, HALVES).widths(64, 64),
        case("linear over 4 Ki keys that fade", fading(), 16, 4096, F32),
        case("linear over 4 Ki keys that fade, aligned", fading(), 16, 4096, HALVES).widths(64, 64),
        case("linear of wide rows", linear(), 60, 60, F32).widths(256, 40),
        case("norm over 3000 keys, causal", norm(), 3000, 3000, F32),
    ]
}
