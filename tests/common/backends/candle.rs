//! The operations on candle tensors, gradients by `backward` through candle's graph.

use std::sync::OnceLock;

use attn_kernels::candle::*;
use attn_kernels::problem::DType;
use attn_kernels::reference::Array;
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};

use super::super::buffers::Layout;
use super::super::cases::{Case, Extra, Operation};
use super::super::data::{Data, entry_dtype, kept_pairs};
use super::super::options::{Extras, With};
use super::super::reference::Results;
use super::{Backend, Pass};

/// The candle layer on the CPU or on the first GPU.
pub enum Candle {
    Cpu,
    Cuda,
}

impl Candle {
    fn device(&self) -> std::result::Result<&'static Device, &'static str> {
        static CUDA: OnceLock<std::result::Result<Device, String>> = OnceLock::new();
        match self {
            Self::Cpu => Ok(&Device::Cpu),
            Self::Cuda => {
                let open = || Device::new_cuda(0).map_err(|error| error.to_string());
                CUDA.get_or_init(open).as_ref().map_err(String::as_str)
            }
        }
    }
}

impl Backend for Candle {
    fn name(&self) -> String {
        match self {
            Self::Cpu => "candle/cpu".into(),
            Self::Cuda => "candle/cuda".into(),
        }
    }

    fn is_available(&self) -> bool {
        self.device().is_ok()
    }

    /// A state that is not causal is refused: the first piece would have to read the last one. Kernels have no attention bias
    /// and no sinks.
    fn takes(&self, case: &Case) -> bool {
        let is_there = matches!(self, Self::Cpu) || case.operation.is_on_gpu();
        is_there && ((case.prefix == 0 && !case.state_gradient) || is_causal(&case.operation))
    }

    fn run(&self, case: &Case, data: &Data, dtype: DType, pass: Pass) -> std::result::Result<Results, String> {
        let device = self.device()?;
        let run = || Call::new(case, data, dtype, pass, device)?.run(case, data, pass);
        run().map_err(|error: candle_core::Error| error.to_string())
    }
}

fn is_causal(operation: &Operation) -> bool {
    match operation {
        Operation::Linear(o) => o.causal,
        Operation::Performer(o, _) => o.causal,
        Operation::Norm(o) => o.causal,
        _ => false,
    }
}

pub fn candle_dtype(dtype: DType) -> candle_core::DType {
    match dtype {
        DType::F16 => candle_core::DType::F16,
        DType::BF16 => candle_core::DType::BF16,
        DType::F32 => candle_core::DType::F32,
        DType::F64 => candle_core::DType::F64,
        DType::U8 => candle_core::DType::U8,
        DType::Other(name) => panic!("no tensors of {name}"),
    }
}

fn to_tensor(array: &Array, rank: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let dims = &array.shape[4 - rank..];
    Tensor::from_slice(&array.data, dims, device)?.to_dtype(candle_dtype(dtype))
}

fn to_array(tensor: &Tensor, shape: [usize; 4]) -> Result<Array> {
    // candle panics on views without elements that begin after the storage's end.
    let data = match tensor.elem_count() {
        0 => Vec::new(),
        _ => tensor.to_dtype(candle_core::DType::F64)?.flatten_all()?.to_vec1()?,
    };
    assert_eq!(data.len(), shape.iter().product::<usize>());
    Ok(Array { data, shape })
}

/// A differentiable input, stored in a layout.
struct Input {
    stored: Var,
    layout: Layout,
    shape: [usize; 4],
    /// What is passed.
    tensor: Tensor,
}

impl Input {
    fn new(array: &Array, rank: usize, dtype: DType, device: &Device, layout: Layout, pass: Pass) -> Result<Self> {
        let layout = if rank < 4 && layout == Layout::Tokens { Layout::Contiguous } else { layout };
        let tensor = to_tensor(array, rank, dtype, device)?;
        let stored = match layout {
            Layout::Contiguous => tensor,
            Layout::Tokens => tensor.transpose(1, 2)?.contiguous()?,
            Layout::Gaps => {
                let gap = (Tensor::ones(&tensor.dims()[..rank - 1], tensor.dtype(), device)? * f64::NAN)?;
                let gap = gap.unsqueeze(rank - 1)?;
                Tensor::cat(&[&gap, &tensor, &gap, &gap], rank - 1)?
            }
        };
        let stored = Var::from_tensor(&stored)?;
        let root = if pass == Pass::Both { stored.as_tensor().clone() } else { stored.as_detached_tensor() };
        let mut input = Self { stored, layout, shape: array.shape, tensor: root.clone() };
        input.tensor = input.view(&root)?;
        Ok(input)
    }

    /// The part of what is stored that is the input.
    fn view(&self, stored: &Tensor) -> Result<Tensor> {
        match self.layout {
            Layout::Contiguous => Ok(stored.clone()),
            Layout::Tokens => stored.transpose(1, 2),
            Layout::Gaps => stored.narrow(stored.rank() - 1, 1, self.shape[3]),
        }
    }

    fn gradient(&self, gradients: &GradStore) -> Result<Array> {
        match gradients.get(&self.stored) {
            Some(gradient) => to_array(&self.view(gradient)?, self.shape),
            // candle drops an operand of a sum of tensors without elements from the graph.
            None if self.tensor.elem_count() == 0 => Ok(Array::zeros(self.shape)),
            None => candle_core::bail!("an input of shape {:?} has no gradient", self.shape),
        }
    }
}

/// The tensors of a case.
struct Call {
    main: [Input; 3],
    global: Option<[Input; 2]>,
    bias: Option<Input>,
    attention_bias: Option<Input>,
    sinks: Option<Input>,
    /// Per token.
    log_decay: Option<Input>,
    extras: Extras<Tensor>,
    omega: Option<Tensor>,
    state: Option<LinearState>,
    /// S and z of the state, where it has a gradient.
    sums: Option<[Var; 2]>,
    d_out: Tensor,
    d_lse: Option<Tensor>,
    /// Of S and z.
    d_state: Option<[Tensor; 2]>,
}

impl Call {
    fn new(case: &Case, data: &Data, dtype: DType, pass: Pass, device: &Device) -> Result<Self> {
        let accumulator = dtype.accumulator();
        let input = |array: &Array, rank, dtype| Input::new(array, rank, dtype, device, case.layout, pass);
        let constant = |array: &Array, rank| to_tensor(array, rank, accumulator, device);
        let bias = data.extras.bias.as_ref().map(|bias| input(bias, 2, dtype)).transpose()?;
        let dtype_of = |kind: Option<Extra>| kind.map_or(dtype, |kind| entry_dtype(kind, dtype));
        let keeps_pairs = case.operation.keeps_pairs();
        let term = data.extras.attention_bias.as_ref();
        let kept = term.filter(|_| keeps_pairs).map(|x| to_tensor(&kept_pairs(x), 4, DType::U8, device)).transpose()?;
        let attention_bias = term.filter(|_| !keeps_pairs);
        let attention_bias =
            attention_bias.map(|x| input(x, 4, dtype_of(case.operation.attention_bias()))).transpose()?;
        let sinks = data.extras.sinks.as_ref().map(|x| input(x, 1, dtype_of(case.operation.sinks()))).transpose()?;
        let log_decay = data.extras.log_decay.as_ref();
        let per_token = log_decay.filter(|_| !case.has_decay_per_head());
        let per_token = per_token.map(|g| input(g, 3, accumulator)).transpose()?;
        let per_head = log_decay.filter(|_| case.has_decay_per_head()).map(|g| constant(g, 1)).transpose()?;
        let key_mask = data.extras.key_mask.as_ref().map(|mask| to_tensor(mask, 2, DType::U8, device)).transpose()?;
        let global =
            data.global.as_ref().map(|[q, k]| Ok::<_, candle_core::Error>([input(q, 4, dtype)?, input(k, 4, dtype)?]));
        let state = data.state.as_ref().map(|state| {
            let z = constant(&state.z, 4)?.squeeze(1)?;
            let stabilizer = state.stabilizer.as_ref().map(|c| constant(c, 2)).transpose()?;
            Ok::<_, candle_core::Error>(LinearState::new(constant(&state.s, 4)?, z, stabilizer, data.position))
        });
        let state: Option<LinearState> = state.transpose()?;
        let tracks = pass == Pass::Both && case.state_gradient;
        let sums = state.as_ref().filter(|_| tracks);
        let sums =
            sums.map(|state| Ok::<_, candle_core::Error>([Var::from_tensor(state.s())?, Var::from_tensor(state.z())?]));
        let sums = sums.transpose()?;
        let tracked = |state: LinearState, [s, z]: &[Var; 2]| {
            let stabilizer = state.stabilizer().cloned();
            LinearState::new(s.as_tensor().clone(), z.as_tensor().clone(), stabilizer, state.position())
        };
        let state = state.map(|state| sums.iter().fold(state, tracked));
        let wide = |array: &Array| to_tensor(array, 4, DType::F64, device);
        let d_state = data.d_state.as_ref();
        let d_state = d_state.map(|d| Ok::<_, candle_core::Error>([wide(&d.s)?, wide(&d.z)?.squeeze(1)?]));
        Ok(Self {
            extras: Extras {
                key_mask,
                bias: bias.as_ref().map(|bias| bias.tensor.clone()),
                log_decay: per_token.as_ref().map(|g| g.tensor.clone()).or(per_head),
                attention_bias: attention_bias.as_ref().map(|x| x.tensor.clone()).or(kept),
                sinks: sinks.as_ref().map(|x| x.tensor.clone()),
            },
            attention_bias,
            sinks,
            main: [input(&data.q, 4, dtype)?, input(&data.k, 4, dtype)?, input(&data.v, 4, dtype)?],
            global: global.transpose()?,
            bias,
            log_decay: per_token,
            omega: data.omega.as_ref().map(|omega| constant(omega, 2)).transpose()?,
            state,
            sums,
            d_state: d_state.transpose()?,
            d_out: to_tensor(&data.d_out, 4, DType::F64, device)?,
            d_lse: data.d_lse.as_ref().map(|d| to_tensor(d, 4, DType::F64, device)?.squeeze(3)).transpose()?,
        })
    }

    fn run(&self, case: &Case, data: &Data, pass: Pass) -> Result<Results> {
        let mut results = Results::default();
        let (out, lse, state) = self.outputs(&case.operation)?;
        results.push("out", to_array(&out, data.d_out.shape)?);
        let [batch, heads, queries, _] = data.d_out.shape;
        if let Some(lse) = &lse {
            results.push("log_sum_exp", to_array(lse, [batch, heads, queries, 1])?);
        }
        if let Some(state) = &state {
            let [batch, heads, features, width] = *state.s().dims() else { candle_core::bail!("rank of S") };
            results.push("state.s", to_array(state.s(), [batch, heads, features, width])?);
            results.push("state.z", to_array(state.z(), [batch, 1, heads, features])?);
            results
                .push("state.stabilizer", state.stabilizer().map(|c| to_array(c, [1, 1, batch, heads])).transpose()?);
        }
        if pass == Pass::Forward {
            return Ok(results);
        }
        let wide = |x: &Tensor| x.to_dtype(candle_core::DType::F64);
        let mut loss = (wide(&out)? * &self.d_out)?.sum_all()?;
        if let (Some(lse), Some(d_lse)) = (&lse, &self.d_lse) {
            loss = (loss + (wide(lse)? * d_lse)?.sum_all()?)?;
        }
        if let (Some(state), Some([d_s, d_z])) = (&state, &self.d_state) {
            loss = ((loss + (wide(state.s())? * d_s)?.sum_all()?)? + (wide(state.z())? * d_z)?.sum_all()?)?;
        }
        let gradients = loss.backward()?;
        let [q, k, v] = self.main.each_ref().map(|input| input.gradient(&gradients));
        results.push("d_q", q?);
        results.push("d_k", k?);
        if let Some([q, k]) = &self.global {
            results.push("d_q_global", q.gradient(&gradients)?);
            results.push("d_k_global", k.gradient(&gradients)?);
        }
        results.push("d_v", v?);
        results.push("d_bias", self.bias.as_ref().map(|bias| bias.gradient(&gradients)).transpose()?);
        let gradient = |x: &Option<Input>| x.as_ref().map(|x| x.gradient(&gradients)).transpose();
        results.push("d_attention_bias", gradient(&self.attention_bias)?);
        results.push("d_sinks", gradient(&self.sinks)?);
        results.push("d_log_decay", self.log_decay.as_ref().map(|g| g.gradient(&gradients)).transpose()?);
        if let (Some([s, z]), Some(first)) = (&self.sums, &data.state) {
            let of = |sums: &Var, shape| to_array(gradients.get(sums).expect("tracked"), shape);
            results.push("d_state.s", of(s, first.s.shape)?);
            results.push("d_state.z", of(z, first.z.shape)?);
        }
        Ok(results)
    }

    /// Output, log-sum-exp, state.
    fn outputs(&self, operation: &Operation) -> Result<(Tensor, Option<Tensor>, Option<LinearState>)> {
        let [q, k, v] = self.main.each_ref().map(|input| &input.tensor);
        let (extras, state) = (self.extras.clone(), self.state.as_ref());
        let omega = || self.omega.as_ref().expect("ω of a Performer");
        let with_state = is_causal(operation);
        let stateful = |(out, state)| (out, None, Some(state));
        Ok(match operation {
            Operation::Softmax(o) => {
                let (out, lse) = softmax_attention_with_lse(q, k, v, &o.with(extras))?;
                (out, Some(lse), None)
            }
            Operation::Diag(o) => (diag_attention(q, k, v, &o.with(extras))?, None, None),
            Operation::Gau(o) => (gau_attention(q, k, v, &o.with(extras))?, None, None),
            Operation::Linear(o) if with_state => {
                stateful(linear_attention_with_state(q, k, v, &o.with(extras), state)?)
            }
            Operation::Linear(o) => (linear_attention(q, k, v, &o.with(extras))?, None, None),
            Operation::Performer(o, _) if with_state => {
                stateful(performer_attention_with_state(q, k, v, omega(), &o.with(extras), state)?)
            }
            Operation::Performer(o, _) => (performer_attention(q, k, v, omega(), &o.with(extras))?, None, None),
            Operation::Norm(o) if with_state => stateful(norm_attention_with_state(q, k, v, &o.with(extras), state)?),
            Operation::Norm(o) => (norm_attention(q, k, v, &o.with(extras))?, None, None),
            Operation::MixedChunk(o) => {
                let [q_lin, k_lin] = self.global.as_ref().expect("operands of the global branch").each_ref();
                let out = mixed_chunk_attention(q, k, &q_lin.tensor, &k_lin.tensor, v, &o.with(extras))?;
                (out, None, None)
            }
        })
    }
}
