"""The kinds of recipes.py as functions of q, k, v on PyTorch tensors: peers, and materialised references."""

import importlib
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import peers
from recipes import CHUNK, DIRECTIONS

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLA = {
    "fla chunk_linear_attn": "linear_attn",
    "fla chunk_retention": "retention",
    "fla chunk_simple_gla": "simple_gla",
}
# Chunks of eager forms, of which the fastest counts.
CHUNKS = (64, 128, 256)


class Skipped(Exception):
    """Why a peer does not take part."""


def retention_log_decay(heads):
    """ln(1 − 2^(−5−h))."""
    return torch.tensor([math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)], dtype=torch.float32)


def sdpa(case, name):
    if case.causal and case.length != case.keys and case.length != 1:
        raise Skipped("its causal mask is aligned to the first key")
    settings = {"is_causal": case.causal and case.length > 1}
    if case.heads != case.key_heads:
        if name == "efficient":
            raise Skipped("no grouped heads")
        settings["enable_gqa"] = True

    def attention(operands):
        with sdpa_kernel(BACKENDS[name]):
            return F.scaled_dot_product_attention(operands.q, operands.k, operands.v, **settings)

    return attention


def fla(case, name, device):
    if device.type != "cuda":
        raise Skipped("runs on a GPU only")
    try:
        function = getattr(importlib.import_module(f"fla.ops.{FLA[name]}"), name.removeprefix("fla "))
    except ImportError as error:
        raise Skipped(f"flash-linear-attention cannot be imported: {error}") from error
    settings = {"scale": 1.0}
    if case.kind in ("linear", "linear_normalized"):
        settings["normalize"] = case.kind == "linear_normalized"

    def attention(operands):
        gate = {"g": operands.gate_by_token} if case.kind == "gated" else {}
        return function(operands.q, operands.k, operands.v, **gate, **settings)[0]

    return attention


def eager(case):
    if case.kind == "performer":
        return [lambda o, c=chunk: peers.performer(o.q, o.k, o.v, case.causal, min(c, case.length), o.omega) for chunk in CHUNKS]
    return [flash if case.kind == "flash" else linear_step]


def flash(operands):
    """Four products over chunks, and a cumulative sum, as FLASH-pytorch has them."""
    q, k, v = (x.unflatten(2, (-1, CHUNK)) for x in (operands.q, operands.k, operands.v))
    local = (F.relu(q @ k.transpose(-1, -2) / CHUNK) ** 2).tril() @ v
    sums = k.transpose(-1, -2) @ v
    before = sums.cumsum(2) - sums
    tokens = CHUNK * torch.arange(q.shape[2], device=q.device).clamp(min=1)
    return (local + q @ (before / tokens.to(q.dtype)[:, None, None])).flatten(2, 3)


def linear_step(operands):
    """The outputs, and the state in place."""
    s, z = operands.s, operands.z
    q, k, v = (x.float() for x in (operands.q, operands.k, operands.v))
    s.addcmul_(k.transpose(-1, -2), v)
    z.add_(k.squeeze(2))
    return ((q @ s) / ((q * z.unsqueeze(2)).sum(-1, keepdim=True) + 1e-6)).to(operands.q.dtype)


def attention(case, name, device):
    """What `name` computes the case with: functions of operands, of which the fastest counts.

    A function of fla gets [B, N, H, D], all others [B, H, N, D].
    """
    if name in BACKENDS:
        return [sdpa(case, name)]
    return [fla(case, name, device)] if name in FLA else eager(case)


def softmax_weights(case, q, k):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if case.causal:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + case.keys - case.length)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1)


def performer_features(case, x, omega, is_key):
    x = x * case.width**-0.25
    exponent = x @ omega.T - (x**2).sum(-1, keepdim=True) / 2
    over = (-1, -2) if is_key else -1
    return torch.exp(exponent - exponent.amax(over, keepdim=True).detach()) * DIRECTIONS**-0.5


def decays(log_decay, length):
    """exp of the sum of log-decays from after a key to a query; [N, N], 0 above the diagonal."""
    sums = log_decay.expand(length).cumsum(-1)
    hidden = torch.ones(length, length, dtype=torch.bool, device=sums.device).triu(1)
    return torch.exp((sums[:, None] - sums[None, :]).masked_fill(hidden, -math.inf))


def reference(case, q, k, v, omega, log_decay):
    """One head in f64 by materialised weights: q, k, v are [N, D], [M, D], [M, E]; log_decay [] or [N]."""
    if case.kind == "softmax":
        return softmax_weights(case, q, k) @ v
    if case.kind == "flash":
        chunk = torch.arange(case.length, device=q.device) // CHUNK
        scores, same = q @ k.T, chunk[:, None] == chunk[None, :]
        local = ((F.relu(scores / CHUNK) ** 2) * same).tril()
        mean = scores * (chunk[:, None] > chunk[None, :]) / (CHUNK * chunk.clamp(min=1)[:, None])
        return (local + mean) @ v
    if case.kind == "performer":
        q, k = performer_features(case, q, omega, False), performer_features(case, k, omega, True)
    weights = (q @ k.T).tril()
    if case.kind in ("retention", "gated"):
        weights = weights * decays(log_decay, case.length)
    if case.kind in ("linear_normalized", "performer"):
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return weights @ v
