//! The engines' outputs do not depend on which of them are asked for, nor on the dtype that they are asked for in.

use attn_kernels::cpu::linear::{self, LinearInputs, LinearOutputs, StateMut};
use attn_kernels::cpu::quadratic::{self, QuadraticInputs};
use attn_kernels::linear::LinearOptions;
use attn_kernels::problem::{DType, Mask};
use attn_kernels::reference::Array;
use attn_kernels::softmax::SoftmaxOptions;
use attn_kernels::transnormer::{NormOptions, NormScope};

use crate::common::buffers::{Buffer, Layout, Operand, round};
use crate::common::random::Random;

const SHAPE: [usize; 4] = [2, 3, 150, 20];
const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn operands(dtype: DType) -> [Operand; 3] {
    let mut random = Random::new("asked for");
    [(); 3].map(|()| Operand::new(&random.array(SHAPE, 1.0), 4, dtype, Layout::Contiguous))
}

/// Whether `wide`, rounded to `dtype`, is `narrow`.
fn assert_rounds_to(wide: &Buffer, narrow: &Buffer, dtype: DType) {
    let [wide, narrow]: [Array; 2] = [wide, narrow].map(|buffer| buffer.array(SHAPE));
    for (i, (&wide, &narrow)) in wide.data.iter().zip(&narrow.data).enumerate() {
        assert_eq!(round(dtype, wide), narrow, "{dtype}, element {i}: {wide}");
    }
}

#[test]
fn quadratic() {
    for dtype in DTYPES {
        let operands = operands(dtype);
        let [q, k, v] = operands.each_ref().map(Operand::view);
        let options = SoftmaxOptions { mask: Mask::Causal, ..Default::default() };
        let problem = options.problem("softmax_attention", &q, &k, &v).unwrap();
        let inputs = QuadraticInputs::new(q, k, v);
        let run = |out_dtype, with_statistic: bool| {
            let mut out = Buffer::poisoned(out_dtype, problem.output_len());
            let mut statistic = Buffer::poisoned(dtype.accumulator(), problem.statistic_len());
            let statistic = with_statistic.then(|| statistic.slice_mut());
            quadratic::forward(&problem, &inputs, out.slice_mut(), statistic).unwrap();
            out
        };
        let out = run(dtype, true);
        assert_rounds_to(&run(dtype, false), &out, dtype);
        assert_rounds_to(&run(dtype.accumulator(), false), &out, dtype);
    }
}

#[test]
fn linear() {
    for (dtype, together) in DTYPES.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
        let operands = operands(dtype);
        let [q, k, v] = operands.each_ref().map(Operand::view);
        let all_heads = NormOptions { norm: NormScope::AllHeads, causal: true, ..Default::default() };
        let problem = if together {
            all_heads.problem("norm_attention", &q, &k, &v).unwrap()
        } else {
            LinearOptions { causal: true, ..Default::default() }.problem("linear_attention", &q, &k, &v).unwrap()
        };
        let inputs = LinearInputs { q, k, v, key_mask: None, log_decay: None, omega: None, state: None };
        let run = |out_dtype, with_statistic: bool, with_state: bool| {
            let sums = |len| Buffer::poisoned(dtype.accumulator(), len);
            let shapes = problem.state_shapes();
            let mut out = Buffer::poisoned(out_dtype, problem.output_len());
            let mut statistic = sums(problem.statistic_len());
            let (mut s, mut z) = (sums(shapes.s.iter().product()), sums(shapes.z.iter().product()));
            let state = StateMut { s: s.slice_mut(), z: z.slice_mut(), stabilizer: None };
            let statistic = with_statistic.then(|| statistic.slice_mut());
            let outputs = LinearOutputs { out: out.slice_mut(), statistic, state: with_state.then_some(state) };
            linear::forward(&problem, &inputs, outputs).unwrap();
            out
        };
        let out = run(dtype, true, true);
        for (with_statistic, with_state) in [(false, true), (true, false), (false, false)] {
            assert_rounds_to(&run(dtype, with_statistic, with_state), &out, dtype);
        }
        assert_rounds_to(&run(dtype.accumulator(), true, true), &out, dtype);
    }
}
