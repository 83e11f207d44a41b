//! The table on the CPU engines: outputs stay untouched.

use attn_kernels::Result;
use attn_kernels::cpu::linear::{self, LinearInputs, LinearOutputs, StateMut, StateView};
use attn_kernels::cpu::quadratic::{self, QuadraticInputs};
use attn_kernels::problem::{DType, Linear, Quadratic, View};

use super::call::{BATCH, Call, HEADS, LENGTH, Tensor, VALUE_WIDTH};
use crate::common::buffers::Buffer;
use crate::common::cases::Operation;
use crate::common::options::{Extras, With};

/// A tensor in memory.
struct Stored<'a>(&'a Tensor, Buffer);

impl<'a> Stored<'a> {
    fn new(tensor: &'a Tensor) -> Self {
        Self(tensor, Buffer::filled(tensor.dtype, tensor.dims.iter().product(), tensor.fill))
    }

    fn view(&self) -> View<'_> {
        View::contiguous(self.1.slice_from(0), &self.0.dims).unwrap()
    }
}

fn view<'a>(stored: &'a Option<Stored<'_>>) -> Option<View<'a>> {
    stored.as_ref().map(Stored::view)
}

/// The tensors of a call.
struct Operands<'a> {
    main: [Stored<'a>; 3],
    global: [Stored<'a>; 2],
    extras: Extras<Stored<'a>>,
    omega: Stored<'a>,
    state: Option<[Stored<'a>; 2]>,
    stabilizer: Option<Stored<'a>>,
}

impl<'a> Operands<'a> {
    fn new(call: &'a Call) -> Self {
        let optional = |tensor: &'a Option<Tensor>| tensor.as_ref().map(Stored::new);
        Self {
            main: [&call.q, &call.k, &call.v].map(Stored::new),
            global: [&call.q_lin, &call.k_lin].map(Stored::new),
            extras: Extras {
                key_mask: optional(&call.key_mask),
                bias: optional(&call.bias),
                log_decay: optional(&call.log_decay),
                attention_bias: optional(&call.attention_bias),
                sinks: optional(&call.sinks),
            },
            omega: Stored::new(&call.omega),
            state: call.state.as_ref().map(|state| state.each_ref().map(Stored::new)),
            stabilizer: optional(&call.stabilizer),
        }
    }

    fn extras(&self) -> Extras<View<'_>> {
        self.extras.as_ref().map(Stored::view)
    }

    /// Describes and computes, forward, into output, S, z and stabiliser.
    fn run(&self, operation: &Operation, outputs: &mut [Buffer; 4]) -> Result<()> {
        let [q, k, v] = &self.main.each_ref().map(Stored::view);
        let (extras, name) = (self.extras(), operation.name());
        match operation {
            Operation::Softmax(o) => self.quadratic(&o.with(extras).problem(name, q, k, v)?, outputs),
            Operation::Diag(o) => self.quadratic(&o.with(extras).problem(name, q, k, v)?, outputs),
            Operation::Gau(o) => self.quadratic(&o.with(extras).problem(name, q, k, v)?, outputs),
            Operation::Linear(o) => self.linear(&o.with(extras).problem(name, q, k, v)?, [q, k], None, outputs),
            Operation::Norm(o) => self.linear(&o.with(extras).problem(name, q, k, v)?, [q, k], None, outputs),
            Operation::Performer(o, _) => {
                let omega = self.omega.view();
                self.linear(&o.with(extras).problem(name, q, k, v, &omega)?, [q, k], Some(omega), outputs)
            }
            Operation::MixedChunk(o) => {
                let options = o.with(extras);
                let local = options.local_problem(name, q, k, v)?;
                let [q_lin, k_lin] = &self.global.each_ref().map(Stored::view);
                let global = options.global_problem(name, q_lin, k_lin, v)?;
                self.quadratic(&local, outputs)?;
                self.linear(&global, [q_lin, k_lin], None, outputs)
            }
        }
    }

    fn quadratic(&self, problem: &Quadratic, outputs: &mut [Buffer; 4]) -> Result<()> {
        let [q, k, v] = self.main.each_ref().map(Stored::view);
        let Extras { key_mask, bias, attention_bias, sinks, .. } = self.extras();
        let inputs = QuadraticInputs { q, k, v, key_mask, bias, attention_bias, sinks };
        quadratic::forward(problem, &inputs, outputs[0].slice_mut(), None)
    }

    fn linear(
        &self,
        problem: &Linear,
        [&q, &k]: [&View<'_>; 2],
        omega: Option<View<'_>>,
        outputs: &mut [Buffer; 4],
    ) -> Result<()> {
        let Extras { key_mask, log_decay, .. } = self.extras();
        let stabilizer = view(&self.stabilizer);
        let state = self.state.as_ref().map(|[s, z]| StateView { s: s.view(), z: z.view(), stabilizer, position: 3 });
        let inputs = LinearInputs { q, k, v: self.main[2].view(), key_mask, log_decay, omega, state };
        let shapes = problem.state_shapes();
        let [out, s, z, c] = outputs;
        *s = Buffer::poisoned(DType::F32, shapes.s.iter().product());
        *z = Buffer::poisoned(DType::F32, shapes.z.iter().product());
        let stabilizer = shapes.stabilizer.is_some().then(|| c.slice_mut());
        let state = StateMut { s: s.slice_mut(), z: z.slice_mut(), stabilizer };
        let out = out.slice_mut();
        linear::forward(problem, &inputs, LinearOutputs { out, statistic: None, state: Some(state) })
    }
}

fn outputs() -> [Buffer; 4] {
    let lens = [BATCH * HEADS * LENGTH * VALUE_WIDTH, 0, 0, BATCH * super::call::KEY_HEADS];
    lens.map(|len| Buffer::poisoned(DType::F32, len))
}

#[test]
fn refused() {
    super::check(|call| {
        let mut outputs = outputs();
        let error = match Operands::new(call).run(&call.operation, &mut outputs) {
            Ok(()) => return Err("was computed".into()),
            Err(error) => error.to_string(),
        };
        let touched = outputs.iter().any(|buffer| (0..buffer.len()).any(|i| !buffer.get(i).is_nan()));
        if touched { Err(format!("wrote outputs before saying: {error}")) } else { Ok(error) }
    });
}

#[test]
fn baselines_are_accepted() {
    super::check_baselines(|call| {
        let mut outputs = outputs();
        Operands::new(call).run(&call.operation, &mut outputs).map_err(|error| error.to_string())?;
        let written = (0..outputs[0].len()).all(|i| outputs[0].get(i).is_finite());
        if written { Ok(()) } else { Err("did not write its output".into()) }
    });
}
