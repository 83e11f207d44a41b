//! Our side of `benches/peers/delta.py`: the delta engine on slices, in a program that is started once and asked for one
//! timing after the other.
//!
//! Every line in is a JSON object, answered by one line of JSON: `{"case": {…}}`, the fields of [`Case`], prepares a case;
//! `{"sample": n}` runs it n times and is answered by `{"seconds": [s]}`, the average; `{"results": "path"}` writes the
//! results to a file, in f32. A request that cannot be met is answered by `{"error": "…"}`.

#[path = "peer_bench/lines.rs"]
mod lines;

use std::path::{Path, PathBuf};
use std::time::Instant;

use attn_kernels::problem::View;
use attn_kernels::{DeltaOptions, cpu};
use lines::{Next, answer, fail, read, reply};
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Request {
    Case(Case),
    Sample(usize),
    Results(PathBuf),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// `gated`, `delta` or `gated_delta`
    rule: String,
    /// Dimensions of the log-decay: 3 per head and token, 4 per channel, 0 without.
    decay_rank: usize,
    gradients: bool,
    batch: usize,
    heads: usize,
    len: usize,
    width: usize,
    threads: usize,
    /// Operands in f32, one after the other: q, k, v, d_out [B, H, N, D], β [B, H, N], the log-decay.
    inputs: PathBuf,
}

/// A case with its operands.
struct Loaded {
    case: Case,
    pool: ThreadPool,
    /// In the order of the file.
    operands: Vec<Vec<f32>>,
}

type Answer<T> = Result<T, String>;

impl Loaded {
    fn new(case: Case) -> Answer<Self> {
        if !["gated", "delta", "gated_delta"].contains(&&case.rule[..]) {
            return Err(format!("rule {}: needs gated, delta or gated_delta", case.rule));
        }
        let pool = ThreadPoolBuilder::new().num_threads(case.threads).build().map_err(|error| error.to_string())?;
        let bytes = std::fs::read(&case.inputs).map_err(|error| format!("{}: {error}", case.inputs.display()))?;
        let mut numbers = bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(std::array::from_fn(|i| bytes[i])));
        let dims = case.dims();
        let lens =
            [4, 4, 4, 4, 3, case.decay_rank].map(|rank| if rank == 0 { 0 } else { dims[..rank].iter().product() });
        let operands: Vec<Vec<f32>> = lens.map(|len: usize| numbers.by_ref().take(len).collect()).into();
        let has_all = operands.iter().zip(lens).all(|(operand, len)| operand.len() == len) && numbers.next().is_none();
        if has_all {
            Ok(Self { case, pool, operands })
        } else {
            Err("inputs of another length than the operands".into())
        }
    }

    /// Output, then gradients of q, k, v, if they are asked for.
    fn run(&self) -> attn_kernels::Result<Vec<Vec<f32>>> {
        let dims = self.case.dims();
        let operand = |index: usize, rank: usize| View::contiguous(&self.operands[index][..], &dims[..rank]);
        let (q, k, v) = (operand(0, 4)?, operand(1, 4)?, operand(2, 4)?);
        let rank = self.case.decay_rank;
        let log_decay = if rank == 0 { None } else { Some(operand(5, rank)?) };
        let options = DeltaOptions { log_decay, scale: Some(1.0), ..Default::default() };
        let attention = if self.case.rule == "gated" {
            cpu::gated_linear::<f32>(q, k, v, &options, None)?
        } else {
            cpu::delta::<f32>(q, k, v, operand(4, 3)?, &options, None)?
        };
        if !self.case.gradients {
            return Ok(vec![attention.out]);
        }
        let gradients = attention.backward(&self.operands[3], None)?;
        Ok(vec![attention.out, gradients.q, gradients.k, gradients.v])
    }

    fn sample(&self, repeats: usize) -> Answer<Value> {
        let start = Instant::now();
        for _ in 0..repeats {
            std::hint::black_box(self.pool.install(|| self.run()).map_err(|error| error.to_string())?);
        }
        Ok(json!({ "seconds": [start.elapsed().as_secs_f64() / repeats as f64] }))
    }

    fn save(&self, path: &Path) -> Answer<Value> {
        let results = self.pool.install(|| self.run()).map_err(|error| error.to_string())?.concat();
        let bytes: Vec<u8> = results.iter().flat_map(|x| x.to_le_bytes()).collect();
        std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(json!({}))
    }
}

impl Case {
    fn dims(&self) -> [usize; 4] {
        [self.batch, self.heads, self.len, self.width]
    }
}

fn main() -> std::io::Result<()> {
    let mut next: Next<Request> = read()?;
    let mut loaded = None;
    while let Some(request) = next {
        next = match (request, &loaded) {
            (Err(message), _) => fail(&message)?,
            (Ok(Request::Case(case)), _) => {
                let prepared = Loaded::new(case).map(|case| loaded = Some(case));
                answer(&reply(prepared.map(|()| json!({}))))?
            }
            (Ok(_), None) => fail("needs a case before")?,
            (Ok(Request::Sample(repeats)), Some(loaded)) => answer(&reply(loaded.sample(repeats.max(1))))?,
            (Ok(Request::Results(path)), Some(loaded)) => answer(&reply(loaded.save(&path)))?,
        };
    }
    Ok(())
}
