//! Performer attention.

use attn_kernels::performer::FavorMap::{self, *};
use attn_kernels::performer::PerformerOptions;
use attn_kernels::problem::DType;

use super::{Case, Extra, Operation, in_all_layouts};

type Options = PerformerOptions<Extra>;

fn case(why: &'static str, directions: usize, options: Options) -> Case {
    Case::new(why, Operation::Performer(options, directions))
}

fn full(map: FavorMap) -> Options {
    PerformerOptions { map, ..Default::default() }
}

fn causal(map: FavorMap) -> Options {
    PerformerOptions { causal: true, ..full(map) }
}

fn masked(options: Options, key_mask: Extra) -> Options {
    PerformerOptions { key_mask: Some(key_mask), ..options }
}

pub fn performer() -> Vec<Case> {
    in_all_layouts([lengths(), choices()].concat())
}

fn lengths() -> Vec<Case> {
    vec![
        case("no token", 32, causal(Positive)).lengths(0, 0),
        case("no key", 32, full(Positive)).lengths(5, 0),
        case("no query: the state still takes the keys", 32, causal(Hyperbolic)).lengths(0, 70),
        case("nothing new after a state", 32, causal(Positive)).lengths(0, 0).after(8),
        case("one token", 32, causal(Positive)).lengths(1, 1),
        case("one token after many", 32, causal(Positive)).lengths(1, 1).after(100),
        case("one token, grouped heads, after many", 33, causal(Hyperbolic))
            .lengths(1, 1)
            .heads(6, 2, 2)
            .std(3.0)
            .after(50),
        case("one token, ReLU features, after many", 40, causal(Relu)).lengths(1, 1).widths(24, 72).after(50),
        case("one token, masked, after many", 32, masked(causal(Positive), Extra::NoKeys)).lengths(1, 1).after(50),
        case("a tile less one", 32, causal(Positive)).lengths(63, 63).batch(2),
        case("one tile", 64, causal(Positive)).lengths(64, 64),
        case("a tile and one", 40, causal(Positive)).lengths(65, 65),
        case("several tiles", 33, causal(Positive)).lengths(200, 200).batch(2).heads(3, 3, 3),
        case("one head in segments", 24, causal(Positive)).lengths(1000, 1000).heads(1, 1, 1).widths(8, 8),
        case("full, in segments", 24, full(Positive)).lengths(1000, 1000).heads(1, 1, 1).widths(8, 8),
        case("causal, in segments, after a state", 16, causal(Hyperbolic))
            .lengths(1100, 1100)
            .heads(1, 1, 1)
            .widths(4, 8)
            .after(60),
        case("full", 48, full(Positive)).lengths(130, 200),
        case("full after a state", 48, full(Positive)).lengths(70, 130).after(33),
        case("full, more queries than keys", 32, full(Hyperbolic)).lengths(200, 70),
        case("causal, more keys than queries", 32, causal(Positive)).lengths(50, 190),
        case("causal, more queries than keys", 32, causal(Positive)).lengths(190, 50),
    ]
}

fn choices() -> Vec<Case> {
    vec![
        case("hyperbolic", 20, causal(Hyperbolic)).lengths(130, 130),
        case("hyperbolic, full", 33, full(Hyperbolic)).lengths(130, 70),
        case("ReLU features", 50, causal(Relu)).lengths(130, 130),
        case("ReLU features, full, after a state", 32, full(Relu)).lengths(70, 70).after(20),
        case("ReLU features in segments", 48, causal(Relu)).lengths(1000, 1000).heads(1, 1, 1).widths(8, 8),
        case("small entries, where softmax is approximated", 256, causal(Positive))
            .std(0.25)
            .lengths(130, 130)
            .widths(64, 64),
        case("large entries: the stabiliser moves", 32, causal(Positive)).std(3.0).lengths(150, 150),
        case("large entries, hyperbolic", 16, causal(Hyperbolic)).std(3.0).lengths(150, 150).after(30),
        case("one direction", 1, causal(Positive)).lengths(70, 70),
        case("width 1", 8, causal(Positive)).widths(1, 1).lengths(70, 70),
        case("width 3", 9, full(Hyperbolic)).widths(3, 3).lengths(130, 130),
        case("widths 40 and 59", 64, causal(Positive)).widths(40, 59).lengths(100, 100),
        case("widths 111 and 40", 64, full(Relu)).widths(111, 40).lengths(100, 100),
        case("widest head", 128, causal(Positive)).std(0.5).widths(512, 64).lengths(70, 70).heads(1, 1, 1),
        case("widest values", 32, causal(Positive))
            .widths(16, 2048)
            .lengths(66, 66)
            .heads(1, 1, 1)
            .only(&[DType::F32, DType::F16]),
        case("grouped heads", 32, causal(Positive)).heads(6, 2, 2).lengths(130, 130).batch(2),
        case("more value heads than key heads", 32, causal(Hyperbolic)).heads(4, 2, 4).lengths(90, 90),
        case("key mask", 32, masked(causal(Positive), Extra::SomeKeys)).batch(2).lengths(140, 140),
        case("key mask, full", 32, masked(full(Hyperbolic), Extra::SomeKeys)).batch(2).lengths(70, 140),
        case("key mask, ReLU features, after a state", 32, masked(causal(Relu), Extra::SomeKeys))
            .batch(2)
            .lengths(70, 70)
            .after(30),
        case("all keys masked", 32, masked(causal(Positive), Extra::NoKeys)).batch(2),
        case("all keys masked, full, after a state", 32, masked(full(Positive), Extra::NoKeys)).batch(2).after(7),
        case("ε 0", 32, PerformerOptions { epsilon: 0.0, ..causal(Positive) }).lengths(90, 90),
        case("large ε", 32, PerformerOptions { epsilon: 1.0, ..full(Positive) }).lengths(90, 90),
        case("more than 65 535 heads", 4, causal(Positive)).many_heads(),
    ]
}
