use std::borrow::BorrowMut;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::batch::{Batch, gathered, packed_tokens};
use super::cache::Cache;
use super::config::AttentionConfig;
use super::first_values::FirstValues;
use super::gated::GatedUnit;
use super::heads::Heads;
use super::mark::check_mark;
use super::mechanism::Mechanism;
use super::pieces::{Piece, cut};
use super::recurrent::{self, Lru, Mamba, Recurrent, Rwkv7, S4d};
use super::siblings::ensure_absent;
use crate::candle::packing::Packing;
use crate::problem::ensure_value;
use crate::{Error, Result as CoreResult, Sequences};

/// An attention layer `[B, N, width]` → `[B, N, width]` of any [`Mechanism`].
///
/// With heads (softmax, linear, Performer, norm, diag, retention):
///
/// ```text
/// q, k, v = x W_q, x W_k, x W_v       split into heads; norm of q and k, if any; rotary embedding of q and k, or of φ(q) and φ(k)
/// y       = attention(q, k, v) W_o    retention: (silu(x W_g) ⊙ attention(q, k, v)) W_o; with an output gate sigmoid(x W_g)
/// ```
///
/// Softmax takes a scale of the scores and a sink per head, as [`softmax_attention`](crate::candle::softmax_attention) does.
///
/// Gated units (GAU and FLASH, Hua et al. 2022), with s the key width, e = expansion · width:
///
/// ```text
/// z, u, v = silu(x W_z), silu(x W_u), silu(x W_v)     widths s, e, e
/// q, k    = γ_q ⊙ z + β_q, γ_k ⊙ z + β_k              rotary embedding of both; FLASH has four of them
/// y       = (u ⊙ attention(q, k, v)) W_o
/// ```
///
/// Recurrent layers (GLA, DeltaNet, Gated DeltaNet, KDA, Mamba-2, lightning attention), with a decay g, β and a gate z that
/// are made of x:
///
/// ```text
/// q, k, v = conv(x W_q), conv(x W_k), conv(x W_v)     short causal convolutions with SiLU, split into heads
/// y       = gate(norm(attention(q, k, v, g, β)), z) W_o
/// ```
///
/// Mamba (Gu and Dao 2023):
///
/// ```text
/// u, z    = conv(x W_u), x W_z                        short causal convolution with SiLU
/// Δ, B, C = softplus(u W_Δ W_Δ' + b), u W_B, u W_C
/// y       = (silu(z) ⊙ selective_scan(u, Δ, −e^A, B, C)) W_o
/// ```
///
/// RWKV-7 (Peng et al. 2025), with x̃ = x_t + μ ⊙ (x_{t−1} − x_t) of a μ for each of r, w, k, v, a and g, and σ the sigmoid:
///
/// ```text
/// r, k, v = x̃_r W_r, x̃_k W_k, x̃_v W_v                 behind the first layer v + σ(b_v + x̃_v V V') ⊙ (v_first − v)
/// w, a    = exp(−e^{−½} σ(b_w + tanh(x̃_w U) U')), σ(b_a + x̃_a A A')
/// κ, k    = norm(k ⊙ k_k), k ⊙ (1 + (a − 1) ⊙ k_a)     l2 norm of every head
/// S_t     = Diag(w) S_{t−1} − (a ⊙ κ) κᵀ S_{t−1} + k vᵀ
/// y       = ((group_norm(S_tᵀ r) + ⟨r, r_k ⊙ k⟩ v) ⊙ (σ(x̃_g G) G')) W_o
/// ```
///
/// S4D (Gu et al. 2022), of every channel alone, with A = −e^{a} + i·im and Δ of its own, and B = 1; LRU (Orvieto et al. 2023),
/// with λ = exp(−e^ν + i e^θ):
///
/// ```text
/// h_t     = e^{ΔA} h_{t−1} + A⁻¹ (e^{ΔA} − 1) x_t,  o_t = 2 Re⟨C, h_t⟩ + D ⊙ x_t
/// h_t     = λ ⊙ h_{t−1} + γ ⊙ B x_t,                o_t = Re(C h_t) + D ⊙ x_t
/// y       = gelu(o) W ⊙ σ(gelu(o) W_g)                  both
/// ```
///
/// The residual connection and the norm before it are the block's. Gradients: all weights and x.
///
/// | weights | shape | of |
/// | --- | --- | --- |
/// | `q_proj.weight` | `[heads · head_width, width]` | layers with heads |
/// | `k_proj.weight`, `v_proj.weight` | `[key_heads · head_width, width]` | layers with heads |
/// | `o_proj.weight` | `[width, heads · head_width]` or `[width, e]` | all |
/// | `g_proj.weight` | `[heads · head_width, width]` | retention with a gate |
/// | `q_proj.weight` | `[2 · heads · head_width, width]`, by head q and W_g | softmax with an output gate |
/// | `q_norm.weight`, `k_norm.weight` | `[head_width]`; joint `[heads · head_width]`, `[key_heads · head_width]` | layers with heads and norms of queries and keys; layer norms have a `bias` as wide |
/// | `sinks` | `[heads]`; 0 at first | softmax with sinks |
/// | `features.omega`, `features.seed` | `[m, head_width]`, `[4]` | Performer: ω and its seed in digits of 16 bits; not trained |
/// | `z_proj.weight`, `u_proj.weight`, `v_proj.weight` | `[s, width]`, `[e, width]`, `[e, width]` | gated units |
/// | `gamma`, `beta` | `[2, s]` (q, k) or `[4, s]` (local q, k, global q, k) | GAU; FLASH |
/// | `relative_bias` | causal `[R + 1]` for j − i = −R … 0, else `[2R + 1]`; FLASH: R = C − 1 | gated units |
/// | `q_proj`, `k_proj`, `v_proj`, `o_proj`, `g_proj`, each `.weight` | q and k `[heads · key_width, width]`, v and g `[heads · head_width, width]`, the output across | GLA, DeltaNet (g if gated), KDA (without g) |
/// | `gk_proj.0.weight`, `gk_proj.1.weight`, `gk_proj.1.bias` | `[low_rank, width]`, `[key_heads · key_width, low_rank]`, and as wide | GLA |
/// | `b_proj.weight` | `[heads, width]` | DeltaNet, KDA: β |
/// | `q_conv1d.weight`, `k_conv1d.weight`, `v_conv1d.weight` | `[channels, 1, taps]` | DeltaNet, KDA, GLA with a convolution |
/// | `f_a_proj.weight`, `f_b_proj.weight` | `[head_width, width]`, `[heads · head_width, head_width]` | KDA: decay |
/// | `g_a_proj.weight`, `g_b_proj.weight` | as those | KDA: gate |
/// | `in_proj_qkv.weight` | `[2 · key_heads · key_width + heads · head_width, width]` | Gated DeltaNet |
/// | `in_proj_z.weight`, `in_proj_b.weight`, `in_proj_a.weight` | `[heads · head_width, width]`, `[heads, width]`, `[heads, width]` | Gated DeltaNet: gate, β, decay |
/// | `in_proj.weight` | `[2 · heads · head_width + 2 · key_heads · key_width + heads, width]`: z, x, B, C, Δ | Mamba-2 |
/// | `in_proj.weight` | `[2 · head_width, width]`: u, z | Mamba |
/// | `x_proj.weight` | `[rank + 2 · states, head_width]`: Δ, B, C | Mamba |
/// | `dt_proj.weight`, `dt_proj.bias` | `[head_width, rank]`, `[head_width]` | Mamba: Δ |
/// | `conv1d.weight`, `conv1d.bias` | `[channels, 1, taps]`, `[channels]` | Gated DeltaNet (q, k, v; no bias), Mamba-2 (x, B, C), Mamba (u) |
/// | `A_log`, `dt_bias` | `[heads]`; KDA `[1, 1, heads, 1]` and `[heads · head_width]`; in the dtype of sums | Gated DeltaNet, KDA, Mamba-2 |
/// | `A_log`; `D` | `[head_width, states]`, in the dtype of sums; `[heads]`, `[head_width]` | Mamba; Mamba-2, Mamba |
/// | `qkv_proj.weight` | `[3 · heads · head_width, width]`, by head q, k, v | lightning |
/// | `output_gate.weight` | `[heads · head_width, width]` | lightning |
/// | `out_proj.weight` | `[width, heads · head_width]` | Gated DeltaNet, Mamba-2, Mamba, lightning |
/// | `g_norm_swish_gate.weight`; `o_norm.weight`; `norm.weight` | `[head_width]`; all heads in Mamba-2 and lightning | GLA; DeltaNet, KDA; the others |
/// | `x_r`, `x_w`, `x_k`, `x_v`, `x_a`, `x_g`; `k_k`, `k_a`; `r_k` | `[1, 1, width]`: μ; `[heads · head_width]`; `[heads, head_width]` | RWKV-7 |
/// | `r_proj.weight`, `k_proj.weight`, `v_proj.weight`, `o_proj.weight` | `[heads · head_width, width]`, the output across | RWKV-7 |
/// | `w_lora.lora`, `a_lora.lora`, `v_lora.lora`, `g_lora.lora`, each `.0.weight`, `.2.weight`, `.2.bias` | `[rank, width]`, `[heads · head_width, rank]` and as wide | RWKV-7 (v behind the first layer; g without bias) |
/// | `g_norm.weight`, `g_norm.bias` | `[heads · head_width]` | RWKV-7 |
/// | `kernel.log_dt`, `kernel.log_A_real`, `kernel.A_imag`, `kernel.C`, `D` | `[width]`, `[width, states]`, as it, `[width, states, 2]`, `[width]`; in the dtype of sums | S4D |
/// | `output_linear.0.weight` | `[2 · width, width]`: W, W_g | S4D |
/// | `nu_log`, `theta_log`, `gamma_log`, `D` | `[states]`, as it, as it, `[width]`; in the dtype of sums | LRU |
/// | `B_re`, `B_im`; `C_re`, `C_im` | `[states, width]`; `[width, states]` | LRU |
/// | `out1.weight`, `out2.weight` | `[width, width]`: W, W_g | LRU |
/// | `….bias` | of every projection, if `bias` is set, but for those in `unbiased` | all |
/// | `mechanism.<kind>` | `[1]` | all: the [mark](super#checkpoints) |
///
/// # Example
/// ```
/// use attn_kernels::nn::{Attention, AttentionConfig, Mechanism};
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let variables = VarMap::new();
/// let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let config = AttentionConfig { rotary: Some(10000.0.into()), ..AttentionConfig::new(32, 4, Mechanism::default()) };
/// let layer = Attention::new(&config, weights)?;
/// let x = Tensor::randn(0f32, 1.0, (2, 10, 32), &Device::Cpu)?;
/// let y = layer.forward(&x)?;
/// assert_eq!(y.dims(), [2, 10, 32]);
/// let gradients = y.sqr()?.sum_all()?.backward()?;
/// let trained = variables.all_vars().iter().filter(|variable| gradients.get(variable).is_some()).count();
/// // The four projections; the fifth variable is the mark.
/// assert_eq!((trained, variables.all_vars().len()), (4, 5));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Attention {
    config: AttentionConfig,
    inner: Inner,
    dtype: DType,
    device: Device,
    redraws: u64,
}

#[derive(Debug, Clone)]
enum Inner {
    Heads(Heads),
    Gated(GatedUnit),
    Recurrent(Recurrent),
    Mamba(Mamba),
    Rwkv7(Rwkv7),
    S4d(S4d),
    Lru(Lru),
}

impl Attention {
    /// Takes the weights of the layer, or makes them if `weights` come from a `VarMap` that has none.
    ///
    /// # Errors
    /// A configuration that [`AttentionConfig::check`] refuses; weights that are missing or of another shape, or of a
    /// layer of another mechanism; weights of an attention layer that this one would leave out (a bias of a projection
    /// without, norms of queries and keys, a gate). The error names the tensor.
    pub fn new(config: &AttentionConfig, weights: VarBuilder) -> Result<Self> {
        config.check()?;
        check_mark(&config.mechanism, &weights)?;
        ensure_used(config, &weights)?;
        let inner = match &config.mechanism {
            gated if gated.is_gated_unit() => Inner::Gated(GatedUnit::new(config, &weights)?),
            Mechanism::Mamba { .. } => Inner::Mamba(Mamba::new(config, &weights)?),
            Mechanism::Rwkv7 { .. } => Inner::Rwkv7(Rwkv7::new(config, &weights)?),
            Mechanism::S4d { .. } => Inner::S4d(S4d::new(config, &weights)?),
            Mechanism::Lru { .. } => Inner::Lru(Lru::new(config, &weights)?),
            recurrent if recurrent.is_recurrent() => Inner::Recurrent(Recurrent::new(config, &weights)?),
            _ => Inner::Heads(Heads::new(config, &weights)?),
        };
        let (dtype, device) = (weights.dtype(), weights.device().clone());
        Ok(Self { config: config.clone(), inner, dtype, device, redraws: 0 })
    }

    /// The configuration.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// Attention that does not see keys whose entry of `key_mask` `[B, N]` (u8) is 0, for sequences padded to one
    /// length. Without a mask this is `Module::forward`.
    ///
    /// Padding may be on either side, and between tokens: the rows of visible tokens are those of the sequence without
    /// the others. Positions, windows, blocks, chunks, decays and relative distances count the visible tokens of the
    /// sequence. The rows of removed tokens are computed as if these stood behind the last visible one.
    ///
    /// The mask is read on the host; unless all padding is on the right, x and the result are reordered.
    ///
    /// # Errors
    /// An x of another shape or dtype, or on another device; a mask of another shape or dtype; a layer of RWKV-7 behind the
    /// first, which works in a model alone.
    pub fn forward_masked(&self, x: &Tensor, key_mask: Option<&Tensor>) -> Result<Tensor> {
        gathered(x, key_mask, |x, batch| self.forward_batch(x, batch, &mut FirstValues::default()))
    }

    /// Attention inside each of the sequences that are packed into x `[1, T, width]`, as if it were alone.
    ///
    /// # Errors
    /// As [`Self::forward_masked`]; sequences that do not cut x, or have other offsets for keys.
    pub fn forward_sequences(&self, x: &Tensor, sequences: &Sequences) -> Result<Tensor> {
        self.forward_batch(x, Batch { sequences: Some(sequences), key_mask: None }, &mut FirstValues::default())
    }

    pub(super) fn forward_batch(&self, x: &Tensor, batch: Batch<'_>, first: &mut FirstValues) -> Result<Tensor> {
        self.check_input("Attention::forward", x)?;
        if let Some(sequences) = batch.sequences {
            let function = "Attention::forward_sequences";
            sequences.aligned(function, packed_tokens(function, "x", x)?)?;
        }
        match &self.inner {
            Inner::Heads(heads) => heads.forward(x, batch),
            Inner::Gated(unit) => unit.forward(x, batch),
            Inner::Recurrent(layer) => layer.forward(x, batch),
            Inner::Mamba(layer) => layer.forward(x, batch),
            Inner::Rwkv7(layer) => layer.forward(x, batch, first),
            Inner::S4d(layer) => layer.forward(x, batch),
            Inner::Lru(layer) => layer.forward(x, batch),
        }
    }

    /// An empty cache for [`Self::forward_cached`].
    ///
    /// # Errors
    /// A layer that is not causal.
    pub fn cache(&self) -> Result<Cache> {
        ensure_value(self.config.causal, "Attention::cache", "causal", false, "`true` to decode with a cache")?;
        let config = match self.seed()? {
            Some(seed) => with_seed(&self.config, seed),
            None => self.config.clone(),
        };
        Ok(Cache::new(config, self.dtype, &self.device, self.redraws))
    }

    /// The outputs of the next rows of the sequences whose beginning is in the cache, which takes them in. One call with
    /// a prompt, then one call per token, or any other cut, give the outputs of `forward` over the whole.
    ///
    /// The sequences of a batch have the same length: [`Self::forward_sequences_cached`] is for others.
    /// For inference: gradients reach the weights through the rows of this call alone.
    ///
    /// # Errors
    /// As [`Self::forward_masked`]; a cache of a layer of another configuration, or of another batch size; a GAU or
    /// FLASH norm that depends on the length of the whole sequence. The cache is then as before.
    pub fn forward_cached(&self, x: &Tensor, cache: &mut Cache) -> Result<Tensor> {
        let rows = 0..x.dims().get(1).copied().unwrap_or(0);
        let pieces = vec![Piece { rows, cache }];
        self.forward_pieces("Attention::forward_cached", x, pieces, &mut FirstValues::default())
    }

    /// The outputs of the next rows of sequences of any lengths, which have a cache each: x `[1, T, width]` holds the rows of
    /// all of them, one sequence behind another, as `sequences` says. Every sequence gives what [`Self::forward_cached`]
    /// gives for it alone, on the CPU to the bit and on any number of threads; those without rows stay as they are.
    ///
    /// # Errors
    /// As [`Self::forward_cached`]; sequences that do not cut x or have other offsets for keys, another number of caches, a
    /// cache of several sequences. All caches are then as before.
    ///
    /// # Example
    /// ```
    /// use attn_kernels::Sequences;
    /// use attn_kernels::nn::{Attention, AttentionConfig, Mechanism};
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// let variables = VarMap::new();
    /// let weights = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    /// let layer = Attention::new(&AttentionConfig::new(16, 2, Mechanism::default()), weights)?;
    /// let mut caches = vec![layer.cache()?; 3];
    /// for lengths in [[5, 2, 9], [1, 1, 0], [1, 1, 4]] {
    ///     let x = Tensor::randn(0f32, 1.0, (1, lengths.iter().sum::<u32>() as usize, 16), &Device::Cpu)?;
    ///     layer.forward_sequences_cached(&x, &Sequences::of_lengths(lengths), &mut caches)?;
    /// }
    /// assert_eq!(caches.iter().map(|cache| cache.len()).collect::<Vec<_>>(), [7, 4, 13]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_sequences_cached<C: BorrowMut<Cache>>(
        &self,
        x: &Tensor,
        sequences: &Sequences,
        caches: &mut [C],
    ) -> Result<Tensor> {
        let function = "Attention::forward_sequences_cached";
        let tokens = packed_tokens(function, "x", x)?;
        self.forward_pieces(function, x, cut(function, tokens, sequences, caches)?, &mut FirstValues::default())
    }

    /// As [`Self::forward_sequences_cached`], for sequences that are padded to one length, x `[B, N, width]`: the caches take
    /// in the rows whose entry of `key_mask` `[B, N]` (u8) is not 0, wherever these stand, and are then those of the sequences
    /// without padding. The rows of removed tokens are 0. The mask is read on the host.
    ///
    /// # Errors
    /// As [`Self::forward_sequences_cached`]; a mask of another shape or dtype.
    pub fn forward_masked_cached<C: BorrowMut<Cache>>(
        &self,
        x: &Tensor,
        key_mask: &Tensor,
        caches: &mut [C],
    ) -> Result<Tensor> {
        let packing = Packing::new("Attention::forward_masked_cached", x, key_mask)?;
        packing.unpacked(&self.forward_sequences_cached(&packing.packed(x)?, &packing.sequences, caches)?)
    }

    /// The outputs of the rows of the pieces, whose caches take them in.
    pub(super) fn forward_pieces(
        &self,
        function: &'static str,
        x: &Tensor,
        mut pieces: Vec<Piece<&mut Cache>>,
        first: &mut FirstValues,
    ) -> Result<Tensor> {
        self.check_input(function, x)?;
        let batch = x.dim(0)?;
        for Piece { cache, .. } in &pieces {
            self.check_cache(function, cache)?;
            let expected = cache.batch.unwrap_or(batch);
            let needs = format!("{expected}, as in the cache");
            ensure_value(batch == expected, function, "x", format!("a batch of {batch}"), &needs)?;
        }
        pieces.retain(|piece| !piece.rows.is_empty());
        if pieces.is_empty() {
            return Ok(x.clone());
        }
        let before: Vec<_> = pieces.iter().map(|piece| piece.cache.snapshot()).collect();
        let out = match &self.inner {
            Inner::Heads(heads) => heads.forward_cached(x, &mut pieces),
            Inner::Gated(unit) => unit.forward_cached(x, &mut pieces),
            Inner::Recurrent(layer) => layer.forward_cached(x, &mut pieces),
            Inner::Mamba(layer) => layer.forward_cached(x, &mut pieces),
            Inner::Rwkv7(layer) => layer.forward_cached(x, &mut pieces, first),
            Inner::S4d(layer) => layer.forward_cached(x, &mut pieces),
            Inner::Lru(layer) => layer.forward_cached(x, &mut pieces),
        };
        for (Piece { rows, cache }, before) in pieces.into_iter().zip(before) {
            match &out {
                Ok(_) => (cache.position, cache.batch) = (cache.position + rows.len(), Some(batch)),
                Err(_) => cache.restore(before),
            }
        }
        out
    }

    /// Seed of the random directions of a Performer layer; none for others.
    ///
    /// # Errors
    /// Those of the device.
    pub fn seed(&self) -> Result<Option<u64>> {
        match &self.inner {
            Inner::Heads(heads) => heads.omega().map(|omega| omega.seed()).transpose(),
            _ => Ok(None),
        }
    }

    /// Draws the random directions of a Performer layer anew, as the paper does now and then in training. If the weights
    /// are in a `VarMap`, it has the new ones. Caches made before are refused from then on.
    ///
    /// # Errors
    /// A layer of another mechanism.
    pub fn redraw(&mut self, seed: u64) -> Result<()> {
        let kind = self.config.mechanism.name();
        let omega = match &mut self.inner {
            Inner::Heads(heads) => heads.omega_mut(),
            _ => None,
        };
        let needs = "a performer layer: others have no random features";
        ensure_value(omega.is_some(), "Attention::redraw", "self", format!("a {kind} layer"), needs)?;
        self.redraws += 1;
        omega.map_or(Ok(()), |omega| omega.redraw(seed))
    }

    fn check_input(&self, function: &'static str, x: &Tensor) -> CoreResult<()> {
        let argument = "x";
        let width = self.config.width;
        if !matches!(x.dims(), [_, _, last] if *last == width) {
            let needs = format!("[batch, rows, {width}]");
            return Err(Error::Shape { function, argument, got: format!("shape {:?}", x.dims()), needs });
        }
        if x.dtype() != self.dtype {
            let needs = format!("{}, that of the weights", self.dtype.as_str());
            return Err(Error::DType { function, argument, got: x.dtype().as_str().into(), needs });
        }
        if !x.device().same_device(&self.device) {
            let [got, needs] = [x.device(), &self.device].map(|device| format!("{:?}", device.location()));
            return Err(Error::Device { function, argument, got, needs: format!("{needs}, that of the weights") });
        }
        Ok(())
    }

    pub(super) fn check_cache(&self, function: &'static str, cache: &Cache) -> CoreResult<()> {
        let fits = cache.config == self.config || with_seed(&cache.config, 0) == with_seed(&self.config, 0);
        if !fits || cache.dtype != self.dtype {
            let theirs = &cache.config;
            let got = format!("that of a {} layer, {theirs:?} in {}", theirs.mechanism.name(), cache.dtype.as_str());
            let needs = format!("one of this layer, {:?} in {}", self.config, self.dtype.as_str());
            return Err(Error::Value { function, argument: "cache", got, needs });
        }
        let got = "made before the random features were drawn anew";
        ensure_value(cache.redraws == self.redraws, function, "cache", got, "one made since")
    }
}

/// Refuses weights of attention layers that one of this configuration leaves out.
fn ensure_used(config: &AttentionConfig, weights: &VarBuilder) -> Result<()> {
    const PROJECTIONS: [&str; 26] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "g_proj",
        "z_proj",
        "u_proj",
        "b_proj",
        "f_a_proj",
        "f_b_proj",
        "g_a_proj",
        "g_b_proj",
        "in_proj",
        "in_proj_qkv",
        "in_proj_qkvz",
        "in_proj_z",
        "in_proj_ba",
        "in_proj_b",
        "in_proj_a",
        "qkv_proj",
        "output_gate",
        "out_proj",
        "r_proj",
        "out1",
        "out2",
        "output_linear.0",
    ];
    const NORMS: [&str; 4] = ["q_norm.weight", "k_norm.weight", "q_norm.bias", "k_norm.bias"];
    const OTHERS: [&str; 7] =
        ["q_layernorm.weight", "k_layernorm.weight", "sinks", "gamma", "beta", "relative_bias", "dense.weight"];
    let own = config.projections();
    let biases: Vec<_> = own.iter().filter(|name| !config.has_bias(name)).map(|name| format!("{name}.bias")).collect();
    let needs = "set `bias`, and in `unbiased` the projections without";
    ensure_absent(weights, biases.iter().map(String::as_str), needs)?;

    let foreign = PROJECTIONS.iter().filter(|name| !own.contains(name));
    let foreign: Vec<_> = foreign.flat_map(|name| ["weight", "bias"].map(|part| format!("{name}.{part}"))).collect();
    let used: &[&str] = match config.mechanism {
        Mechanism::Gau { bias_reach: None, .. } => &["gamma", "beta"],
        Mechanism::Gau { .. } | Mechanism::Flash { .. } => &["gamma", "beta", "relative_bias"],
        ref other => recurrent::other_weights(other),
    };
    let options: Vec<&str> = [(config.query_key_norm.is_some(), &NORMS[..]), (config.sinks, &["sinks"])]
        .into_iter()
        .flat_map(|(is_given, names)| if is_given { names } else { &[] })
        .copied()
        .collect();
    let others = OTHERS.into_iter().chain(NORMS).chain(recurrent::all_others());
    let others = others.filter(|name| !used.contains(name) && !options.contains(name));
    let why = format!("a {} layer of this configuration has no such part", config.mechanism.name());
    ensure_absent(weights, foreign.iter().map(String::as_str).chain(others), &why)
}

/// The configuration with another seed for random features, which are those of the weights.
fn with_seed(config: &AttentionConfig, seed: u64) -> AttentionConfig {
    let mut config = config.clone();
    if let Mechanism::Performer { seed: own, .. } = &mut config.mechanism {
        *own = seed;
    }
    config
}

impl Module for Attention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_masked(x, None)
    }
}
