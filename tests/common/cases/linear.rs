//! Linear attention.

use attn_kernels::linear::FeatureMap::{self, *};
use attn_kernels::linear::LinearOptions;
use attn_kernels::problem::DType;

use super::{Case, Extra, Operation, in_all_layouts, in_whole_vectors};

type Options = LinearOptions<Extra>;

fn case(why: &'static str, options: Options) -> Case {
    Case::new(why, Operation::Linear(options))
}

fn full(map: FeatureMap) -> Options {
    LinearOptions { map, ..Default::default() }
}

fn causal(map: FeatureMap) -> Options {
    LinearOptions { causal: true, ..full(map) }
}

/// Without the divisor.
fn raw(options: Options) -> Options {
    LinearOptions { normalizer: None, ..options }
}

fn decayed(map: FeatureMap, decay: Extra) -> Options {
    LinearOptions { log_decay: Some(decay), ..causal(map) }
}

fn masked(options: Options, key_mask: Extra) -> Options {
    LinearOptions { key_mask: Some(key_mask), ..options }
}

pub fn linear() -> Vec<Case> {
    let cases = [lengths(), maps_and_widths(), decays(), heads_and_masks(), strong_decays(), extreme_rows()];
    let cases = in_all_layouts(cases.concat());
    [cases, in_whole_vectors(warpgroups())].concat()
}

fn lengths() -> Vec<Case> {
    vec![
        case("no token", causal(EluPlusOne)).lengths(0, 0),
        case("no key", full(EluPlusOne)).lengths(5, 0),
        case("no key, causal, after some", causal(EluPlusOne)).lengths(0, 0).after(4),
        case("no query: the state still takes the keys", causal(Relu)).lengths(0, 70),
        case("no query, full", full(Relu)).lengths(0, 9),
        case("no batch entry", causal(EluPlusOne)).batch(0),
        case("one token", causal(EluPlusOne)).lengths(1, 1),
        case("one token after many", causal(EluPlusOne)).lengths(1, 1).after(100),
        case("one token, per-token decay, after many", raw(decayed(Silu, Extra::PerToken))).lengths(1, 1).after(70),
        case("one token, masked, after many", masked(decayed(EluPlusOne, Extra::PerHead), Extra::NoKeys))
            .lengths(1, 1)
            .after(40),
        case("one token, grouped heads, odd widths, after a few", causal(Silu))
            .lengths(1, 1)
            .heads(6, 2, 2)
            .widths(5, 131)
            .after(3),
        case("one token, Taylor, after many", causal(Taylor)).lengths(1, 1).widths(8, 64).after(50),
        case("one token, cosine, wide values, after many", raw(causal(Cosine))).lengths(1, 1).widths(12, 200).after(50),
        case("one token, softmax over features, after many", causal(Softmax)).lengths(1, 1).widths(160, 40).after(50),
        case("a tile less one", causal(EluPlusOne)).lengths(63, 63).batch(2),
        case("one tile", causal(EluPlusOne)).lengths(64, 64),
        case("a tile and one", causal(EluPlusOne)).lengths(65, 65),
        case("several tiles", causal(EluPlusOne)).lengths(200, 200).batch(2).heads(3, 3, 3),
        case("one head in segments", causal(EluPlusOne)).lengths(1000, 1000).heads(1, 1, 1).widths(8, 12),
        case("one head in segments after a state", causal(Relu))
            .lengths(1400, 1400)
            .heads(1, 1, 1)
            .widths(3, 5)
            .after(70),
        case("full, one head in segments", full(EluPlusOne)).lengths(1000, 1000).heads(1, 1, 1).widths(8, 8),
        case("full", full(EluPlusOne)).lengths(130, 200),
        case("full after a state", full(EluPlusOne)).lengths(70, 130).after(33),
        case("full, more queries than keys", raw(full(Silu))).lengths(200, 70),
        case("causal, more keys than queries", causal(EluPlusOne)).lengths(50, 190),
        case("causal, more queries than keys", causal(EluPlusOne)).lengths(190, 50),
    ]
}

fn maps_and_widths() -> Vec<Case> {
    vec![
        case("identity, not normalised", raw(causal(Identity))).lengths(130, 130),
        case("elu + 1 far below 0", Options { normalizer: Some(0.0), ..causal(EluPlusOne) })
            .std(6.0)
            .widths(2, 8)
            .lengths(90, 90)
            .only(&[DType::F32, DType::F64, DType::BF16]),
        case("relu", causal(Relu)).lengths(90, 90),
        case("relu², full", full(ReluSquared)).lengths(90, 90),
        case("silu, not normalised", raw(causal(Silu))).lengths(90, 90),
        case("exp", causal(Exp)).lengths(90, 90),
        case("softmax over features", causal(Softmax)).lengths(90, 90),
        case("softmax over features, full, width 40", full(Softmax)).lengths(90, 90).widths(40, 20),
        case("Taylor", causal(Taylor)).lengths(90, 90).widths(7, 20),
        case("Taylor, full, not normalised", raw(full(Taylor))).lengths(70, 70).widths(16, 16),
        case("cosine", causal(Cosine)).lengths(90, 90).widths(59, 40),
        case("cosine, not normalised, full", raw(full(Cosine))).lengths(70, 90).widths(3, 8),
        case("width 1", causal(EluPlusOne)).widths(1, 1).lengths(70, 70),
        case("width 3", causal(Exp)).widths(3, 3).lengths(130, 130),
        case("widths 40 and 59", causal(EluPlusOne)).widths(40, 59).lengths(100, 100),
        case("widths 111 and 40, full", full(EluPlusOne)).widths(111, 40).lengths(100, 100),
        case("widest head", causal(EluPlusOne)).widths(512, 512).lengths(70, 70).heads(1, 1, 1),
        case("widest values", raw(causal(Identity)))
            .widths(64, 2048)
            .lengths(66, 66)
            .heads(1, 1, 1)
            .only(&[DType::F32, DType::F16]),
    ]
}

fn decays() -> Vec<Case> {
    vec![
        case("decay per head", decayed(EluPlusOne, Extra::PerHead)).lengths(200, 200),
        case("RetNet: decay per head, no map or norm", raw(decayed(Identity, Extra::PerHead)))
            .lengths(130, 130)
            .after(20),
        case("decay per token", decayed(EluPlusOne, Extra::PerToken)).lengths(200, 200).batch(2),
        case("SSD: shared q and k, many value heads", raw(decayed(Identity, Extra::PerToken)))
            .heads(1, 1, 4)
            .lengths(130, 130)
            .batch(2),
        case("decay per token, in segments", raw(decayed(Silu, Extra::PerToken)))
            .lengths(1100, 1100)
            .heads(1, 1, 1)
            .widths(6, 8),
        case("decay per head, in segments", decayed(Relu, Extra::PerHead))
            .lengths(1100, 1100)
            .heads(1, 1, 1)
            .widths(6, 8),
        case("decay that underflows", decayed(EluPlusOne, Extra::Strong)).lengths(150, 150),
        case("decay that underflows, after a state", raw(decayed(Identity, Extra::Strong))).lengths(90, 90).after(40),
        case("decay of 0", decayed(EluPlusOne, Extra::Zero)).lengths(130, 130),
        case("decay, more keys than queries", decayed(EluPlusOne, Extra::PerToken)).lengths(40, 170),
        case("decay, more queries than keys", decayed(EluPlusOne, Extra::PerToken)).lengths(170, 70),
        case("decay, key mask, after a state", masked(decayed(EluPlusOne, Extra::PerToken), Extra::SomeKeys))
            .lengths(140, 140)
            .batch(2)
            .after(30),
        case(
            "decay per head, key mask, after a state",
            masked(raw(decayed(Identity, Extra::PerHead)), Extra::SomeKeys),
        )
        .lengths(100, 100)
        .batch(2)
        .after(30),
        case("decay per head, key mask, in segments", masked(decayed(Relu, Extra::PerHead), Extra::SomeKeys))
            .lengths(1100, 1100)
            .heads(1, 1, 1)
            .widths(6, 8),
        case("decay, batch entries without keys", masked(decayed(EluPlusOne, Extra::PerToken), Extra::NoKeys))
            .lengths(70, 70)
            .batch(2)
            .after(10),
    ]
}

fn strong_decays() -> Vec<Case> {
    let constant = |why, options: Options, count: u32| {
        case(why, Options { log_decay: Some(Extra::Constant(count)), ..options })
            .lengths(256, 256)
            .heads(1, 1, 1)
            .widths(64, 24)
            .only(&[DType::F32, DType::F64])
    };
    vec![
        case("resets", decayed(EluPlusOne, Extra::Resets)).lengths(200, 200).batch(2),
        case("resets, not normalised, after a state", raw(decayed(Identity, Extra::Resets))).lengths(90, 90).after(40),
        case("resets, key mask", masked(decayed(Relu, Extra::Resets), Extra::SomeKeys)).lengths(130, 130).batch(2),
        case("resets, in segments, after a state", raw(decayed(Silu, Extra::Resets)))
            .lengths(1100, 1100)
            .heads(1, 1, 1)
            .widths(6, 8)
            .after(20),
        case("resets, more keys than queries, grouped heads", decayed(EluPlusOne, Extra::Resets))
            .lengths(40, 130)
            .heads(4, 2, 2),
        case("one token, reset, after many", decayed(EluPlusOne, Extra::Resets)).lengths(1, 1).after(50),
        constant("constant log-decay of −0.0001", raw(causal(Identity)), 1),
        constant("constant log-decay of −0.01, normalised", causal(EluPlusOne), 100),
        constant("constant log-decay of −1", raw(causal(Identity)), 10_000),
        constant("constant log-decay of −4", raw(causal(Identity)), 40_000),
        constant("constant log-decay of −8, normalised", causal(EluPlusOne), 80_000),
        constant("constant log-decay of −12", raw(causal(Identity)), 120_000),
        constant("constant log-decay of −12, normalised", causal(EluPlusOne), 120_000),
        constant("constant log-decay of −50", raw(causal(Identity)), 500_000),
    ]
}

fn extreme_rows() -> Vec<Case> {
    let wide: &[DType] = &[DType::F32, DType::F64, DType::BF16];
    vec![
        case("cosine of rows near 10⁻²⁵", causal(Cosine)).std(1e-25).only(wide).lengths(70, 70),
        case("cosine of rows near 10²⁰", raw(full(Cosine))).std(1e20).only(wide).lengths(70, 90),
        case("cosine, one token of 10²⁵ after many", causal(Cosine)).std(1e25).only(wide).lengths(1, 1).after(20),
        // More features than an H200 has shared memory for, with their sums.
        case("Taylor, 931 features, in segments", causal(Taylor)).lengths(300, 300).heads(1, 1, 1).widths(30, 8),
    ]
}

fn heads_and_masks() -> Vec<Case> {
    vec![
        case("grouped heads", causal(EluPlusOne)).heads(6, 2, 2).lengths(130, 130).batch(2),
        case("grouped heads with decay", decayed(EluPlusOne, Extra::PerHead)).heads(4, 2, 2).lengths(130, 130),
        case("more value heads than key heads", causal(EluPlusOne)).heads(4, 2, 4).lengths(90, 90),
        case("few queries heads, many value heads, full", full(EluPlusOne)).heads(2, 1, 6).lengths(90, 70).batch(2),
        case("fewer value heads than key heads", raw(causal(Silu))).heads(4, 4, 2).lengths(90, 90),
        case("key mask", masked(causal(EluPlusOne), Extra::SomeKeys)).batch(2).lengths(140, 140),
        case("key mask, full, not normalised", raw(masked(full(Exp), Extra::SomeKeys))).batch(2).lengths(70, 140),
        case("all keys masked", masked(causal(EluPlusOne), Extra::NoKeys)).batch(2),
        case(
            "all keys masked, full, ε 0",
            masked(LinearOptions { normalizer: Some(0.0), ..full(Relu) }, Extra::NoKeys),
        )
        .batch(2),
        case("large ε", LinearOptions { normalizer: Some(10.0), ..causal(EluPlusOne) }),
        case("more than 65 535 heads", causal(EluPlusOne)).many_heads(),
    ]
}

/// Sizes and choices of the kernels of compute capability 9.0.
fn warpgroups() -> Vec<Case> {
    let case = |why, options, width, value_width| case(why, options).widths(width, value_width).lengths(130, 130);
    let normalized = || causal(EluPlusOne);
    vec![
        case("64 wide, one chunk and a bit", normalized(), 64, 64).lengths(65, 65),
        case("64 wide, several chunks", normalized(), 64, 64).lengths(200, 200).batch(2),
        case("64 wide, identity, not normalised", raw(causal(Identity)), 64, 64).lengths(192, 192),
        case("64 by 128", normalized(), 64, 128),
        case("64 by 128, decay per head, not normalised", raw(decayed(Identity, Extra::PerHead)), 64, 128),
        case("128 by 64, decay per token", decayed(EluPlusOne, Extra::PerToken), 128, 64).batch(2),
        case("128 by 128", normalized(), 128, 128).lengths(200, 200),
        case("128 by 128, decay per token, not normalised", raw(decayed(Silu, Extra::PerToken)), 128, 128),
        case("narrower than a chunk", normalized(), 40, 24),
        case("two blocks of values, the last not full", raw(causal(Relu)), 72, 200).heads(1, 1, 1),
        case("exp, 32 wide", causal(Exp), 32, 32).std(0.5),
        case("relu², not normalised", raw(causal(ReluSquared)), 64, 72),
        case("decay that underflows, 64 wide", decayed(EluPlusOne, Extra::Strong), 64, 64),
        case("after a state", normalized(), 64, 64).after(70),
        case("decay per token, after a state, two blocks of values", raw(decayed(Relu, Extra::PerToken)), 16, 136)
            .after(33),
        case("key mask, 64 wide", masked(normalized(), Extra::SomeKeys), 64, 64).batch(2),
        case("key mask, identity, 128 values", masked(raw(causal(Identity)), Extra::SomeKeys), 64, 128),
        case("all keys masked, 64 wide", masked(normalized(), Extra::NoKeys), 64, 64).batch(2),
        case("more keys than queries", normalized(), 64, 64).lengths(50, 190),
        case("more queries than keys", decayed(EluPlusOne, Extra::PerToken), 64, 64).lengths(190, 50),
        case("more value heads than key heads, 64 wide", normalized(), 64, 64).heads(4, 2, 4),
        case("grouped heads, 64 wide", normalized(), 64, 64).heads(6, 2, 2).batch(2),
        case("grouped heads, fewer key heads than value heads, full", full(EluPlusOne), 64, 128).heads(4, 1, 2),
        case("one head in segments, 64 wide", normalized(), 64, 64).lengths(600, 600).heads(1, 1, 1),
        case("decay per token, in segments, after a state", decayed(Silu, Extra::PerToken), 64, 64)
            .lengths(600, 600)
            .heads(1, 1, 1)
            .after(20),
        case("256 wide", raw(causal(Identity)), 256, 72).heads(1, 1, 1),
        case("256 wide, normalised, after a state", causal(Relu), 200, 64).heads(1, 1, 1).after(20),
        case("256 wide, elu + 1, decay per token", decayed(EluPlusOne, Extra::PerToken), 256, 64).heads(1, 1, 1),
        case("256 wide, in segments", causal(Relu), 256, 64).lengths(600, 600).heads(1, 1, 1),
        case("64 by 128, in segments", normalized(), 64, 128).lengths(600, 600).heads(1, 1, 1),
        case("128 by 64, in segments", raw(decayed(Identity, Extra::PerHead)), 128, 64)
            .lengths(600, 600)
            .heads(1, 1, 1),
        case("128 by 128, in segments", normalized(), 128, 128).lengths(600, 600).heads(1, 1, 1),
        case("key mask, in segments", masked(normalized(), Extra::SomeKeys), 64, 64).lengths(600, 600).heads(1, 1, 1),
        case("full, 64 wide", full(EluPlusOne), 64, 64).lengths(130, 200),
        case("full, 64 by 128, key mask", masked(full(EluPlusOne), Extra::SomeKeys), 64, 128).batch(2).lengths(70, 140),
        case("full, 128 by 64, after a state", raw(full(Silu)), 128, 64).after(33),
        case("full, 128 by 128, in segments", full(Relu), 128, 128).lengths(600, 600).heads(1, 1, 1),
        case("full, 256 wide, more queries than keys", full(EluPlusOne), 256, 72).lengths(200, 70).heads(1, 1, 1),
        case("full, all keys masked, 64 wide", masked(full(EluPlusOne), Extra::NoKeys), 64, 64).batch(2),
        case(
            "decay per token, in segments, not normalised, key mask",
            masked(raw(decayed(Silu, Extra::PerToken)), Extra::SomeKeys),
            64,
            40,
        )
        .lengths(600, 600)
        .heads(1, 1, 1),
        case("shared q, k and v", raw(decayed(Silu, Extra::PerHead)), 64, 128).heads(1, 1, 4),
        case("256 by 200, masked", masked(normalized(), Extra::SomeKeys), 256, 200).heads(1, 1, 1),
        case("64 by 256, decay per token", raw(decayed(Relu, Extra::PerToken)), 64, 256).heads(1, 1, 1),
        case("large sums", normalized(), 64, 64).std(20.0).lengths(300, 300).heads(1, 1, 1),
        case("resets, 64 wide", decayed(EluPlusOne, Extra::Resets), 64, 64).batch(2),
        case("resets, 64 by 128, not normalised, after a state", raw(decayed(Silu, Extra::Resets)), 64, 128).after(20),
        case("resets, key mask, in segments", masked(decayed(Relu, Extra::Resets), Extra::SomeKeys), 64, 64)
            .lengths(600, 600)
            .heads(1, 1, 1),
        case("constant log-decay of −8, 64 wide", raw(decayed(Identity, Extra::Constant(80_000))), 64, 64),
        case("constant log-decay of −12, 128 by 64", decayed(EluPlusOne, Extra::Constant(120_000)), 128, 64),
        case("decay per head, key mask, 64 wide", masked(decayed(Relu, Extra::PerHead), Extra::SomeKeys), 64, 64)
            .batch(2),
    ]
}
