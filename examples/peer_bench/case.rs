//! Cases as they are asked for, and operands and results in files.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use attn_kernels::linear::FeatureMap;
use clap::ValueEnum;
use half::{bf16, f16};
use rayon::prelude::*;
use serde::Deserialize;

use crate::common::device::DeviceKind;
use crate::common::inputs::{Given, Shape};
use crate::common::mechanism::DIRECTIONS;
use crate::common::tensor::{Buffer, Tensor};
use crate::common::{Call, Float, Inputs, Mechanism, Pass};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    mechanism: String,
    pub pass: Passes,
    causal: bool,
    dtype: String,
    batch: usize,
    heads: usize,
    head_dim: usize,
    /// Queries, and keys unless `keys` says otherwise.
    len: usize,
    /// Of the CPU [default: all]
    #[serde(default)]
    pub threads: usize,
    /// `cpu` or `gpu` [default: cpu]
    device: Option<String>,
    /// [default: heads]
    key_heads: Option<usize>,
    keys: Option<usize>,
    /// [default: head_dim]
    value_dim: Option<usize>,
    /// Linear attention of another kind than the mechanism of that name.
    pub linear: Option<LinearForm>,
    /// The operands in a file, one after the other, little-endian, contiguous: q, k, v, d_out in `dtype`; then, in f32,
    /// log_decay, ω and S, z as far as there are. Otherwise they are random and results are checked here.
    pub inputs: Option<PathBuf>,
    /// In the file: `head` [Hk] or `token` [B, Hk, M]; [default: none there]
    log_decay: Option<String>,
    /// Whether S and z are in the file.
    #[serde(default)]
    state: bool,
}

#[derive(Deserialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Passes {
    Fwd,
    Bwd,
    FwdBwd,
}

impl Passes {
    pub fn list(self) -> &'static [Pass] {
        match self {
            Self::Fwd => &[Pass::Fwd],
            Self::Bwd => &[Pass::Bwd],
            Self::FwdBwd => &Pass::ALL,
        }
    }
}

/// The map is φ = identity, or elu + 1.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearForm {
    identity: bool,
    normalized: bool,
}

impl LinearForm {
    pub fn map(&self) -> FeatureMap {
        if self.identity { FeatureMap::Identity } else { FeatureMap::EluPlusOne }
    }

    pub fn normalizer(&self) -> Option<f64> {
        self.normalized.then_some(1e-6)
    }
}

impl Case {
    pub fn device(&self) -> Result<DeviceKind, String> {
        self.device.as_deref().map_or(Ok(DeviceKind::Cpu), |name| DeviceKind::from_str(name, false))
    }

    fn mechanism(&self) -> Result<Mechanism, String> {
        let mechanism = Mechanism::from_str(&self.mechanism, false)?;
        if !mechanism.supports(self.causal) {
            return Err(format!("{} needs causal: true", mechanism.name()));
        }
        if self.linear.is_some() && !(mechanism == Mechanism::Linear && self.causal && self.inputs.is_some()) {
            return Err("linear: {…} needs mechanism: linear, causal: true and inputs".into());
        }
        Ok(mechanism)
    }

    pub fn inputs(&self) -> Result<Inputs, String> {
        let float = Float::from_str(&self.dtype, false)?;
        let shape = Shape {
            batch: self.batch,
            heads: self.heads,
            key_heads: self.key_heads.unwrap_or(self.heads),
            queries: self.len,
            keys: self.keys.unwrap_or(self.len),
            width: self.head_dim,
            value_width: self.value_dim.unwrap_or(self.head_dim),
        };
        match &self.inputs {
            None => Inputs::random(float, shape).map_err(|error| error.to_string()),
            Some(path) => self.read(path, float, shape).map_err(|why| format!("inputs {}: {why}", path.display())),
        }
    }

    fn read(&self, path: &Path, float: Float, shape: Shape) -> Result<Inputs, String> {
        let mut file = File::open(path).map_err(|error| error.to_string())?;
        let Shape { batch, heads, key_heads, queries, keys, width, value_width } = shape;
        let mut tensor = |float: Float, dims: &[usize]| read(&mut file, float, dims);
        let q = tensor(float, &[batch, heads, queries, width])?;
        let k = tensor(float, &[batch, key_heads, keys, width])?;
        let v = tensor(float, &[batch, key_heads, keys, value_width])?;
        let d_out = tensor(float, &[batch, heads, queries, value_width])?;
        let log_decay = match self.log_decay.as_deref() {
            None => None,
            Some("head") => Some(tensor(Float::F32, &[key_heads])?),
            Some("token") => Some(tensor(Float::F32, &[batch, key_heads, keys])?),
            Some(other) => return Err(format!("log_decay {other}: needs head or token")),
        };
        let has_omega = self.mechanism()? == Mechanism::Performer;
        let omega = has_omega.then(|| tensor(Float::F32, &[DIRECTIONS, width])).transpose()?;
        let mut sums = || {
            let s = tensor(Float::F32, &[batch, key_heads, width, value_width])?;
            Ok::<_, String>([s, tensor(Float::F32, &[batch, key_heads, width])?])
        };
        let state = self.state.then(&mut sums).transpose()?;
        match file.read(&mut [0]).map_err(|error| error.to_string())? {
            0 => Ok(Inputs { float, shape, q, k, v, d_out, key_mask: None, given: Given { log_decay, omega, state } }),
            _ => Err("longer than the operands".into()),
        }
    }

    pub fn call<'a>(&self, inputs: &'a Inputs) -> Result<Call<'a>, String> {
        let mechanism = self.mechanism()?;
        let call = match &self.linear {
            None => Call::new(mechanism, self.causal, inputs),
            Some(form) => Call::linear(form.map(), form.normalizer(), inputs),
        };
        call.map_err(|error| error.to_string())
    }
}

fn read(file: &mut File, float: Float, dims: &[usize]) -> Result<Tensor, String> {
    fn numbers<const N: usize, T: Send>(bytes: &[u8], number: fn([u8; N]) -> T) -> Vec<T> {
        bytes.par_chunks_exact(N).map(|chunk| number(std::array::from_fn(|i| chunk[i]))).collect()
    }
    let mut bytes = vec![0; dims.iter().product::<usize>() * float.dtype().size()];
    file.read_exact(&mut bytes).map_err(|error| error.to_string())?;
    let data = match float {
        Float::F32 => Buffer::F32(numbers(&bytes, f32::from_le_bytes)),
        Float::Bf16 => Buffer::Bf16(numbers(&bytes, bf16::from_le_bytes)),
        Float::F16 => Buffer::F16(numbers(&bytes, f16::from_le_bytes)),
        Float::F64 => Buffer::F64(numbers(&bytes, f64::from_le_bytes)),
    };
    Ok(Tensor { data, dims: dims.to_vec() })
}

/// Writes tensors one after the other, in f32.
pub fn write(path: &Path, tensors: &[Tensor]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    for tensor in tensors {
        let number = |i: usize| (tensor.data.get(i) as f32).to_le_bytes();
        let bytes: Vec<[u8; 4]> = (0..tensor.data.len()).into_par_iter().map(number).collect();
        file.write_all(bytes.as_flattened())?;
    }
    Ok(())
}
