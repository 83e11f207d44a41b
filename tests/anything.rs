//! Random shapes and options, seeded: the engines agree with the reference.

use attn_kernels::gau::{GauNorm, GauOptions, GlobalNorm, MixedChunkOptions};
use attn_kernels::linear::{FeatureMap, LinearOptions};
use attn_kernels::performer::{FavorMap, PerformerOptions};
use attn_kernels::problem::{DType, Dropout, Mask};
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::{DiagOptions, DiagWeight, NormOptions, NormScope};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use crate::common::backends::{self, Backend, Pass};
use crate::common::buffers::Layout;
use crate::common::cases::{Case, Entry, Extra, Operation};
use crate::common::compare::Judge;
use crate::common::data::Data;

fn masks() -> impl Strategy<Value = Mask> {
    let window =
        (option::of(0usize..70), option::of(0usize..70)).prop_map(|(left, right)| Mask::Window { left, right });
    let blocks = (1usize..90, any::<bool>()).prop_map(|(size, causal)| Mask::Blocks { size, causal });
    let streaming = (0usize..40, 0usize..70).prop_map(|(sinks, left)| Mask::Streaming { sinks, left });
    let prefix = (0usize..150).prop_map(|len| Mask::Prefix { len });
    let strided = (0usize..40, 1usize..60).prop_map(|(left, stride)| Mask::Strided { left, stride });
    let fixed = (1usize..50, 1usize..50).prop_map(|(summary, more)| Mask::Fixed { size: summary + more, summary });
    let dilated =
        (0usize..20, 0usize..20, 1usize..9).prop_map(|(left, right, dilation)| Mask::Dilated { left, right, dilation });
    let ranges = prop_oneof![Just(Mask::Full), Just(Mask::Causal), window, blocks, prefix];
    prop_oneof![ranges, streaming, strided, fixed, dilated]
}

fn key_masks() -> impl Strategy<Value = Option<Extra>> {
    select(vec![None, None, Some(Extra::SomeKeys), Some(Extra::NoKeys)])
}

fn biases() -> impl Strategy<Value = Option<Extra>> {
    select(vec![None, Some(Extra::Shared), Some(Extra::PerHead)])
}

fn quadratic() -> impl Strategy<Value = Operation> {
    // A number that all keys have in common cancels: what is left of its gradient has no tolerance.
    let pairs = (any::<[bool; 3]>(), select(vec![Entry::Own, Entry::Wide, Entry::Holes, Entry::Keep]));
    let pairs = pairs.prop_map(|([batch, heads, queries], entry)| Extra::Pairs([batch, heads, queries, true], entry));
    let dropouts = option::of((0.0..0.7, any::<u64>()).prop_map(|(p, seed)| Dropout { p, seed }));
    let beside = (option::of(pairs), biases(), dropouts);
    let softmax = (masks(), option::of(-1.0..1.0), option::of(0.5..20.0), key_masks(), biases(), beside).prop_map(
        |(mask, scale, soft_cap, key_mask, bias, (attention_bias, sinks, dropout))| {
            let plain = SoftmaxOptions { mask, scale, soft_cap, key_mask, bias, ..Default::default() };
            Operation::Softmax(SoftmaxOptions { attention_bias, sinks, dropout, ..plain })
        },
    );
    let weights = select(vec![DiagWeight::Softmax, DiagWeight::Relu { epsilon: 0.1 }]);
    let diag = (1usize..90, any::<bool>(), weights, key_masks()).prop_map(|(block_size, causal, weight, key_mask)| {
        Operation::Diag(DiagOptions { block_size, causal, weight, scale: None, key_mask, sequences: None })
    });
    let norms = select(vec![
        GauNorm::Length,
        GauNorm::LengthWidth,
        GauNorm::RowSum { epsilon: 0.01 },
        GauNorm::Fixed { length: 16.0 },
    ]);
    let gau = (masks(), norms, key_masks(), biases()).prop_map(|(mask, norm, key_mask, bias)| {
        Operation::Gau(GauOptions { mask, norm, key_mask, bias, sequences: None })
    });
    prop_oneof![softmax, diag, gau]
}

fn linear() -> impl Strategy<Value = Operation> {
    use FeatureMap::*;
    let maps = || select(vec![Identity, EluPlusOne, Relu, ReluSquared, Silu, Exp, Softmax, Taylor, Cosine]);
    let decays =
        || (any::<bool>(), select(vec![None, Some(Extra::PerHead), Some(Extra::PerToken), Some(Extra::Strong)]));
    // Maps that may be negative are not normalised: a sum near 0 has no tolerance.
    let linear =
        (maps(), decays(), any::<bool>(), key_masks()).prop_map(|(map, (causal, decay), normalized, key_mask)| {
            let normalized = normalized && !matches!(map, Identity | Silu | Cosine);
            let (normalizer, log_decay) = (normalized.then_some(0.01), decay.filter(|_| causal));
            Operation::Linear(LinearOptions { map, causal, normalizer, log_decay, key_mask, sequences: None })
        });
    let scopes = select(vec![NormScope::Head, NormScope::AllHeads]);
    let norm = (maps(), decays(), scopes, key_masks()).prop_map(|(map, (causal, decay), norm, key_mask)| {
        let log_decay = decay.filter(|_| causal);
        Operation::Norm(NormOptions { map, causal, epsilon: 0.1, norm, log_decay, key_mask, sequences: None })
    });
    let favor = select(vec![FavorMap::Positive, FavorMap::Hyperbolic, FavorMap::Relu]);
    let performer = (favor, any::<bool>(), key_masks(), 1usize..50).prop_map(|(map, causal, key_mask, directions)| {
        Operation::Performer(PerformerOptions { map, causal, epsilon: 1e-3, key_mask, sequences: None }, directions)
    });
    prop_oneof![linear, norm, performer]
}

fn mixed_chunk() -> impl Strategy<Value = Operation> {
    let norms = select(vec![GlobalNorm::Mean, GlobalNorm::Chunk, GlobalNorm::Length]);
    (1usize..90, any::<bool>(), norms, key_masks(), biases()).prop_map(
        |(chunk_size, causal, global_norm, key_mask, bias)| {
            Operation::MixedChunk(MixedChunkOptions {
                chunk_size,
                causal,
                scale: None,
                global_norm,
                key_mask,
                bias,
                sequences: None,
            })
        },
    )
}

/// A case around an operation: `groups` query heads to a key head.
fn cases(operations: impl Strategy<Value = Operation>) -> impl Strategy<Value = Case> {
    let sizes = (1usize..3, 1usize..4, 1usize..4, 0usize..150, 0usize..150);
    let widths = (1usize..48, 1usize..80);
    let prefix = select(vec![0usize, 0, 1, 70]);
    (operations, sizes, widths, select(Layout::ALL.to_vec()), prefix).prop_map(
        |(operation, (batch, key_heads, groups, queries, keys), (width, value_width), layout, prefix)| {
            let chunked = matches!(&operation, Operation::MixedChunk(o) if o.causal);
            let keys = if chunked { queries } else { keys };
            let width = if matches!(
                &operation,
                Operation::Linear(LinearOptions { map: FeatureMap::Taylor, .. })
                    | Operation::Norm(NormOptions { map: FeatureMap::Taylor, .. })
            ) {
                width.min(9)
            } else {
                width
            };
            let prefix = if operation.has_state() && queries <= keys { prefix } else { 0 };
            let case = Case::new("anything", operation)
                .batch(batch)
                .heads(key_heads * groups, key_heads, key_heads)
                .lengths(queries, keys)
                .widths(width, value_width)
                .after(prefix);
            Case { layout, ..case }
        },
    )
}

fn check(operations: impl Strategy<Value = Operation>) {
    let config = Config { cases: 60, rng_seed: RngSeed::Fixed(2), failure_persistence: None, ..Config::default() };
    let run = |case: Case| {
        let data = Data::new(&case, DType::F32);
        let results = backends::default().run(&case, &data, DType::F32, Pass::Both).map_err(TestCaseError::fail)?;
        let complaints = Judge::new(&case, &data, DType::F32).complaints(&results);
        prop_assert!(complaints.is_empty(), "{case}: {complaints:?}");
        Ok(())
    };
    if let Err(error) = TestRunner::new(config).run(&cases(operations), run) {
        panic!("{error}");
    }
}

#[test]
fn quadratic_family() {
    check(quadratic());
}

#[test]
fn linear_family() {
    check(linear());
}

#[test]
fn mixed_chunks() {
    check(mixed_chunk());
}
