"""What is compared on a GPU: cases, what each costs at least, and which peers take part.

A case's `kind` is what is computed; q, k, v are [B, H, N, D], [B, Hk, M, D] and [B, Hk, M, E]:

softmax             softmax(q kᵀ / √D) v
linear              tril(q kᵀ) v
linear_normalized   the same, divided by the sum of its weights; q, k ≥ 0
retention           tril(q kᵀ ⊙ γ_h^(i−j)) v with RetNet's γ
gated               the same with a decay per token
performer           linear_normalized on 256 positive random features
flash               relu²(q kᵀ / C) v in chunks of 256, and the mean of k vᵀ over the chunks before, read by q
linear_step         one token of linear_normalized: the state is read and updated
"""

import dataclasses
import itertools
import math

DIRECTIONS = 256
CHUNK = 256
ELEMENT = 2  # bytes of bf16 and f16
STATE_KINDS = ("linear_step",)
SDPA = ("cudnn", "flash", "efficient")
PEERS = {
    "softmax": SDPA,
    "linear": ("fla chunk_linear_attn",),
    "linear_normalized": ("fla chunk_linear_attn",),
    "retention": ("fla chunk_retention",),
    "gated": ("fla chunk_simple_gla",),
    "performer": ("eager",),
    "flash": ("eager",),
    "linear_step": ("eager",),
}


@dataclasses.dataclass(frozen=True)
class Case:
    recipe: str
    kind: str
    passes: str  # fwd, bwd or fwdbwd
    batch: int
    heads: int
    length: int
    width: int
    key_heads: int = 0
    keys: int = 0
    value_width: int = 0
    causal: bool = True
    dtype: str = "bf16"

    def __post_init__(self):
        for name, default in [("key_heads", self.heads), ("keys", self.length), ("value_width", self.width)]:
            object.__setattr__(self, name, getattr(self, name) or default)

    @property
    def name(self):
        return " ".join(str(value) for value in dataclasses.astuple(self))

    def shapes(self):
        """Of q, k, v and d_out."""
        queries, keys = (self.batch, self.heads, self.length), (self.batch, self.key_heads, self.keys)
        return [(*queries, self.width), (*keys, self.width), (*keys, self.value_width), (*queries, self.value_width)]

    def state_shapes(self):
        """Of S and z, if the kind has them."""
        if self.kind not in STATE_KINDS:
            return []
        heads = (self.batch, self.key_heads)
        return [(*heads, self.width, self.value_width), (*heads, self.width)]

    def bytes(self):
        """Moved at least: operands read once, results written once."""
        q, k, v, out = (ELEMENT * math.prod(shape) for shape in self.shapes())
        state = 2 * 4 * sum(math.prod(shape) for shape in self.state_shapes())
        forward, backward = q + k + v + out + state, 2 * (q + k + v) + out
        return {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward}[self.passes]

    def flops(self):
        """Of the matrix products that the definition has, the linear family as its recurrence."""
        forward, backward = self.products()
        return {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward}[self.passes]

    def products(self):
        rows, width, value_width = self.batch * self.heads, self.width, self.value_width
        if self.kind in ("softmax", "flash"):
            chunk = CHUNK if self.kind == "flash" else max(self.length, self.keys)
            pairs = rows * sum(visible(self, i, chunk) for i in range(self.length))
            forward, backward = 2 * pairs * (width + value_width), 2 * pairs * (3 * width + 2 * value_width)
            if self.kind == "softmax":
                return forward, backward
        else:
            forward = backward = 0
        features = DIRECTIONS if self.kind == "performer" else width
        tokens = rows * self.length
        if self.kind == "performer":
            forward += 4 * tokens * DIRECTIONS * width
            backward += 8 * tokens * DIRECTIONS * width
        return forward + 4 * tokens * features * value_width, backward + 10 * tokens * features * value_width


def visible(case, i, chunk):
    """Keys that query i sees inside its chunk."""
    position = i + case.keys - case.length
    start = position // chunk * chunk
    return position + 1 - start if case.causal else min(start + chunk, case.keys) - start


def powers(first, last):
    length = first
    while length <= last:
        yield length
        length *= 2


def recipe_a():
    for width, causal, passes in itertools.product((64, 128), (True, False), ("fwd", "bwd")):
        for length in powers(512, 16384):
            yield Case("A", "softmax", passes, 16384 // length, 2048 // width, length, width, causal=causal)


def recipe_a2():
    for causal, passes, length in itertools.product((True, False), ("fwd", "bwd"), powers(2048, 32768)):
        yield Case("A2", "softmax", passes, 1, 64, length, 128, key_heads=8, causal=causal)


def recipe_b():
    for passes, kind, length in itertools.product(
        ("fwd", "bwd"), ("linear", "linear_normalized", "softmax"), powers(512, 32768)
    ):
        yield Case("B", kind, passes, 4, 32, length, 128)


def recipe_c():
    for kind, length in itertools.product(("linear_normalized", "performer", "softmax"), powers(128, 65536)):
        if kind != "softmax" or length <= 16384:
            yield Case("C", kind, "fwdbwd", 16, 8, length, 64)
    for length in powers(128, 65536):
        yield Case("C", "performer", "fwd", 16, 8, length, 64)


def recipe_d():
    shapes = [
        (1, 8192, 96, 128),
        (2, 16384, 16, 128),
        (4, 2048, 16, 128),
        (4, 4096, 64, 128),
        (8, 1024, 8, 64),
        (8, 2048, 32, 256),
    ]
    kinds = ("retention", "gated", "linear", "linear_normalized")
    for passes, kind, (batch, length, heads, width) in itertools.product(("fwd", "fwdbwd"), kinds, shapes):
        yield Case("D", kind, passes, batch, heads, length, width)


def recipe_e():
    for keys in powers(512, 32768):
        yield Case("E", "softmax", "fwd", 8, 32, 1, 128, key_heads=8, keys=keys)
    for batch in (1, 32):
        yield Case("E", "linear_step", "fwd", batch, 64, 1, 128)


def recipe_h():
    for passes, length in itertools.product(("fwd", "fwdbwd"), powers(512, 8192)):
        yield Case("H", "flash", passes, 8, 1, length, 128, value_width=1536)


def recipe_i():
    for width, length in itertools.product((64, 128), (1024, 4096)):
        yield Case("I", "softmax", "fwd", 1, 16, length, width, causal=False, dtype="f16")


RECIPES = {
    "A": recipe_a,
    "A2": recipe_a2,
    "B": recipe_b,
    "C": recipe_c,
    "D": recipe_d,
    "E": recipe_e,
    "H": recipe_h,
    "I": recipe_i,
}
TITLES = {
    "A": "softmax, 16 384 tokens, H·D 2048, bf16",
    "A2": "softmax with grouped heads, B 1, 64 heads on 8, D 128, bf16",
    "B": "causal, B 4, H 32, D 128, bf16",
    "C": "causal, B 16, H 8, D 64, bf16; Performer with 256 features",
    "D": "causal linear family, shapes of public benchmarks, bf16",
    "E": "one token; softmax B 8, 32 heads on 8, D 128 with a cache of keys and values; linear 64 heads, D 128; bf16",
    "H": "core of a FLASH layer, causal, B 8, D 128, E 1536, chunks of 256, bf16",
    "I": "accuracy of softmax, f16, entries N(0, 1) + N(0, 100)·Bernoulli(0.001)",
}
