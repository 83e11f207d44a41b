//! Softmax, DiagAttention and GAU.

use attn_kernels::gau::{GauNorm, GauOptions};
use attn_kernels::problem::{DType, Mask};
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::{DiagOptions, DiagWeight};

use super::{Case, Extra, Operation, beside, in_all_layouts, in_whole_vectors};
use crate::common::buffers::Layout;

const CAUSAL: Mask = Mask::Causal;

fn window(left: Option<usize>, right: Option<usize>) -> Mask {
    Mask::Window { left, right }
}

type Softmax = SoftmaxOptions<Extra>;

fn attend(why: &'static str, options: Softmax) -> Case {
    Case::new(why, Operation::Softmax(options))
}

fn with(mask: Mask) -> Softmax {
    SoftmaxOptions { mask, ..Default::default() }
}

fn plain() -> Softmax {
    with(Mask::Full)
}

fn masked(mask: Mask, key_mask: Extra) -> Softmax {
    SoftmaxOptions { key_mask: Some(key_mask), ..with(mask) }
}

fn biased(mask: Mask, bias: Extra) -> Softmax {
    SoftmaxOptions { bias: Some(bias), ..with(mask) }
}

pub fn softmax() -> Vec<Case> {
    [in_all_layouts([softmax_sizes(), softmax_choices(), beside::softmax()].concat()), softmax_aligned()].concat()
}

/// Rows that start at multiples of 16 bytes, as kernels with tensor copies need them.
fn softmax_aligned() -> Vec<Case> {
    let cases = [
        attend("aligned, whole tiles", plain()).lengths(128, 352).widths(128, 128).heads(1, 1, 1),
        attend("aligned, ragged tiles", plain()).lengths(200, 500).widths(128, 128).heads(2, 1, 1),
        attend("aligned, causal", with(CAUSAL)).lengths(300, 300).widths(64, 64).heads(4, 2, 2),
        attend("aligned, more keys than queries", with(CAUSAL)).lengths(260, 400).widths(128, 128).heads(1, 1, 1),
        attend("aligned, more queries than keys", with(CAUSAL)).lengths(300, 100).widths(64, 64).batch(2),
        attend("aligned, window", with(window(Some(400), Some(20)))).lengths(700, 700).widths(128, 128).heads(1, 1, 1),
        attend("aligned, blocks", with(Mask::Blocks { size: 300, causal: false }))
            .lengths(650, 650)
            .widths(64, 64)
            .heads(1, 1, 1),
        attend("aligned, causal blocks of 50", with(Mask::Blocks { size: 50, causal: true }))
            .lengths(200, 200)
            .widths(128, 128)
            .heads(1, 1, 1),
        attend("aligned, widest tile", with(CAUSAL)).lengths(150, 330).widths(256, 256).heads(2, 1, 1),
        attend("aligned, widest tile, large scores", plain()).lengths(70, 250).widths(256, 256).std(3.0),
        attend("aligned, widths padded", plain()).lengths(130, 200).widths(72, 104),
        attend("aligned, widths 40 and 256", with(CAUSAL)).lengths(100, 100).widths(40, 256).heads(3, 1, 1),
        attend("aligned, one query", plain()).lengths(1, 40).widths(64, 64).heads(4, 2, 2).batch(2),
        attend("aligned, first keys are hidden from all", with(window(Some(1), Some(0))))
            .lengths(100, 300)
            .widths(64, 64),
        attend("aligned, gradient of the log-sum-exp", with(CAUSAL))
            .lengths(150, 230)
            .widths(128, 128)
            .heads(4, 2, 2)
            .with_lse_gradient(),
        attend("aligned, rows without a key", with(CAUSAL)).lengths(260, 120).widths(128, 128).with_lse_gradient(),
        attend("aligned, more heads than the cache holds", with(CAUSAL))
            .lengths(330, 750)
            .widths(128, 128)
            .heads(3, 3, 3),
        attend("aligned, decoding", with(CAUSAL)).lengths(1, 3000).widths(128, 128).heads(8, 2, 2),
        attend("aligned, few queries that see all keys", plain()).lengths(20, 700).widths(64, 64).heads(6, 2, 2),
        attend("aligned, keys in parts", with(CAUSAL)).lengths(200, 1100).widths(64, 64).heads(1, 1, 1),
        attend("aligned, ragged window", with(window(Some(30), Some(90)))).lengths(400, 370).widths(64, 64).std(2.0),
    ];
    let layouts = [Layout::Contiguous, Layout::Tokens].into_iter().cycle();
    let only = |case: Case| case.only(&[DType::F16, DType::BF16]);
    cases.into_iter().zip(layouts).map(|(case, layout)| Case { layout, ..only(case) }).collect()
}

fn softmax_sizes() -> Vec<Case> {
    vec![
        attend("no query and no key", plain()).lengths(0, 0),
        attend("no query", with(CAUSAL)).lengths(0, 5),
        attend("no key: every row is empty", plain()).lengths(5, 0).with_lse_gradient(),
        attend("one token", plain()).lengths(1, 1),
        attend("no batch entry", plain()).batch(0),
        attend("decoding: one query", with(CAUSAL)).lengths(1, 1000).heads(4, 2, 2),
        attend("a tile less one", with(CAUSAL)).lengths(63, 63).batch(2),
        attend("one tile", plain()).lengths(64, 64).widths(64, 64),
        attend("a tile and one", with(CAUSAL)).lengths(65, 65).with_lse_gradient(),
        attend("several tiles", with(CAUSAL)).lengths(200, 200).batch(2).heads(3, 3, 3),
        attend("past a forward tile of keys", plain()).lengths(130, 1000).heads(1, 1, 1).widths(8, 8),
        attend("one head, cut into segments", with(CAUSAL)).lengths(1000, 1000).heads(1, 1, 1).widths(8, 12),
        attend("width 1", plain()).widths(1, 1).lengths(70, 33),
        attend("width 3", with(CAUSAL)).widths(3, 1),
        attend("widths 40 and 59", with(CAUSAL)).widths(40, 59).lengths(100, 100),
        attend("widths 111 and 40", plain()).widths(111, 40).lengths(33, 90),
        attend("widest head", with(CAUSAL)).widths(512, 512).lengths(70, 70).heads(1, 1, 1),
        attend("widest values", plain())
            .widths(64, 2048)
            .lengths(66, 66)
            .heads(1, 1, 1)
            .only(&[DType::F32, DType::BF16]),
        attend("more queries than keys: first rows empty", with(CAUSAL)).lengths(90, 50).with_lse_gradient(),
        attend("more keys than queries", with(CAUSAL)).lengths(50, 190),
        attend("three keys and many queries", with(CAUSAL)).lengths(799, 3).widths(256, 256).heads(1, 1, 1),
        attend("three keys and many queries that see them all", plain()).lengths(799, 3).widths(64, 64),
        attend("one key", with(CAUSAL)).lengths(40, 1).widths(32, 40).with_lse_gradient(),
    ]
}

fn softmax_choices() -> Vec<Case> {
    vec![
        attend("window into the past", with(window(Some(17), Some(0)))).lengths(200, 200),
        attend("window on both sides", with(window(Some(5), Some(9)))).lengths(100, 140),
        attend("window of self", with(window(Some(0), Some(0)))).lengths(66, 66),
        attend("window open to the right", with(window(Some(3), None))).lengths(130, 70),
        attend("wide window, far tiles skipped", with(window(Some(100), Some(20)))).lengths(700, 700).heads(1, 1, 1),
        attend("window of any size", with(window(Some(usize::MAX), Some(usize::MAX)))).lengths(70, 60),
        attend("blocks of any size", with(Mask::Blocks { size: usize::MAX, causal: true })).lengths(66, 99),
        attend("blocks", with(Mask::Blocks { size: 48, causal: false })).lengths(130, 150),
        attend("causal blocks", with(Mask::Blocks { size: 70, causal: true })).lengths(200, 200),
        attend("grouped heads", with(CAUSAL)).heads(6, 2, 2).lengths(90, 90).batch(2),
        attend("all heads share one", plain()).heads(5, 1, 1).lengths(40, 130),
        attend("key mask", masked(Mask::Full, Extra::SomeKeys)).batch(3).lengths(70, 200).with_lse_gradient(),
        attend("key mask and causal", masked(CAUSAL, Extra::SomeKeys)).batch(2).lengths(140, 140).heads(4, 2, 2),
        attend("all keys masked", masked(Mask::Full, Extra::NoKeys)).batch(2).with_lse_gradient(),
        attend("all keys masked, one key", masked(CAUSAL, Extra::NoKeys)).batch(2).lengths(3, 1),
        attend("soft-cap", SoftmaxOptions { soft_cap: Some(1.5), ..with(CAUSAL) }).lengths(150, 150),
        attend("loose soft-cap", SoftmaxOptions { soft_cap: Some(50.0), ..plain() }).std(2.0),
        attend("bias", biased(Mask::Full, Extra::Shared)).lengths(70, 90),
        attend("bias per head and causal", biased(CAUSAL, Extra::PerHead)).lengths(190, 190).heads(4, 2, 2).batch(2),
        attend("bias in a window", biased(window(Some(20), Some(4)), Extra::PerHead)).lengths(100, 100),
        attend("bias, one head in segments", biased(CAUSAL, Extra::Shared))
            .lengths(600, 600)
            .heads(1, 1, 1)
            .widths(8, 8),
        attend(
            "soft-cap, bias and key mask",
            SoftmaxOptions { soft_cap: Some(3.0), bias: Some(Extra::PerHead), ..masked(CAUSAL, Extra::SomeKeys) },
        )
        .lengths(90, 150)
        .batch(2)
        .with_lse_gradient(),
        attend("scale 0: the mean", SoftmaxOptions { scale: Some(0.0), ..with(CAUSAL) }),
        attend("negative scale", SoftmaxOptions { scale: Some(-0.5), ..plain() }).lengths(65, 130).with_lse_gradient(),
        attend("window of two keys, across tiles", with(window(Some(1), Some(0)))).lengths(300, 300).widths(64, 64),
        attend("key mask in a window of four, across tiles", masked(window(Some(3), Some(0)), Extra::SomeKeys))
            .lengths(270, 270)
            .batch(2),
        attend("blocks of 48, across tiles", with(Mask::Blocks { size: 48, causal: true })).lengths(300, 300),
        attend("large scores, several tiles", SoftmaxOptions { scale: Some(1.0), ..with(CAUSAL) })
            .std(3.0)
            .lengths(400, 400),
        attend("large scores", SoftmaxOptions { scale: Some(1.0), ..with(CAUSAL) }).std(3.0).lengths(100, 100),
        attend("more than 65 535 heads", with(CAUSAL)).many_heads(),
        attend("few queries, key mask over segments", masked(CAUSAL, Extra::SomeKeys))
            .batch(2)
            .heads(4, 2, 2)
            .lengths(3, 2100)
            .widths(11, 13)
            .with_lse_gradient(),
        attend("few queries, window over segments", with(window(Some(1500), Some(0)))).lengths(2, 2600),
        attend("few queries, blocks", with(Mask::Blocks { size: 700, causal: true })).lengths(5, 1300).heads(3, 1, 1),
        attend(
            "few queries, soft-cap and bias",
            SoftmaxOptions { soft_cap: Some(2.0), ..biased(CAUSAL, Extra::PerHead) },
        )
        .lengths(2, 1100)
        .heads(4, 2, 2),
        attend("few queries, all keys masked", masked(Mask::Full, Extra::NoKeys)).batch(2).lengths(2, 1200),
        attend("few queries, fewer keys", with(CAUSAL)).lengths(8, 5).with_lse_gradient(),
    ]
}

pub fn diag() -> Vec<Case> {
    let case = |why, options: DiagOptions<Extra>| Case::new(why, Operation::Diag(options));
    let plain = DiagOptions::default;
    let causal = || DiagOptions { causal: true, ..plain() };
    let blocks = |block_size, causal| DiagOptions { block_size, causal, ..plain() };
    let relu = |block_size, causal, epsilon| DiagOptions {
        block_size,
        causal,
        weight: DiagWeight::Relu { epsilon },
        ..plain()
    };
    let masked = |options, key_mask| DiagOptions { key_mask: Some(key_mask), ..options };
    let cases = in_all_layouts(vec![
        case("no token", plain()).lengths(0, 0),
        case("no key, softmax", plain()).lengths(4, 0),
        case("no key, ReLU", relu(64, false, 1e-6)).lengths(4, 0),
        case("one token", causal()).lengths(1, 1),
        case("one token, ReLU", relu(64, true, 1e-3)).lengths(1, 1),
        case("one block less one", plain()).lengths(63, 63),
        case("one block", causal()).lengths(64, 64),
        case("ragged last block of one", plain()).lengths(65, 65),
        case("ragged last block, causal", causal()).lengths(200, 200).batch(2),
        case("many blocks", causal()).lengths(1000, 1000).heads(1, 1, 1).widths(8, 8),
        case("many blocks, ReLU", relu(64, false, 1e-6)).lengths(1000, 1000).heads(1, 1, 1).widths(8, 8),
        case("many blocks of 32, causal, ReLU", relu(32, true, 1e-6)).lengths(1000, 1000).heads(1, 1, 1),
        case("blocks of 100, causal, ReLU", relu(100, true, 1e-6)).lengths(330, 330).widths(32, 64),
        case("blocks of one", blocks(1, false)).lengths(70, 70),
        case("blocks of one, ReLU: outputs do not depend on q and k", relu(1, true, 1e-2))
            .lengths(66, 66)
            .only(&[DType::F32, DType::F64]),
        case("blocks of 7", blocks(7, true)).lengths(100, 100),
        case("block size 100", blocks(100, false)).lengths(230, 230),
        case("block larger than the sequence", blocks(4096, true)).lengths(130, 130),
        case("width 1", blocks(16, false)).widths(1, 1),
        case("width 3, ReLU", relu(16, true, 1e-6)).widths(3, 3),
        case("widths 40 and 59", causal()).widths(40, 59).lengths(100, 100),
        case("widths 111 and 40, ReLU", relu(64, false, 1e-6)).widths(111, 40).lengths(90, 90),
        case("widest head", plain()).widths(512, 512).heads(1, 1, 1),
        case("widest values, ReLU", relu(32, true, 1e-6))
            .widths(32, 2048)
            .heads(1, 1, 1)
            .only(&[DType::F32, DType::F16]),
        case("more keys than queries", causal()).lengths(70, 150),
        case("more queries than keys", plain()).lengths(150, 70),
        case("more queries than keys, ReLU", relu(32, true, 1e-6)).lengths(100, 60),
        case("grouped heads", causal()).heads(6, 2, 2).lengths(130, 130),
        case("grouped heads, ReLU", relu(64, true, 1e-6)).heads(4, 1, 1).lengths(130, 130).batch(2),
        case("key mask", masked(causal(), Extra::SomeKeys)).batch(2).lengths(150, 150),
        case("key mask, ReLU", masked(relu(64, false, 1e-6), Extra::SomeKeys)).batch(2).lengths(150, 150),
        case("all keys masked", masked(plain(), Extra::NoKeys)).batch(2),
        case("all keys masked, ReLU", masked(relu(64, false, 1e-6), Extra::NoKeys)).batch(2),
        case("scale 0", DiagOptions { scale: Some(0.0), ..causal() }),
        case("negative scale, ReLU", DiagOptions { scale: Some(-0.3), ..relu(64, false, 1e-4) }).lengths(90, 90),
        case("large ε", relu(64, true, 10.0)).lengths(130, 130),
        case("more than 65 535 heads", relu(64, true, 1e-2)).many_heads(),
        case("aligned", causal()).lengths(200, 200).widths(64, 64),
        case("few queries", blocks(1500, true)).lengths(4, 2000).heads(4, 2, 2),
        case("few queries, key mask, ReLU", masked(relu(1100, false, 1e-6), Extra::SomeKeys)).lengths(3, 2250).batch(2),
    ]);
    let aligned = in_whole_vectors(vec![
        case("aligned, ReLU", relu(64, true, 1e-6)).lengths(200, 200).widths(128, 256),
        case("aligned, negative scale, ReLU", DiagOptions { scale: Some(-0.3), ..relu(100, false, 1e-3) })
            .lengths(250, 230)
            .widths(64, 64)
            .heads(4, 2, 2),
    ]);
    [cases, aligned].concat()
}

pub fn gau() -> Vec<Case> {
    let case = |why, options: GauOptions<Extra>| Case::new(why, Operation::Gau(options)).heads(1, 1, 1);
    let plain = |mask, norm| GauOptions { mask, norm, ..Default::default() };
    let full = |norm| plain(Mask::Full, norm);
    let causal = |norm| plain(CAUSAL, norm);
    let biased = |options, bias| GauOptions { bias: Some(bias), ..options };
    let masked = |options, key_mask| GauOptions { key_mask: Some(key_mask), ..options };
    let (length, length_width) = (GauNorm::Length, GauNorm::LengthWidth);
    let (row_sum, fixed) = (GauNorm::RowSum { epsilon: 1e-6 }, GauNorm::Fixed { length: 32.0 });
    let cases = in_all_layouts(vec![
        case("no token", full(length)).lengths(0, 0),
        case("no key", full(length)).lengths(3, 0),
        case("no key, row sum without ε", full(GauNorm::RowSum { epsilon: 0.0 })).lengths(3, 0),
        case("no query", causal(fixed)).lengths(0, 7),
        case("one token", full(length)).lengths(1, 1),
        case("one token, row sum", causal(row_sum)).lengths(1, 1).batch(3),
        case("a tile less one", causal(length)).lengths(63, 63).batch(2),
        case("one tile, the paper's widths", full(length)).lengths(64, 64).widths(128, 256),
        case("a tile and one, length and width", causal(length_width)).lengths(65, 65),
        case("several tiles, length and width", full(length_width)).lengths(200, 200).heads(2, 2, 2),
        case("several tiles, row sum", causal(row_sum)).lengths(200, 200).heads(2, 2, 2),
        case("several tiles, fixed length", causal(fixed)).lengths(200, 200).batch(2),
        case("long, one head", causal(length)).lengths(1000, 1000).widths(8, 12),
        case("long, one head, row sum", full(row_sum)).lengths(1000, 1000).widths(8, 8),
        case("three keys and many queries, row sum", causal(row_sum)).lengths(400, 3).widths(64, 64),
        case("window of two keys, across tiles, row sum", plain(window(Some(1), Some(0)), row_sum))
            .lengths(300, 300)
            .widths(64, 64),
        case("width 1", full(fixed)).widths(1, 1),
        case("width 3", causal(row_sum)).widths(3, 3),
        case("widths 40 and 59", causal(length_width)).widths(40, 59).lengths(100, 100),
        case("widths 111 and 59", full(row_sum)).widths(111, 59).lengths(80, 80),
        case("widest head", causal(fixed)).widths(512, 64).lengths(70, 70),
        case("widest values", causal(fixed)).widths(128, 2048).lengths(66, 66).only(&[DType::F32, DType::BF16]),
        case("more keys than queries", causal(row_sum)).lengths(50, 140),
        case("more queries than keys: first rows empty", causal(row_sum)).lengths(140, 50),
        case("window", plain(window(Some(10), Some(3)), fixed)).lengths(130, 130),
        case("causal blocks", plain(Mask::Blocks { size: 33, causal: true }, row_sum)).lengths(100, 100),
        case("grouped heads", causal(fixed)).heads(4, 2, 2).lengths(90, 90),
        case("bias", biased(full(fixed), Extra::Shared)).lengths(90, 90),
        case("bias per head, row sum", biased(causal(row_sum), Extra::PerHead))
            .heads(4, 2, 2)
            .lengths(130, 130)
            .batch(2),
        case("bias, length and width", biased(causal(length_width), Extra::Shared)).lengths(70, 130),
        case("bias and length", biased(full(length), Extra::Shared)).heads(2, 2, 2).lengths(100, 60),
        case("key mask", masked(causal(fixed), Extra::SomeKeys)).batch(2).lengths(150, 150),
        case("key mask, bias, row sum", masked(biased(full(row_sum), Extra::Shared), Extra::SomeKeys))
            .batch(2)
            .lengths(90, 150),
        case("key mask, length", masked(causal(length), Extra::SomeKeys)).batch(3).lengths(70, 150),
        case("key mask, length, width and bias", masked(biased(full(length_width), Extra::Shared), Extra::SomeKeys))
            .batch(2)
            .lengths(130, 90),
        case("all keys masked", masked(full(length), Extra::NoKeys)).batch(2),
        case("all keys masked, length and width", masked(full(length_width), Extra::NoKeys)).batch(2),
        case("all keys masked, row sum", masked(full(row_sum), Extra::NoKeys)).batch(2),
        case("fixed length below 1", full(GauNorm::Fixed { length: 0.25 })).std(0.5).lengths(70, 70),
        case("large ε of the row sum", full(GauNorm::RowSum { epsilon: 5.0 })).lengths(70, 70),
        case("more than 65 535 heads", causal(row_sum)).many_heads(),
        case("few queries, row sum", causal(row_sum)).lengths(3, 1500).heads(4, 2, 2),
        case("few queries, key mask and length", masked(causal(length), Extra::SomeKeys)).lengths(2, 1300).batch(2),
        case("few queries, bias", biased(full(fixed), Extra::Shared)).lengths(1, 1100).heads(2, 2, 2),
    ]);
    let aligned = in_whole_vectors(vec![
        case("aligned, whole tiles, the paper's widths", full(length)).lengths(128, 160).widths(128, 256),
        case("aligned, row sum", causal(row_sum)).lengths(300, 300).widths(64, 128).heads(2, 2, 2),
        case("aligned, several tiles of values", causal(fixed)).lengths(150, 200).widths(128, 520),
        case("aligned, grouped heads", causal(length_width)).heads(4, 2, 2).lengths(140, 220).widths(72, 40),
        case("aligned, large scores", full(row_sum)).lengths(70, 250).widths(128, 64).std(20.0),
        case("aligned, small weights", full(length)).lengths(130, 1000).widths(64, 64),
        case("aligned, rows without a key", causal(row_sum)).lengths(260, 90).widths(64, 64),
        case("aligned, decoding", causal(fixed)).lengths(3, 1500).widths(64, 64),
        case("aligned, window", plain(window(Some(100), Some(30)), row_sum)).lengths(400, 400).widths(40, 264),
    ]);
    [cases, aligned].concat()
}
