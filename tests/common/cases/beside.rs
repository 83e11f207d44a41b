//! Softmax with an attention bias, with sinks, and under masks that are no window, and with dropout.

use attn_kernels::problem::{Dropout, Mask};
use attn_kernels::softmax::SoftmaxOptions;

use super::{Case, Entry, Extra, Operation};

const WINDOW: Mask = Mask::Window { left: Some(40), right: Some(3) };

type Softmax = SoftmaxOptions<Extra>;

fn attend(why: &'static str, options: Softmax) -> Case {
    Case::new(why, Operation::Softmax(options))
}

/// An attention bias that has these of batch entries, heads, queries and keys, by the first letters of those.
fn paired(mask: Mask, has: &str, entry: Entry) -> Softmax {
    let has = ['b', 'h', 'q', 'k'].map(|size| has.contains(size));
    SoftmaxOptions { mask, attention_bias: Some(Extra::Pairs(has, entry)), ..Default::default() }
}

fn sunk(mask: Mask) -> Softmax {
    SoftmaxOptions { mask, sinks: Some(Extra::PerHead), ..Default::default() }
}

pub fn softmax() -> Vec<Case> {
    [biases(), sinks(), masks(), dropouts()].concat()
}

fn biases() -> Vec<Case> {
    use Entry::{Holes, Keep, Own, Wide};
    let (full, causal, window) = (Mask::Full, Mask::Causal, WINDOW);
    vec![
        attend("attention bias of every pair", paired(causal, "bhqk", Own)).heads(4, 2, 2).lengths(100, 140).batch(2),
        attend("attention bias shared by batch and heads", paired(full, "qk", Wide))
            .heads(4, 2, 2)
            .lengths(70, 200)
            .batch(3),
        attend("attention bias of heads", paired(window, "hqk", Own)).heads(4, 2, 2).lengths(150, 150).batch(2),
        attend("attention bias of batch entries", paired(causal, "bqk", Own)).heads(3, 1, 1).lengths(90, 90).batch(2),
        attend("attention bias of keys", paired(causal, "bk", Own)).lengths(300, 300).batch(2).with_lse_gradient(),
        attend("attention bias of keys and heads", paired(full, "hk", Wide)).lengths(5, 300).batch(2),
        attend("attention bias of queries", paired(full, "hq", Own)).lengths(130, 90).with_lse_gradient(),
        attend("attention bias of one number", paired(causal, "", Own)).lengths(66, 66).with_lse_gradient(),
        attend("attention bias in segments", paired(causal, "qk", Own)).heads(1, 1, 1).lengths(600, 600).widths(8, 8),
        attend("attention bias with holes", paired(full, "bhqk", Holes)).lengths(70, 130).batch(2).with_lse_gradient(),
        attend(
            "attention bias with holes, soft-cap and key mask",
            SoftmaxOptions {
                soft_cap: Some(2.0),
                key_mask: Some(Extra::SomeKeys),
                bias: Some(Extra::PerHead),
                ..paired(causal, "qk", Holes)
            },
        )
        .lengths(80, 100)
        .batch(2),
        attend("mask of pairs", paired(full, "bqk", Keep)).heads(4, 2, 2).lengths(100, 260).batch(2),
        attend("mask of pairs and causal", paired(causal, "hqk", Keep)).lengths(150, 150).with_lse_gradient(),
        attend("mask of keys by pairs", paired(full, "bk", Keep)).lengths(40, 90).batch(2),
        attend("mask of queries by pairs", paired(full, "q", Keep)).lengths(40, 90),
        attend("few queries, attention bias", paired(causal, "bhqk", Own)).lengths(3, 2100).heads(4, 2, 2).batch(2),
        attend("few queries, mask of pairs", paired(full, "qk", Keep)).lengths(4, 1100).heads(2, 1, 1),
        attend("few queries, attention bias of heads", paired(full, "h", Wide)).lengths(2, 300),
        attend("attention bias and negative scale", SoftmaxOptions { scale: Some(-0.5), ..paired(full, "qk", Own) }),
        attend("attention bias without keys", paired(full, "bhqk", Own)).lengths(4, 0).with_lse_gradient(),
        attend("attention bias without queries", paired(full, "bhqk", Own)).lengths(0, 5),
    ]
}

fn sinks() -> Vec<Case> {
    use Entry::{Own, Wide};
    let (full, causal, window) = (Mask::Full, Mask::Causal, WINDOW);
    vec![
        attend("sinks", sunk(full)).lengths(100, 130).heads(4, 2, 2).batch(2).with_lse_gradient(),
        attend("sinks and causal", sunk(causal)).lengths(200, 200),
        attend("sinks in f32", SoftmaxOptions { sinks: Some(Extra::Pairs([false; 4], Wide)), ..sunk(window) })
            .lengths(150, 150)
            .with_lse_gradient(),
        attend("sinks and rows without a key", sunk(causal)).lengths(90, 50).with_lse_gradient(),
        attend("sinks and no key", sunk(full)).lengths(5, 0).with_lse_gradient(),
        attend("sinks, all keys masked", SoftmaxOptions { key_mask: Some(Extra::NoKeys), ..sunk(full) })
            .batch(2)
            .with_lse_gradient(),
        attend("sinks in a window of two keys", sunk(Mask::Window { left: Some(1), right: Some(0) })).lengths(300, 300),
        attend("few queries and sinks", sunk(causal)).lengths(3, 2100).heads(4, 2, 2).batch(2).with_lse_gradient(),
        attend(
            "sinks, bias and attention bias",
            SoftmaxOptions { bias: Some(Extra::Shared), sinks: Some(Extra::PerHead), ..paired(causal, "hqk", Own) },
        )
        .lengths(100, 120)
        .heads(4, 2, 2)
        .with_lse_gradient(),
    ]
}

fn masks() -> Vec<Case> {
    let masked = |why, mask| attend(why, SoftmaxOptions { mask, ..Default::default() });
    let streaming = |sinks, left| Mask::Streaming { sinks, left };
    let strided = |left, stride| Mask::Strided { left, stride };
    let fixed = |size, summary| Mask::Fixed { size, summary };
    let dilated = |left, right, dilation| Mask::Dilated { left, right, dilation };
    vec![
        masked("first keys and a window", streaming(4, 30)).lengths(300, 300).heads(4, 2, 2),
        masked("first keys and a window, far tiles skipped", streaming(3, 100)).lengths(700, 700).heads(1, 1, 1),
        masked("first keys and self", streaming(1, 0)).lengths(200, 260).batch(2).with_lse_gradient(),
        masked("more first keys than keys", streaming(1000, 3)).lengths(90, 60),
        masked("prefix", Mask::Prefix { len: 40 }).lengths(150, 150).heads(4, 2, 2).batch(2).with_lse_gradient(),
        masked("prefix before the first query", Mask::Prefix { len: 20 }).lengths(90, 60),
        masked("prefix of all keys", Mask::Prefix { len: 500 }).lengths(70, 90),
        masked("strided", strided(16, 16)).lengths(200, 200).heads(4, 2, 2),
        masked("strided, far apart", strided(5, 300)).lengths(900, 900).heads(1, 1, 1).widths(8, 8),
        masked("strided without near keys", strided(0, 7)).lengths(130, 190).with_lse_gradient(),
        masked("fixed", fixed(16, 3)).lengths(200, 200).heads(4, 2, 2).batch(2),
        masked("fixed, large blocks", fixed(300, 2)).lengths(900, 900).heads(1, 1, 1).widths(8, 8),
        masked("fixed, more queries than keys", fixed(7, 7)).lengths(90, 60).with_lse_gradient(),
        masked("dilated window", dilated(5, 2, 3)).lengths(150, 170),
        masked("dilated window into the past, across tiles", dilated(3, 0, 100)).lengths(500, 500).heads(1, 1, 1),
        masked("dilated window of self", dilated(0, 0, 5)).lengths(66, 66),
        attend(
            "first keys and a window, key mask, soft-cap and biases",
            SoftmaxOptions {
                mask: streaming(5, 40),
                soft_cap: Some(2.0),
                key_mask: Some(Extra::SomeKeys),
                bias: Some(Extra::PerHead),
                attention_bias: Some(Extra::Pairs([false, true, true, true], Entry::Holes)),
                sinks: Some(Extra::PerHead),
                ..Default::default()
            },
        )
        .lengths(150, 150)
        .batch(2),
        attend("strided, key mask", SoftmaxOptions { key_mask: Some(Extra::SomeKeys), ..sunk(strided(3, 9)) })
            .lengths(300, 300)
            .batch(2),
        masked("few queries, first keys and a window", streaming(4, 500)).lengths(3, 3100).heads(4, 2, 2),
        masked("few queries, strided", strided(10, 400)).lengths(2, 2100),
        masked("few queries, prefix", Mask::Prefix { len: 1500 }).lengths(5, 1300).heads(3, 1, 1),
    ]
}

fn dropouts() -> Vec<Case> {
    let dropped = |p, mask| SoftmaxOptions { mask, dropout: Some(Dropout { p, seed: 11 }), ..Default::default() };
    let masked = |options| SoftmaxOptions { key_mask: Some(Extra::SomeKeys), ..options };
    let streaming = Mask::Streaming { sinks: 3, left: 40 };
    vec![
        attend("dropout", dropped(0.1, Mask::Full)).lengths(100, 130).heads(4, 2, 2).batch(2).with_lse_gradient(),
        attend("dropout and causal", dropped(0.5, Mask::Causal)).lengths(300, 300),
        attend("dropout in a window, key mask", masked(dropped(0.3, WINDOW))).lengths(150, 150).batch(2),
        attend("dropout in a window of two keys", dropped(0.3, Mask::Window { left: Some(1), right: Some(0) }))
            .lengths(200, 203),
        attend("dropout of few keys", dropped(0.2, Mask::Full)).lengths(40, 3),
        attend("dropout and few queries", dropped(0.25, Mask::Causal)).lengths(3, 1203).heads(4, 2, 2).batch(2),
        attend("dropout and few queries in a window", dropped(0.25, Mask::Window { left: Some(700), right: Some(0) }))
            .lengths(2, 1601),
        attend(
            "dropout, sinks, attention bias, soft-cap",
            SoftmaxOptions {
                soft_cap: Some(2.0),
                sinks: Some(Extra::PerHead),
                attention_bias: Some(Extra::Pairs([false, true, true, true], Entry::Own)),
                ..masked(dropped(0.1, streaming))
            },
        )
        .lengths(120, 150)
        .batch(2)
        .with_lse_gradient(),
    ]
}
