//! Performer attention.

use attn_kernels::performer::FavorMap::{self, *};
use attn_kernels::performer::PerformerOptions;
use attn_kernels::problem::DType;

use super::{Case, Extra, Operation, in_all_layouts, in_whole_vectors};

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
    let cases = in_all_layouts([lengths(), choices()].concat());
    [cases, in_whole_vectors(warpgroups())].concat()
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

/// Sizes and choices of the kernels of compute capability 9.0.
fn warpgroups() -> Vec<Case> {
    let case = |why, directions, options| case(why, directions, options).widths(64, 64).lengths(130, 130);
    vec![
        case("64 wide, 256 features", 256, causal(Positive)).std(0.5).lengths(192, 192),
        case("64 wide, 128 features, a chunk and a bit", 128, causal(Positive)).std(0.5).lengths(65, 65).batch(2),
        case("100 features of 40, 24 values", 100, causal(Positive)).widths(40, 24),
        case("150 features of 16, two blocks of values", 150, causal(Positive)).widths(16, 72).heads(1, 1, 1),
        case("hyperbolic, 128 directions", 128, causal(Hyperbolic)).std(0.5).heads(1, 1, 1),
        case("hyperbolic, 40 directions, after a state", 40, causal(Hyperbolic)).after(30),
        case("ReLU features, 256", 256, causal(Relu)).heads(1, 1, 1),
        case("ReLU features, 70, after a state", 70, causal(Relu)).after(40),
        case("large entries, 64 wide", 64, causal(Positive)).std(3.0).heads(1, 1, 1),
        case("large entries, hyperbolic, after a state", 16, causal(Hyperbolic)).widths(16, 64).std(3.0).after(30),
        case("small entries, after a state", 200, causal(Positive)).std(0.25).after(70).heads(1, 1, 1),
        case("key mask, 64 wide", 96, masked(causal(Positive), Extra::SomeKeys)).batch(2).lengths(140, 140),
        case("key mask, ReLU features", 96, masked(causal(Relu), Extra::SomeKeys)).batch(2).lengths(140, 140),
        case("all keys masked, 64 wide", 64, masked(causal(Positive), Extra::NoKeys)).batch(2),
        case("more keys than queries, 64 wide", 64, causal(Positive)).lengths(50, 190),
        case("more queries than keys, 64 wide", 64, causal(Hyperbolic)).lengths(190, 50),
        case("more value heads than key heads, 64 wide", 64, causal(Positive)).heads(4, 2, 4).lengths(70, 70),
        case("grouped heads, 64 wide", 64, causal(Positive)).heads(4, 2, 2).lengths(70, 70).batch(2),
        case("grouped heads in segments", 64, causal(Positive)).heads(2, 1, 1).lengths(600, 600),
        case("one head in segments, 64 wide", 64, causal(Positive)).lengths(600, 600).heads(1, 1, 1),
        case("256 features in segments, after a state", 256, causal(Positive))
            .lengths(600, 600)
            .heads(1, 1, 1)
            .after(20),
        case("ReLU features in segments, after a state", 50, causal(Relu)).lengths(600, 600).heads(1, 1, 1).after(20),
        case("full, 64 wide, 256 features", 256, full(Positive)).std(0.5).lengths(130, 200),
        case("full, hyperbolic, after a state", 40, full(Hyperbolic)).widths(40, 64).after(30),
        case("full, large entries, key mask", 64, masked(full(Positive), Extra::SomeKeys))
            .std(2.0)
            .batch(2)
            .lengths(70, 140),
        case("full, ReLU features, in segments", 50, full(Relu)).lengths(600, 600).heads(1, 1, 1),
        case("full, in segments, two blocks of values", 200, full(Positive))
            .widths(64, 72)
            .lengths(500, 300)
            .heads(1, 1, 1),
        case("ε 0, 64 wide", 64, PerformerOptions { epsilon: 0.0, ..causal(Positive) }).lengths(70, 70),
        case("large ε, 64 wide", 64, PerformerOptions { epsilon: 1.0, ..causal(Positive) }).lengths(70, 70),
    ]
}
