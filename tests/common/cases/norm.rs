//! NormAttention of TransNormer.

use attn_kernels::linear::FeatureMap::{self, *};
use attn_kernels::problem::DType;
use attn_kernels::transnormer::{NormOptions, NormScope};

use super::{Case, Extra, Operation, in_all_layouts, in_whole_vectors};

type Options = NormOptions<Extra>;

fn case(why: &'static str, options: Options) -> Case {
    Case::new(why, Operation::Norm(options))
}

fn full(map: FeatureMap) -> Options {
    NormOptions { map, ..Default::default() }
}

fn causal(map: FeatureMap) -> Options {
    NormOptions { causal: true, ..full(map) }
}

/// Norm over all heads.
fn together(options: Options) -> Options {
    NormOptions { norm: NormScope::AllHeads, ..options }
}

fn decayed(map: FeatureMap, decay: Extra) -> Options {
    NormOptions { log_decay: Some(decay), ..causal(map) }
}

fn masked(options: Options, key_mask: Extra) -> Options {
    NormOptions { key_mask: Some(key_mask), ..options }
}

pub fn norm() -> Vec<Case> {
    [in_all_layouts([lengths(), choices()].concat()), in_whole_vectors(warpgroups())].concat()
}

/// Sizes of the kernels of compute capability 9.0.
fn warpgroups() -> Vec<Case> {
    let case = |why, options, width, value_width| case(why, options).widths(width, value_width).lengths(130, 130);
    vec![
        case("64 by 64", causal(EluPlusOne), 64, 64),
        case("128 by 104", causal(EluPlusOne), 128, 104),
        case("two blocks of values", causal(Silu), 64, 136),
        case("64 by 128, all heads", together(causal(EluPlusOne)), 64, 128).batch(2),
        case("full, 64 by 128", full(EluPlusOne), 64, 128).lengths(70, 140),
        case("full, two blocks of values", full(Silu), 64, 136).after(9),
        case("64 by 64, decay per token", decayed(EluPlusOne, Extra::PerToken), 64, 64).after(9),
        case("64 by 64, decay per head, in segments", decayed(EluPlusOne, Extra::PerHead), 64, 64)
            .lengths(600, 600)
            .heads(1, 1, 1),
        case("40 by 56, all heads, shared q", together(causal(Relu)), 40, 56).heads(2, 1, 2),
    ]
}

fn lengths() -> Vec<Case> {
    vec![
        case("no token", causal(EluPlusOne)).lengths(0, 0),
        case("no key", full(EluPlusOne)).lengths(5, 0),
        case("no key, all heads", together(full(EluPlusOne))).lengths(5, 0),
        case("one token", causal(EluPlusOne)).lengths(1, 1),
        case("one token, 100 values, after many", causal(EluPlusOne)).lengths(1, 1).widths(16, 100).after(50),
        case("one token, 200 values, after many", causal(Silu)).lengths(1, 1).widths(16, 200).after(50),
        case("one token, all heads, after many", together(causal(EluPlusOne))).lengths(1, 1).after(90),
        case("a tile less one", causal(EluPlusOne)).lengths(63, 63).batch(2),
        case("one tile", together(causal(EluPlusOne))).lengths(64, 64),
        case("a tile and one", causal(EluPlusOne)).lengths(65, 65),
        case("several tiles", causal(EluPlusOne)).lengths(200, 200).batch(2).heads(3, 3, 3),
        case("several tiles, all heads", together(causal(EluPlusOne))).lengths(200, 200).batch(2).heads(3, 3, 3),
        case("squares past the range of f32", causal(ReluSquared)).std(8e3).lengths(70, 70),
        case("squares past the range of f32, all heads", together(full(ReluSquared))).std(8e3).lengths(40, 70),
        case("one head in segments", causal(EluPlusOne)).lengths(1000, 1000).heads(1, 1, 1).widths(8, 12),
        case("full, in segments, all heads", together(full(EluPlusOne))).lengths(1000, 1000).widths(8, 8),
        case("full", full(EluPlusOne)).lengths(130, 200),
        case("full after a state", together(full(Relu))).lengths(70, 130).after(33),
        case("causal, more keys than queries", causal(EluPlusOne)).lengths(50, 190),
        case("causal, more queries than keys", together(causal(EluPlusOne))).lengths(190, 50),
    ]
}

fn choices() -> Vec<Case> {
    vec![
        case("identity", causal(Identity)).lengths(130, 130),
        case("relu, all heads", together(causal(Relu))).lengths(90, 90),
        case("silu", causal(Silu)).lengths(90, 90),
        case("exp, full", full(Exp)).lengths(90, 90),
        case("softmax over features", causal(Softmax)).lengths(90, 90),
        case("Taylor", causal(Taylor)).lengths(90, 90).widths(7, 20),
        case("cosine, all heads", together(causal(Cosine))).lengths(90, 90).widths(59, 40),
        case("width 1: outputs are ±1, all but their rounding cancels", causal(EluPlusOne))
            .widths(1, 1)
            .lengths(70, 70)
            .only(&[DType::F32, DType::F64]),
        case("width 1, two values", causal(EluPlusOne)).widths(1, 2).lengths(70, 70),
        case("width 3, all heads", together(causal(EluPlusOne))).widths(3, 3).lengths(130, 130),
        case("widths 40 and 59", causal(EluPlusOne)).widths(40, 59).lengths(100, 100),
        case("widths 111 and 40", together(full(EluPlusOne))).widths(111, 40).lengths(100, 100),
        case("widest head", causal(Identity)).widths(512, 512).lengths(70, 70).heads(1, 1, 1),
        case("widest values, all heads", together(causal(EluPlusOne)))
            .widths(32, 2048)
            .only(&[DType::F32, DType::BF16]),
        case("decay per head", decayed(Identity, Extra::PerHead)).lengths(200, 200).after(20),
        case("decay per token, all heads", together(decayed(EluPlusOne, Extra::PerToken))).lengths(200, 200).batch(2),
        case("decay per token, in segments", decayed(Silu, Extra::PerToken))
            .lengths(1100, 1100)
            .heads(1, 1, 1)
            .widths(6, 8),
        case("decay that underflows", decayed(EluPlusOne, Extra::Strong)).lengths(150, 150),
        case("decay, key mask, after a state", masked(decayed(EluPlusOne, Extra::PerToken), Extra::SomeKeys))
            .lengths(100, 100)
            .batch(2)
            .after(30),
        case("decay per head, key mask, all heads", together(masked(decayed(Silu, Extra::PerHead), Extra::SomeKeys)))
            .lengths(70, 70)
            .batch(2),
        case("resets", decayed(EluPlusOne, Extra::Resets)).lengths(150, 150).after(20),
        case("resets, all heads, key mask", together(masked(decayed(Relu, Extra::Resets), Extra::SomeKeys)))
            .lengths(90, 90)
            .batch(2),
        case("constant log-decay of −12", decayed(EluPlusOne, Extra::Constant(120_000)))
            .lengths(256, 256)
            .heads(1, 1, 1)
            .only(&[DType::F32, DType::F64]),
        case("grouped heads", together(causal(EluPlusOne))).heads(6, 2, 2).lengths(130, 130).batch(2),
        case("more value heads than key heads", together(causal(EluPlusOne))).heads(4, 2, 4).lengths(90, 90),
        case("key mask", masked(causal(EluPlusOne), Extra::SomeKeys)).batch(2).lengths(140, 140).after(9),
        case("key mask, all heads, full", together(masked(full(EluPlusOne), Extra::SomeKeys)))
            .batch(2)
            .lengths(70, 140),
        case("all keys masked", masked(causal(EluPlusOne), Extra::NoKeys)).batch(2),
        case("all keys masked, all heads", together(masked(full(EluPlusOne), Extra::NoKeys))).batch(2),
        case("large ε", NormOptions { epsilon: 100.0, ..causal(EluPlusOne) }),
        case("more than 65 535 heads", together(causal(EluPlusOne))).many_heads(),
    ]
}
