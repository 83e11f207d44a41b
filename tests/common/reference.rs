//! What the f64 reference says of a case.

use attn_kernels::reference::{self, Array, Gradients, MixedChunkGradients, State, StateGradient};

use super::cases::{Case, Operation};
use super::data::{Data, Prefix, slice_columns, slice_rows};
use super::options::{Extras, With};

/// Outputs and gradients by name.
#[derive(Debug, Clone, Default)]
pub struct Results(pub Vec<(&'static str, Array)>);

impl Results {
    pub fn push(&mut self, name: &'static str, array: impl Into<Option<Array>>) {
        self.0.extend(array.into().map(|array| (name, array)));
    }

    pub fn get(&self, name: &str) -> Option<&Array> {
        self.0.iter().find(|(other, _)| *other == name).map(|(_, array)| array)
    }

    pub fn out(&self) -> &Array {
        self.get("out").expect("every run has an output")
    }

    /// The final state, where the operation has one.
    pub fn state(&self) -> Option<State> {
        let s = self.get("state.s")?.clone();
        Some(State { s, z: self.get("state.z")?.clone(), stabilizer: self.get("state.stabilizer").cloned() })
    }

    pub fn push_state(&mut self, state: State) {
        self.push("state.s", state.s);
        self.push("state.z", state.z);
        self.push("state.stabilizer", state.stabilizer);
    }

    fn push_gradients(&mut self, gradients: Gradients) {
        self.push("d_q", gradients.q);
        self.push("d_k", gradients.k);
        self.push("d_v", gradients.v);
        self.push("d_bias", gradients.bias);
        self.push("d_attention_bias", gradients.attention_bias);
        self.push("d_sinks", gradients.sinks);
        self.push("d_log_decay", gradients.log_decay);
    }

    /// Through the states at both ends.
    fn push_gradients_with_state(&mut self, case: &Case, data: &Data) {
        let (mut gradients, d_state) = gradients_with_state(case, data);
        gradients.log_decay = gradients.log_decay.filter(|_| !case.has_decay_per_head());
        self.push_gradients(gradients);
        if data.state.is_some() {
            self.push("d_state.s", d_state.s);
            self.push("d_state.z", d_state.z);
        }
    }

    fn push_mixed_gradients(&mut self, gradients: MixedChunkGradients) {
        self.push("d_q", gradients.q_quad);
        self.push("d_k", gradients.k_quad);
        self.push("d_q_global", gradients.q_lin);
        self.push("d_k_global", gradients.k_lin);
        self.push("d_v", gradients.v);
        self.push("d_bias", gradients.bias);
    }
}

/// Whether a result is in the accumulator's dtype whatever that of the inputs.
pub fn is_accumulated(name: &str) -> bool {
    name == "log_sum_exp" || name == "d_log_decay" || name.starts_with("state.") || name.starts_with("d_state.")
}

pub fn expected(case: &Case, data: &Data) -> Results {
    let Data { q, k, v, extras, d_out, .. } = data;
    let mut results = Results::default();
    match &case.operation {
        Operation::Softmax(options) => {
            let options = options.with(extras.clone());
            let output = reference::softmax_attention(q, k, v, &options);
            results.push("out", output.out);
            results.push("log_sum_exp", output.log_sum_exp);
            let d_lse = data.d_lse.as_ref();
            let mut gradients = reference::softmax_attention_backward(q, k, v, &options, d_out, d_lse);
            gradients.attention_bias = gradients.attention_bias.filter(|_| !case.operation.keeps_pairs());
            results.push_gradients(gradients);
        }
        Operation::Diag(options) => {
            let options = options.with(extras.clone());
            results.push("out", reference::diag_attention(q, k, v, &options));
            results.push_gradients(reference::diag_attention_backward(q, k, v, &options, d_out));
        }
        Operation::Gau(options) => {
            let options = options.with(extras.clone());
            results.push("out", reference::gau_attention(q, k, v, &options));
            results.push_gradients(reference::gau_attention_backward(q, k, v, &options, d_out));
        }
        Operation::MixedChunk(options) => {
            let options = options.with(extras.clone());
            let [q_lin, k_lin] = data.global.as_ref().expect("operands of the global branch");
            results.push("out", reference::mixed_chunk_attention(q, k, q_lin, k_lin, v, &options));
            let gradients = reference::mixed_chunk_attention_backward(q, k, q_lin, k_lin, v, &options, d_out);
            results.push_mixed_gradients(gradients);
        }
        Operation::Linear(_) | Operation::Performer(..) | Operation::Norm(_) => {
            let recurrent = with_state(case, data, data.state.as_ref());
            results.push("out", if data.state.is_some() { recurrent.0 } else { dense(case, data) });
            results.push_state(recurrent.1);
            match &data.d_state {
                None => results.push_gradients(linear_gradients(case, data)),
                Some(_) => results.push_gradients_with_state(case, data),
            }
        }
    }
    results
}

/// The state after the tokens of a prefix.
pub fn state_after(case: &Case, prefix: &Prefix, omega: Option<&Array>) -> State {
    let [batch, _, _, width] = prefix.k.shape;
    let q = Array::zeros([batch, case.heads[0], 0, width]);
    let extras = Extras { log_decay: prefix.log_decay.clone(), ..Extras::default() };
    recurrent(&case.operation, [&q, &prefix.k, &prefix.v], extras, omega, None).1
}

/// The recurrent form after `state`.
pub fn with_state(case: &Case, data: &Data, state: Option<&State>) -> (Array, State) {
    recurrent(&case.operation, [&data.q, &data.k, &data.v], data.extras.clone(), data.omega.as_ref(), state)
}

fn recurrent(
    operation: &Operation,
    [q, k, v]: [&Array; 3],
    extras: Extras<Array>,
    omega: Option<&Array>,
    state: Option<&State>,
) -> (Array, State) {
    match operation {
        Operation::Linear(options) => reference::linear_attention_with_state(q, k, v, &options.with(extras), state),
        Operation::Norm(options) => reference::norm_attention_with_state(q, k, v, &options.with(extras), state),
        Operation::Performer(options, _) => {
            let omega = omega.expect("ω of a Performer");
            reference::performer_attention_with_state(q, k, v, omega, &options.with(extras), state)
        }
        _ => panic!("{} has no state", operation.name()),
    }
}

/// The gradients of the recurrent form, a gradient of the last state included, and that of the first state.
pub fn gradients_with_state(case: &Case, data: &Data) -> (Gradients, StateGradient) {
    let Data { q, k, v, extras, d_out, state, d_state, .. } = data;
    let (extras, state, d_state) = (extras.clone(), state.as_ref(), d_state.as_ref());
    match &case.operation {
        Operation::Linear(options) => {
            let options = options.with(extras);
            reference::linear_attention_with_state_backward(q, k, v, &options, state, (d_out, d_state))
        }
        Operation::Norm(options) => {
            let options = options.with(extras);
            reference::norm_attention_with_state_backward(q, k, v, &options, state, (d_out, d_state))
        }
        Operation::Performer(options, _) => {
            let (omega, options) = (data.omega.as_ref().expect("ω of a Performer"), options.with(extras));
            reference::performer_attention_with_state_backward(q, k, v, omega, &options, state, (d_out, d_state))
        }
        operation => panic!("{} has no state", operation.name()),
    }
}

fn dense(case: &Case, data: &Data) -> Array {
    let Data { q, k, v, extras, .. } = data;
    match &case.operation {
        Operation::Linear(options) => reference::linear_attention(q, k, v, &options.with(extras.clone())),
        Operation::Norm(options) => reference::norm_attention(q, k, v, &options.with(extras.clone())),
        Operation::Performer(options, _) => {
            let omega = data.omega.as_ref().expect("ω of a Performer");
            reference::performer_attention(q, k, v, omega, &options.with(extras.clone()))
        }
        operation => panic!("{} is not of the linear family", operation.name()),
    }
}

/// Gradients with the state held fixed: those of the tokens behind the state and the new ones in one sequence.
fn linear_gradients(case: &Case, data: &Data) -> Gradients {
    let joined = if data.prefix.is_some() { data.joined(case) } else { data.clone() };
    let Data { q, k, v, extras, d_out, .. } = &joined;
    let mut gradients = match &case.operation {
        Operation::Linear(options) => {
            reference::linear_attention_backward(q, k, v, &options.with(extras.clone()), d_out)
        }
        Operation::Norm(options) => reference::norm_attention_backward(q, k, v, &options.with(extras.clone()), d_out),
        Operation::Performer(options, _) => {
            let omega = data.omega.as_ref().expect("ω of a Performer");
            reference::performer_attention_backward(q, k, v, omega, &options.with(extras.clone()), d_out)
        }
        operation => panic!("{} is not of the linear family", operation.name()),
    };
    if let Some(prefix) = &data.prefix {
        let (before, all) = (prefix.k.shape[2], k.shape[2]);
        gradients.k = slice_rows(&gradients.k, before..all);
        gradients.v = slice_rows(&gradients.v, before..all);
        gradients.log_decay = gradients.log_decay.map(|d| slice_columns(&d, before..all));
    }
    if case.has_decay_per_head() {
        gradients.log_decay = None;
    }
    gradients
}
