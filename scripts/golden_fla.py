"""RWKV-7 and RetNet as flash-linear-attention (0.6, github.com/fla-org/flash-linear-attention) names and computes them, in
plain PyTorch, and registered with transformers, which has neither.

Every layer maps x [B, T, h] and what it kept of the tokens before (None at first) to its output and what it keeps.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class RWKV7Config(PreTrainedConfig):
    model_type = "rwkv7"
    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int | None = None
    hidden_ratio: int | float = 4
    num_hidden_layers: int = 24
    head_dim: int = 64
    decay_low_rank_dim: int = 64
    gate_low_rank_dim: int = 128
    a_low_rank_dim: int = 64
    v_low_rank_dim: int = 16
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5
    fuse_norm: bool = True
    tie_word_embeddings: bool = False


class RetNetConfig(PreTrainedConfig):
    model_type = "retnet"
    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int | None = None
    hidden_ratio: int | float = 2
    expand_k: int | float = 1
    expand_v: int | float = 2
    num_hidden_layers: int = 24
    num_heads: int = 8
    num_kv_heads: int | None = None
    hidden_act: str = "swish"
    use_output_gate: bool = True
    norm_eps: float = 1e-6
    fuse_norm: bool = True
    tie_word_embeddings: bool = False


def linear(inputs, outputs, bias=False):
    return nn.Linear(inputs, outputs, bias)


def vector(start, *shape):
    return nn.Parameter(torch.full(shape, start))


def differences(x, before):
    """Each token's difference to the one before it, and the last token."""
    first = torch.zeros_like(x[:, :1]) if before is None else before
    return torch.cat([first, x[:, :-1]], 1) - x, x[:, -1:]


class LowRank(nn.Module):
    def __init__(self, width, rank, activation, outputs, bias=True):
        super().__init__()
        self.lora = nn.Sequential(linear(width, rank), activation, linear(rank, outputs, bias))

    def forward(self, x):
        return self.lora(x)


class RWKV7Attention(nn.Module):
    """S_t = S_{t−1} (diag(e^{w_t}) − κ_t (a_t ⊙ κ_t)ᵀ) + v_t k_tᵀ, o_t = S_t r_t (RWKV-7, arXiv 2503.14456, section 4)."""

    def __init__(self, config, layer):
        super().__init__()
        width = config.hidden_size
        self.heads, self.head_dim, self.fused, self.first = (
            width // config.head_dim,
            config.head_dim,
            config.fuse_norm,
            layer == 0,
        )
        for name in "rwkvag":
            setattr(self, f"x_{name}", vector(0.5, 1, 1, width))
        self.k_k, self.k_a = vector(0.85, width), vector(1.0, width)
        self.r_k = vector(0.0, self.heads, self.head_dim)
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (linear(width, width) for _ in range(4))
        self.w_lora = LowRank(width, config.decay_low_rank_dim, nn.Tanh(), width)
        self.a_lora = LowRank(width, config.a_low_rank_dim, nn.Identity(), width)
        self.g_lora = LowRank(width, config.gate_low_rank_dim, nn.Sigmoid(), width, bias=False)
        if not self.first:
            self.v_lora = LowRank(width, config.v_low_rank_dim, nn.Identity(), width)
        self.g_norm = nn.GroupNorm(self.heads, width, eps=self.head_dim * config.norm_eps)

    def forward(self, x, v_first, kept):
        last, state = kept or (None, None)
        delta, last = differences(x, last)
        r, w, k, v, a, g = (x + delta * getattr(self, f"x_{name}") for name in "rwkvag")
        r, k = self.r_proj(r), self.k_proj(k)
        w = -math.exp(-0.5) * self.w_lora(w).sigmoid()
        # The values of the first layer are mixed into those of the others.
        mix = None if self.first else self.v_lora(v).sigmoid()
        v = self.v_proj(v)
        v_first, v = (v, v) if self.first else (v_first, torch.lerp(v, v_first, mix))
        a, g = self.a_lora(a).sigmoid(), self.g_lora(g)
        by_head = lambda y: y.unflatten(-1, (self.heads, self.head_dim))
        kappa = by_head(k * self.k_k)
        norm = (
            (kappa.square().sum(-1, True) + 1e-6).sqrt()
            if self.fused
            else kappa.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        )
        kappa = kappa / norm
        k = k * (1 + (a - 1) * self.k_a)
        r, w, k, v, a = map(by_head, (r, w, k, v, a))
        if state is None:
            state = x.new_zeros(len(x), self.heads, self.head_dim, self.head_dim)  # [B, H, values, keys]
        out = []
        for t in range(x.shape[1]):
            read = (state * kappa[:, t, :, None]).sum(-1, True)
            state = (
                state * w[:, t, :, None].exp()
                - read * (a * kappa)[:, t, :, None]
                + v[:, t, ..., None] * k[:, t, :, None]
            )
            out.append((state * r[:, t, :, None]).sum(-1))
        out = self.g_norm(torch.stack(out, 1).flatten(2).flatten(0, 1)).view_as(x)
        bonus = (r * k * self.r_k).sum(-1, True) * v
        return self.o_proj((out + bonus.flatten(2)) * g), v_first, (last, state)


class RWKV7FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.intermediate_size or 32 * math.ceil(int(config.hidden_size * config.hidden_ratio) / 32)
        self.x_k = vector(0.5, config.hidden_size)
        self.key, self.value = linear(config.hidden_size, inner), linear(inner, config.hidden_size)

    def forward(self, x, last):
        delta, last = differences(x, last)
        return self.value(self.key(x + delta * self.x_k).relu().square()), last


class RWKV7Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        norm = lambda: nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)
        if config.norm_first and layer == 0:
            self.pre_norm = norm()
        self.attn_norm, self.ffn_norm = norm(), norm()
        self.attn, self.ffn = RWKV7Attention(config, layer), RWKV7FeedForward(config)

    def forward(self, x, v_first, kept):
        attention, feed_forward = kept or (None, None)
        x = self.pre_norm(x) if hasattr(self, "pre_norm") else x
        out, v_first, attention = self.attn(self.attn_norm(x), v_first, attention)
        x = x + out
        out, feed_forward = self.ffn(self.ffn_norm(x), feed_forward)
        return x + out, v_first, (attention, feed_forward)


class Retention(nn.Module):
    """S_t = γ S_{t−1} + k_t v_tᵀ, o_t = d^−½ q_t S_t, γ = 1 − 2^(−5−head) (RetNet, arXiv 2307.08621, section 2)."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_heads
        keys, values = round(width * config.expand_k), round(width * config.expand_v)
        self.groups = self.heads // (config.num_kv_heads or self.heads)
        self.q_proj, self.k_proj = linear(width, keys), linear(width, keys // self.groups)
        self.v_proj, self.o_proj = linear(width, values // self.groups), linear(values, width)
        if config.use_output_gate:
            self.g_proj = linear(width, values)
        self.norm = "g_norm_swish_gate" if config.fuse_norm and config.use_output_gate else "g_norm"
        setattr(self, self.norm, nn.RMSNorm(values // self.heads, config.norm_eps))

    def forward(self, x, kept):
        start, state = kept or (0, None)
        length = x.shape[1]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.unflatten(-1, (self.heads, -1))
        k, v = (y.unflatten(-1, (self.heads // self.groups, -1)) for y in (k, v))
        width = q.shape[-1]
        angles = torch.arange(start, start + length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
        cos, sin = (angles.cos()[:, None], angles.sin()[:, None])
        q, k = (torch.cat([a * cos - b * sin, a * sin + b * cos], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1)))
        k, v = (y.repeat_interleave(self.groups, 2) for y in (k, v))
        gamma = (1 - 2.0 ** (-5.0 - torch.arange(self.heads)))[:, None, None]
        if state is None:
            state = x.new_zeros(len(x), self.heads, width, v.shape[-1])
        out = []
        for t in range(length):
            state = gamma * state + k[:, t, ..., None] * v[:, t, :, None]
            out.append((q[:, t, ..., None] * state).sum(-2) * width**-0.5)
        out = getattr(self, self.norm)(torch.stack(out, 1)).flatten(2)
        if hasattr(self, "g_proj"):
            out = out * F.silu(self.g_proj(x))
        return self.o_proj(out), (start + length, state)


class GatedMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size or 256 * math.ceil(int(width * config.hidden_ratio * 2 / 3) / 256)
        self.gate_proj, self.up_proj, self.down_proj = linear(width, inner), linear(width, inner), linear(inner, width)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RetNetLayer(nn.Module):
    def __init__(self, config, _):
        super().__init__()
        self.attn_norm, self.mlp_norm = (nn.RMSNorm(config.hidden_size, config.norm_eps) for _ in range(2))
        self.attn, self.mlp = Retention(config), GatedMLP(config)

    def forward(self, x, _, kept):
        out, kept = self.attn(self.attn_norm(x), kept)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), None, kept


class Stack(nn.Module):
    def __init__(self, config, layer, norm):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config, place) for place in range(config.num_hidden_layers))
        self.norm = norm

    def forward(self, tokens, cache):
        x, first, kept = self.embeddings(tokens), None, []
        for layer, before in zip(self.layers, cache or [None] * len(self.layers)):
            x, first, state = layer(x, first, before)
            kept.append(state)
        return self.norm(x), kept


@dataclass
class Output(ModelOutput):
    logits: torch.Tensor | None = None
    cache: list | None = None


class LanguageModel(PreTrainedModel):
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = Stack(config, *self.parts(config))
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.model.embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, cache=None, use_cache=False):
        hidden, cache = self.model(input_ids, cache)
        return Output(self.lm_head(hidden), cache if use_cache else None)


class RWKV7ForCausalLM(LanguageModel):
    config_class = RWKV7Config

    @staticmethod
    def parts(config):
        return RWKV7Layer, nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)


class RetNetForCausalLM(LanguageModel):
    config_class = RetNetConfig

    @staticmethod
    def parts(config):
        return RetNetLayer, nn.RMSNorm(config.hidden_size, config.norm_eps)


for model in RWKV7ForCausalLM, RetNetForCausalLM:
    AutoConfig.register(model.config_class.model_type, model.config_class)
    AutoModelForCausalLM.register(model.config_class, model)
