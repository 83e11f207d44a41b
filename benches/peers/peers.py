"""What a PyTorch user runs on the CPU: fused softmax attention, and the linear family in eager operations.

q, k, v are [B, H, N, D]. The eager causal forms are the fastest usual ones: chunks, with the sums of finished chunks
by a cumulative sum. (performer-pytorch's own causal form, a Python loop over chunks with a cumulative sum over
[N, m, E], is many times slower.)
"""

import torch
import torch.nn.functional as F

DIRECTIONS = 256


def softmax(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def normalised(phi_q, phi_k, v, causal, chunk):
    """phi_q (sum of phi_k v) / (phi_q sum of phi_k), over all keys or those up to the query."""
    if not causal:
        context = phi_k.transpose(-1, -2) @ v
        return (phi_q @ context) / (phi_q @ phi_k.sum(-2).unsqueeze(-1))
    batch, heads, length, _ = phi_q.shape
    phi_q, phi_k, v = (x.reshape(batch, heads, length // chunk, chunk, x.shape[-1]) for x in (phi_q, phi_k, v))
    contexts = phi_k.transpose(-1, -2) @ v
    context = contexts.cumsum(2) - contexts
    sums = phi_k.sum(-2)
    z = sums.cumsum(2) - sums
    weights = (phi_q @ phi_k.transpose(-1, -2)).tril()
    out = weights @ v + phi_q @ context
    divisor = weights.sum(-1, keepdim=True) + phi_q @ z.unsqueeze(-1)
    return (out / divisor).reshape(batch, heads, length, v.shape[-1])


def linear(q, k, v, causal, chunk):
    return normalised(F.elu(q) + 1, F.elu(k) + 1, v, causal, chunk)


def favor_features(x, omega, over, epsilon=1e-4):
    """performer-pytorch's softmax_kernel: positive random features, relative to the largest exponent over `over`."""
    shrink = x.shape[-1] ** -0.25
    projection = (shrink * x) @ omega.T
    half = (x**2).sum(-1, keepdim=True) / 2 * shrink**2
    largest = projection.amax(over, keepdim=True).detach()
    return omega.shape[0] ** -0.5 * (torch.exp(projection - half - largest) + epsilon)


def performer(q, k, v, causal, chunk, omega):
    return normalised(favor_features(q, omega, -1), favor_features(k, omega, (-1, -2)), v, causal, chunk)


def attention(mechanism, causal, chunk, omega):
    """The mechanism as a function of q, k and v."""
    if mechanism == "softmax":
        return lambda q, k, v: softmax(q, k, v, causal)
    if mechanism == "linear":
        return lambda q, k, v: linear(q, k, v, causal, chunk)
    return lambda q, k, v: performer(q, k, v, causal, chunk, omega)


def check_eager():
    """The chunked forms against the materialised one."""
    q, k, v = (torch.randn(1, 2, 256, 64, dtype=torch.float64) for _ in range(3))
    omega = torch.randn(DIRECTIONS, 64, dtype=torch.float64)
    linear_features = (F.elu(q) + 1, F.elu(k) + 1)
    performer_features = (favor_features(q, omega, -1), favor_features(k, omega, (-1, -2)))
    for mechanism, (phi_q, phi_k) in [("linear", linear_features), ("performer", performer_features)]:
        for causal in (False, True):
            weights = phi_q @ phi_k.transpose(-1, -2)
            weights = weights.tril() if causal else weights
            wanted = weights @ v / weights.sum(-1, keepdim=True)
            got = attention(mechanism, causal, 64, omega)(q, k, v)
            torch.testing.assert_close(got, wanted)
