//! Cases on the CPU.

use attn_kernels::cpu::{DeltaAttention, DeltaAttentionGradients, Element, delta, gated_linear, generalized_delta};
use attn_kernels::problem::{DType, RankOne};
use attn_kernels::reference::Array;
use half::{bf16, f16};

use super::case::{Case, Data, push_rank_one};
use crate::common::buffers::{Layout, Operand};
use crate::common::reference::Results;

/// A number of one of the dtypes.
pub trait Float: Element {
    fn of(x: f64) -> Self;
    fn wide(self) -> f64;
}

macro_rules! floats {
    ($($float:ident, |$x:ident| $of:expr;)*) => { $(
        impl Float for $float {
            fn of($x: f64) -> Self {
                $of
            }
            fn wide(self) -> f64 {
                self.into()
            }
        }
    )* };
}

floats! {
    f16, |x| f16::from_f32(x as f32);
    bf16, |x| bf16::from_f32(x as f32);
    f32, |x| x as f32;
    f64, |x| x;
}

fn array<T: Float>(data: Vec<T>, shape: [usize; 4]) -> Array {
    assert_eq!(data.len(), shape.iter().product::<usize>());
    Array { data: data.into_iter().map(T::wide).collect(), shape }
}

fn numbers<T: Float>(x: &Option<Array>) -> Option<Vec<T>> {
    x.as_ref().map(|x| x.data.iter().map(|&x| T::of(x)).collect())
}

/// Outputs, last state and gradients.
pub fn run<T: Float>(case: &Case, data: &Data, layout: Layout) -> Results
where
    T::Sum: Float,
{
    let sums = <T::Sum as Element>::DTYPE;
    let rows = |x: &Array| Operand::new(x, 4, T::DTYPE, layout);
    let weights = |x: &Option<Array>, rank| x.as_ref().map(|x| Operand::new(x, rank, sums, layout));
    let [q, k, v] = [&data.q, &data.k, &data.v].map(rows);
    let rank_one = match &data.rank_one {
        RankOne::None => RankOne::None,
        RankOne::Rule { beta } => RankOne::Rule { beta: Operand::new(beta, 3, sums, layout) },
        RankOne::Free { a, b } => RankOne::Free { a: rows(a), b: rows(b) },
    };
    let (log_decay, bonus) = (weights(&data.log_decay, case.decay.rank()), weights(&data.bonus, 2));
    let key_mask = data.key_mask.as_ref().map(|mask| Operand::new(mask, 2, DType::U8, layout));
    let [log_decay, bonus, key_mask] = [&log_decay, &bonus, &key_mask].map(|x| x.as_ref().map(Operand::view));
    let options = case.options(log_decay, bonus, key_mask);
    let (state, d_state) = (numbers::<T::Sum>(&data.state), numbers::<T::Sum>(&data.d_state));
    let (q, k, v, state) = (q.view(), k.view(), v.view(), state.as_deref());
    let attention: DeltaAttention<'_, T> = match &rank_one {
        RankOne::None => gated_linear(q, k, v, &options, state),
        RankOne::Rule { beta } => delta(q, k, v, beta.view(), &options, state),
        RankOne::Free { a, b } => generalized_delta(q, k, v, [a.view(), b.view()], &options, state),
    }
    .unwrap();
    let d_out: Vec<T> = data.d_out.data.iter().map(|&x| T::of(x)).collect();
    let gradients = attention.backward(&d_out, d_state.as_deref()).unwrap();
    results(case, data, attention, gradients)
}

fn results<T: Float>(
    case: &Case,
    data: &Data,
    attention: DeltaAttention<'_, T>,
    gradients: DeltaAttentionGradients<T>,
) -> Results
where
    T::Sum: Float,
{
    let [d, e] = case.widths;
    let state = [case.batch, case.state_heads(), d, e];
    let mut results = Results::default();
    results.push("out", array(attention.out, data.d_out.shape));
    results.push("state", array(attention.state, state));
    results.push("d_q", array(gradients.q, data.q.shape));
    results.push("d_k", array(gradients.k, data.k.shape));
    results.push("d_v", array(gradients.v, data.v.shape));
    match &data.rank_one {
        RankOne::None => {}
        RankOne::Rule { beta } => {
            let beta = array(gradients.beta.expect("a gradient of β"), beta.shape);
            push_rank_one(&mut results, RankOne::Rule { beta });
        }
        RankOne::Free { a, b } => {
            let [d_a, d_b] = gradients.a_and_b.expect("gradients of a and b");
            push_rank_one(&mut results, RankOne::Free { a: array(d_a, a.shape), b: array(d_b, b.shape) });
        }
    }
    let like = |x: &Option<Array>| x.as_ref().map(|x| x.shape).unwrap_or_default();
    results.push("d_log_decay", gradients.log_decay.map(|x| array(x, like(&data.log_decay))));
    results.push("d_bonus", gradients.bonus.map(|x| array(x, like(&data.bonus))));
    results.push("d_state", gradients.state.map(|x| array(x, state)));
    results
}
