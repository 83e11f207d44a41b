//! Our side of the peer benchmarks as candle's users run it: tensors, a graph of gradients and the allocator that the README
//! advises. A script starts it once for a number of threads (`RAYON_NUM_THREADS`) and asks for one timing after the other.
//!
//! Every line in is a JSON object, answered by one line of JSON:
//!
//! * `{"case": {…}}`, the fields of [`Case`], prepares a case; answered by `{}`.
//! * `{"operations": {…}}` prepares softmax attention as operations of candle's tensors instead of one call.
//! * `{"sample": n}` runs it n times; answered by `{"seconds": [s]}`, the average of the runs.
//!
//! `fwdbwd` is the forward pass, Σ out ⊙ d_out and its backward pass. A request that cannot be met is answered by
//! `{"error": "…"}`.

#[path = "peer_bench/case.rs"]
#[allow(dead_code)]
mod case;
mod common;
#[path = "peer_bench/lines.rs"]
mod lines;

use std::time::Instant;

use attn_kernels::{LinearOptions, linear_attention, performer_attention, softmax_attention};
use candle_core::{Device, Result, Tensor, Var};
use case::{Case, Passes};
use common::tensor::{Buffer, Tensor as Array};
use common::{Call, Mechanism, mechanism, tensor_operations};
use lines::{Next, answer, fail, read, reply};
use serde::Deserialize;
use serde_json::json;

/// Tensors are large: the system's allocator maps and clears their memory anew each time, this one keeps it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Request {
    Case(Case),
    Operations(Case),
    Sample(usize),
}

fn main() -> std::io::Result<()> {
    let mut next = read()?;
    while let Some(request) = next {
        next = match request {
            Ok(Request::Case(case)) => serve(&case, false)?,
            Ok(Request::Operations(case)) => serve(&case, true)?,
            Ok(Request::Sample(_)) => fail("needs a case before")?,
            Err(message) => fail(&message)?,
        };
    }
    Ok(())
}

/// Answers the requests about a case; returns the first other request.
fn serve(case: &Case, as_operations: bool) -> std::io::Result<Next<Request>> {
    let prepared = match Prepared::new(case, as_operations) {
        Ok(prepared) => prepared,
        Err(message) => return fail(&message),
    };
    let mut next = answer(&json!({}))?;
    while let Some(Ok(Request::Sample(repeats))) = next {
        let seconds = prepared.seconds(repeats.max(1)).map_err(|error| error.to_string());
        next = answer(&reply(seconds.map(|seconds| json!({ "seconds": [seconds] }))))?;
    }
    Ok(next)
}

struct Prepared<'c> {
    case: &'c Case,
    as_operations: bool,
    mechanism: Mechanism,
    causal: bool,
    /// q, k and v
    operands: [Var; 3],
    d_out: Tensor,
    log_decay: Option<Tensor>,
    omega: Option<Tensor>,
}

fn tensor(array: &Array) -> Result<Tensor> {
    let (dims, device) = (&*array.dims, &Device::Cpu);
    match &array.data {
        Buffer::F32(x) => Tensor::from_slice(x, dims, device),
        Buffer::Bf16(x) => Tensor::from_slice(x, dims, device),
        Buffer::F16(x) => Tensor::from_slice(x, dims, device),
        Buffer::F64(x) => Tensor::from_slice(x, dims, device),
    }
}

impl<'c> Prepared<'c> {
    fn new(case: &'c Case, as_operations: bool) -> std::result::Result<Self, String> {
        let inputs = case.inputs()?;
        let call = case.call(&inputs)?;
        let is_known = matches!(call.mechanism, Mechanism::Softmax | Mechanism::Linear | Mechanism::Performer);
        let is_served = if as_operations { call.mechanism == Mechanism::Softmax } else { is_known };
        if !is_served || case.pass == Passes::Bwd {
            return Err("needs softmax, linear or performer (as operations: softmax), and fwd or fwdbwd".into());
        }
        Self::from_call(case, as_operations, &call).map_err(|error| error.to_string())
    }

    fn from_call(case: &'c Case, as_operations: bool, call: &Call<'_>) -> Result<Self> {
        let inputs = call.inputs;
        let variable = |array| Var::from_tensor(&tensor(array)?);
        Ok(Self {
            case,
            as_operations,
            mechanism: call.mechanism,
            causal: call.causal,
            operands: [variable(&inputs.q)?, variable(&inputs.k)?, variable(&inputs.v)?],
            d_out: tensor(&inputs.d_out)?,
            log_decay: call.log_decay.as_ref().map(tensor).transpose()?,
            omega: call.omega.as_ref().map(tensor).transpose()?,
        })
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        match (self.mechanism, &self.case.linear, &self.omega) {
            _ if self.as_operations => tensor_operations::softmax(q, k, v, self.causal),
            (Mechanism::Linear, Some(form), _) => {
                let log_decay = self.log_decay.clone();
                let (map, normalizer) = (form.map(), form.normalizer());
                let options = LinearOptions { map, causal: self.causal, normalizer, log_decay, ..Default::default() };
                linear_attention(q, k, v, &options)
            }
            (Mechanism::Linear, None, _) => linear_attention(q, k, v, &mechanism::linear(self.causal, None)),
            (Mechanism::Performer, _, Some(omega)) => {
                performer_attention(q, k, v, omega, &mechanism::performer(self.causal, None))
            }
            _ => softmax_attention(q, k, v, &mechanism::softmax(self.causal, None)),
        }
    }

    fn run(&self) -> Result<()> {
        let [q, k, v] = &self.operands;
        if self.case.pass == Passes::Fwd {
            self.attention(&q.as_detached_tensor(), &k.as_detached_tensor(), &v.as_detached_tensor())?;
            return Ok(());
        }
        let loss = (self.attention(q, k, v)? * &self.d_out)?.sum_all()?;
        loss.backward().map(|_| ())
    }

    /// Of one run, averaged over `repeats`.
    fn seconds(&self, repeats: usize) -> Result<f64> {
        let started = Instant::now();
        (0..repeats).try_for_each(|_| self.run())?;
        Ok(started.elapsed().as_secs_f64() / repeats as f64)
    }
}
