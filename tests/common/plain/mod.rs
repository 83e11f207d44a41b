//! The plain implementation whose error sets the bound: the dense formulas of MATH in f32, with every intermediate
//! tensor rounded to the precision of the inputs' dtype, as eager tensor code stores them (but not to its range: an
//! overflow or underflow sets no bound). It is no oracle: `compare` believes its error only where that is small.

mod branch;
mod ends;
mod features;
pub mod rows;
mod weights;

use attn_kernels::gau::GauNorm;
use attn_kernels::problem::{DType, Mask};
use attn_kernels::reference::Array;
use attn_kernels::transnormer::{DiagWeight, NormScope};

use super::cases::{Case, Operation};
use super::data::{Data, slice_columns, slice_rows};
use super::reference::Results;
use branch::{Branch, Finish};
use ends::{Ends, Sums};
use features::Features;
use rows::{Round, Rows};
use weights::{Beside, Rule, Weights};

/// How often the implementation can be sampled.
pub const SAMPLES: usize = 8;

/// `x` less its last `CUT` bits, to nearest, ties to even. In samples other than 0 it is first moved half a unit up or
/// down, as its bits have it.
fn rounded<const CUT: u32, const SAMPLE: u32>(x: f32) -> f32 {
    let unit = f32::EPSILON * (1u32 << CUT) as f32;
    let hash = (x.to_bits() ^ SAMPLE.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
    let moved = match (SAMPLE, (hash ^ hash >> 15) & 0x100 == 0) {
        (0, _) => x,
        (_, true) => x * (1.0 - unit / 2.0),
        // Half a unit above 1 is no f32.
        (_, false) => x * (1.0 + if CUT == 0 { unit } else { unit / 2.0 }),
    };
    if CUT == 0 || !moved.is_finite() {
        return moved;
    }
    let bits = moved.to_bits();
    let half = (1 << (CUT.max(1) - 1)) - 1 + (bits >> CUT & 1);
    f32::from_bits((bits + half) >> CUT << CUT)
}

/// The roundings of a sample to f32 less its last `CUT` bits.
pub fn rounding<const CUT: u32>(sample: usize) -> Round {
    let samples: [Round; SAMPLES] = [
        rounded::<CUT, 0>,
        rounded::<CUT, 1>,
        rounded::<CUT, 2>,
        rounded::<CUT, 3>,
        rounded::<CUT, 4>,
        rounded::<CUT, 5>,
        rounded::<CUT, 6>,
        rounded::<CUT, 7>,
    ];
    samples[sample]
}

/// The results of `case` with storage in `dtype`. Sample 0 is the plain implementation as it is; in the others every
/// result is moved in its last place, so that they tell how far the rounding errors can go.
pub fn run(case: &Case, data: &Data, dtype: DType, sample: usize) -> Results {
    let round = match dtype {
        DType::F16 => rounding::<13>(sample),
        DType::BF16 => rounding::<16>(sample),
        _ => rounding::<0>(sample),
    };
    let joined = data.joined(case);
    if let Operation::MixedChunk(options) = &case.operation {
        let bias = joined.extras.bias.as_ref();
        return mixed_chunk(case, &joined, Weights::mixed_chunk(options, bias), round);
    }
    let (weights, finish) = weights(case, &joined);
    let new = joined.k.shape[2] - data.k.shape[2]..joined.k.shape[2];
    let ends = data
        .d_state
        .as_ref()
        .map(|d| Ends { before: new.start, d_state: Sums { s: Rows::new(&d.s), z: Rows::new(&d.z) } });
    let branch = Branch { finish, ends, ..branch(case, &joined, weights, round) };
    let (out, log_sum_exp, d) = branch.run(&Rows::new(&joined.d_out), joined.d_lse.as_ref().map(Rows::new).as_ref());
    let mut results = Results::default();
    results.push("out", out.array());
    if matches!(case.operation, Operation::Softmax(_)) {
        results.push("log_sum_exp", log_sum_exp.array());
    }
    if case.operation.has_state() {
        results.push_state(branch.state());
    }
    results.push("d_q", d.q.array());
    results.push("d_k", slice_rows(&d.k.array(), new.clone()));
    results.push("d_v", slice_rows(&d.v.array(), new.clone()));
    results.push("d_bias", d.bias.map(|bias| bias.array()));
    let d_term = d.attention_bias.filter(|_| !case.operation.keeps_pairs());
    results.push("d_attention_bias", d_term.map(|term| term.array()));
    results.push("d_sinks", d.sinks.map(|sinks| sinks.array()));
    let d_log_decay = d.log_decay.filter(|_| !case.has_decay_per_head());
    results.push("d_log_decay", d_log_decay.map(|d| slice_columns(&d.array(), new)));
    if let Some(state) = d.state.filter(|_| data.state.is_some()) {
        results.push("d_state.s", state.s.array());
        results.push("d_state.z", state.z.array());
    }
    results
}

fn mixed_chunk(case: &Case, data: &Data, [local, global]: [Weights; 2], round: Round) -> Results {
    let [q_lin, k_lin] = data.global.as_ref().expect("operands of the global branch");
    let d_out = Rows::new(&data.d_out);
    let (local_out, _, local) = branch(case, data, local, round).run(&d_out, None);
    let global = Branch { q: Rows::new(q_lin), k: Rows::new(k_lin), ..branch(case, data, global, round) };
    let (global_out, _, global) = global.run(&d_out, None);
    let sum = |x: Rows, y: Rows| {
        let (x, y) = (x.array(), y.array());
        let data = x.data.iter().zip(&y.data).map(|(x, y)| round(*x as f32 + *y as f32).into()).collect();
        Array { data, shape: x.shape }
    };
    let mut results = Results::default();
    results.push("out", sum(local_out, global_out));
    results.push("d_q", local.q.array());
    results.push("d_k", local.k.array());
    results.push("d_q_global", global.q.array());
    results.push("d_k_global", global.k.array());
    results.push("d_v", sum(local.v, global.v));
    results.push("d_bias", local.bias.map(|bias| bias.array()));
    results
}

fn branch<'a>(case: &Case, data: &'a Data, weights: Weights, round: Round) -> Branch<'a> {
    Branch {
        q: Rows::new(&data.q),
        k: Rows::new(&data.k),
        v: Rows::new(&data.v),
        key_mask: data.extras.key_mask.as_ref(),
        features: Features::new(&case.operation, data.omega.as_ref()),
        weights,
        finish: Finish::None,
        round,
        ends: None,
    }
}

fn weights(case: &Case, data: &Data) -> (Weights, Finish) {
    let d = case.width as f32;
    let bias = || data.extras.bias.as_ref().map(Rows::new);
    let linear = |causal| Weights::linear(causal, data.extras.log_decay.as_ref(), data.extras.key_mask.as_ref());
    let scaled = |scale: Option<f64>| scale.map_or(1.0 / d.sqrt(), |scale| scale as f32);
    match &case.operation {
        Operation::Softmax(o) => {
            let (scale, cap) = (scaled(o.scale), o.soft_cap.map(|cap| cap as f32));
            let [attention_bias, sinks] =
                [&data.extras.attention_bias, &data.extras.sinks].map(|x| x.as_ref().map(Rows::new));
            let beside = Beside { attention_bias, sinks, dropout: o.dropout };
            (
                Weights::Scores { mask: o.mask, scale, per_key: false, cap, bias: bias(), beside, rule: Rule::Softmax },
                Finish::Softmax,
            )
        }
        Operation::Diag(o) => {
            let mask = Mask::Blocks { size: o.block_size, causal: o.causal };
            let (rule, finish) = match o.weight {
                DiagWeight::Softmax => (Rule::Softmax, Finish::Softmax),
                DiagWeight::Relu { epsilon } => (Rule::Relu, Finish::Rms(epsilon as f32, NormScope::Head)),
            };
            let (scale, beside) = (scaled(o.scale), Beside::default());
            (Weights::Scores { mask, scale, per_key: false, cap: None, bias: None, beside, rule }, finish)
        }
        Operation::Gau(o) => {
            let (scale, finish) = match o.norm {
                GauNorm::Length => (1.0, Finish::None),
                GauNorm::LengthWidth => (1.0, Finish::PerKey(d)),
                GauNorm::RowSum { epsilon } => (1.0 / d.sqrt(), Finish::Sum(epsilon as f32)),
                GauNorm::Fixed { length } => (1.0 / length as f32, Finish::None),
            };
            let per_key = o.norm == GauNorm::Length;
            let rule = Rule::ReluSquared;
            let beside = Beside::default();
            (Weights::Scores { mask: o.mask, scale, per_key, cap: None, bias: bias(), beside, rule }, finish)
        }
        Operation::Linear(o) => (linear(o.causal), o.normalizer.map_or(Finish::None, |e| Finish::Sum(e as f32))),
        Operation::Performer(o, _) => (linear(o.causal), Finish::Sum(o.epsilon as f32)),
        Operation::Norm(o) => (linear(o.causal), Finish::Rms(o.epsilon as f32, o.norm)),
        Operation::MixedChunk(_) => unreachable!("mixed chunks have two branches"),
    }
}
