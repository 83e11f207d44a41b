"""Times the delta engine and others on the CPU, sample by sample in turn, and prints the ratios.

    pip install -r benches/peers/requirements.txt
    python benches/peers/delta.py
    python benches/peers/delta.py --widths 64 --passes fwd --threads 2 --samples 5

B 1, H 8, N 2048, f32. Keys and queries are of norm 1, log-decays above -0.1. Every side has the same number of threads and
allocates its results inside the time; a ratio is the median over rounds of the peer's time over ours (`peer_delta`, the
engine on slices). Peers: ONNX Runtime's LinearAttention, forward; the recurrence token by token in PyTorch, and in chunks, the
fastest of CHUNKS, forward in inference mode and with autograd for gradients. All results are compared first.
"""

import argparse
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy
import torch
import torch.nn.functional as F

from onnx_runtime import OnnxRuntime
from ours import Ours

BATCH, HEADS = 1, 8
CHUNKS = (16, 32, 64, 128)
# Rule of ONNX Runtime, dimensions of the log-decay.
FORMS = {
    "GLA": ("gated", 4),
    "DeltaNet": ("delta", 0),
    "Gated DeltaNet": ("gated_delta", 3),
    "Kimi Delta Attention": ("gated_delta", 4),
}
# Multiply-adds with the state for each number of it and token, by the recurrence; gradients take three times as many.
PRODUCTS = {"GLA": 2, "DeltaNet": 3, "Gated DeltaNet": 3, "Kimi Delta Attention": 3}
# Seconds that a sample should last at least.
SAMPLE, PAUSE = 0.05, 0.01


def loop(form, q, k, v, beta, log_decay):
    """Token by token."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    decays = None if log_decay is None else (log_decay[..., None] if log_decay.dim() == 3 else log_decay).exp()
    outs = []
    for t in range(q.shape[2]):
        if decays is not None:
            state = state * decays[:, :, t, :, None]
        row, value = k[:, :, t, None], v[:, :, t, None]
        if FORMS[form][0] != "gated":
            value = beta[:, :, t, None, None] * (value - row @ state)
        state = state + row.mT * value
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, 2)


def chunked(form, q, k, v, beta, log_decay, chunk):
    """Everything that does not need the state for all chunks at once, then a loop over chunks with the state. With a decay
    per channel rows are divided by their decays from the chunk's start, which holds for weak ones."""
    rule, rank = FORMS[form]
    q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))
    causal = torch.ones(chunk, chunk).tril()
    through = None
    if rank == 3:
        sums = log_decay.unflatten(2, (-1, chunk)).cumsum(-1)
        between = (sums[..., :, None] - sums[..., None, :]).exp() * causal
        through, behind = sums.exp()[..., None], (sums[..., -1:] - sums).exp()[..., None]
        reading, early, late = q * through, k * through, k * behind
        scores, own = (q @ k.mT) * between, (k @ k.mT) * between
    elif rank == 4:
        sums = log_decay.unflatten(2, (-1, chunk)).cumsum(-2)
        through = sums.exp()
        reading, early, inverse = q * through, k * through, k * (-sums).exp()
        late = k * (sums[..., -1:, :] - sums).exp()
        scores, own = (reading @ inverse.mT) * causal, (early @ inverse.mT) * causal
    else:
        reading, early, late = q, k, k
        scores, own = (q @ k.mT) * causal, k @ k.mT
    if rule != "gated":
        beta = beta.unflatten(2, (-1, chunk))[..., None]
        system = torch.eye(chunk) + (beta * own).tril(-1)
        both = torch.linalg.solve_triangular(system, beta * torch.cat([v, early], -1), upper=False)
        v, early = both.split([v.shape[-1], k.shape[-1]], -1)
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outs = []
    for c in range(q.shape[2]):
        value = v[:, :, c] if rule == "gated" else v[:, :, c] - early[:, :, c] @ state
        outs.append(scores[:, :, c] @ value + reading[:, :, c] @ state)
        shrunk = state if through is None else state * through[:, :, c, -1, :, None]
        state = shrunk + late[:, :, c].mT @ value
    return torch.stack(outs, 2).flatten(2, 3)


class PyTorch:
    def __init__(self, attention, operands, d_out, gradients):
        self.attention, self.d_out, self.gradients = attention, d_out, gradients
        self.operands = [None if x is None else x.detach().requires_grad_(gradients) for x in operands]

    def run(self):
        if not self.gradients:
            with torch.inference_mode():
                return [self.attention(*self.operands)]
        out = self.attention(*self.operands)
        given = [x for x in self.operands if x is not None]
        # β has no part in GLA.
        return [out.detach(), *torch.autograd.grad(out, given, self.d_out, allow_unused=True)[:3]]

    def seconds(self, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            self.run()
        return (time.perf_counter() - start) / repeats


def operands(width, length, form):
    generator = numpy.random.default_rng(0)
    normal = lambda: generator.standard_normal((BATCH, HEADS, length, width), numpy.float32)
    unit = lambda x: x / numpy.linalg.norm(x, axis=-1, keepdims=True)
    q, k, v, d_out = unit(normal()), unit(normal()), normal(), normal()
    beta = generator.random((BATCH, HEADS, length), numpy.float32)
    rank = FORMS[form][1]
    log_decay = -0.1 * generator.random((BATCH, HEADS, length, width)[:rank], numpy.float32) if rank else None
    return q, k, v, d_out, beta, log_decay


def check(name, got, wanted):
    for x, y in zip(got, wanted):
        error = numpy.linalg.norm(numpy.asarray(x) - y) / numpy.linalg.norm(y)
        if not error < 1e-4:
            raise RuntimeError(f"{name}: results differ by {error}")


def sides(ours, form, width, gradients, args, threads, folder):
    """Ours, and the peers by name."""
    torch.set_num_threads(threads)
    arrays = operands(width, args.length, form)
    (folder / "inputs").write_bytes(b"".join(x.tobytes() for x in arrays if x is not None))
    rule, rank = FORMS[form]
    case = {"rule": rule, "decay_rank": rank, "gradients": gradients, "batch": BATCH, "heads": HEADS, "len": args.length}
    ours.prepare(**case, width=width, threads=threads, inputs=str(folder / "inputs"))
    ours.results(folder / "results")
    got = numpy.fromfile(folder / "results", numpy.float32).reshape(-1, *arrays[0].shape)
    q, k, v, d_out, beta, log_decay = arrays
    peers = {}
    if not gradients:
        peers["ONNX Runtime"] = OnnxRuntime(rule, q, k, v, log_decay, threads, beta)
        check("ONNX Runtime", [peers["ONNX Runtime"].results()], got)
    tensors = [None if x is None else torch.from_numpy(x) for x in (q, k, v, beta, log_decay)]
    make = lambda attention: PyTorch(attention, tensors, torch.from_numpy(d_out), gradients)
    if "loop" in args.peers:
        peers["token loop"] = make(lambda *x: loop(form, *x))
        check("token loop", [x.detach() for x in peers["token loop"].run()], got)
    if "chunks" in args.peers:
        best = {}
        for chunk in CHUNKS:
            if rule == "gated_delta" and rank == 4 and chunk > 64:
                continue
            side = make(lambda *x, chunk=chunk: chunked(form, *x, chunk))
            check(f"chunks of {chunk}", [x.detach() for x in side.run()], got)
            best[chunk] = min(side.seconds(1) for _ in range(3)), side
        chunk = min(best, key=lambda chunk: best[chunk][0])
        peers[f"chunks of {chunk}"] = best[chunk][1]
    return {"ours": ours, **peers}


def main():
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", type=lambda text: text.split(","), default=list(FORMS))
    parser.add_argument("--widths", type=numbers, default=[64, 128])
    parser.add_argument("--passes", type=lambda text: text.split(","), default=["fwd", "fwdbwd"])
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["loop", "chunks"])
    parser.add_argument("--threads", type=numbers, default=[2])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=7, help="rounds of a case (default 7)")
    parser.add_argument("--program", help="the example peer_delta, if it is built already")
    args = parser.parse_args()
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f}); times will be off", file=sys.stderr)
    ours = Ours(args.program, name="peer_delta")
    print("| form | width | threads | pass | peer | peer ms | ours ms | ratio | ours, GFLOP/s of the recurrence |")
    print("| --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for form in args.forms:
            for width in args.widths:
                for threads in args.threads:
                    for passes in args.passes:
                        compare(ours, form, width, passes, args, threads, pathlib.Path(folder))
    ours.close()


def compare(ours, form, width, passes, args, threads, folder):
    all_sides = sides(ours, form, width, passes == "fwdbwd", args, threads, folder)
    repeats = {name: max(1, math.ceil(SAMPLE / side.seconds(1))) for name, side in all_sides.items()}
    rounds = []
    for _ in range(args.samples):
        rounds.append({})
        for name, side in all_sides.items():
            time.sleep(PAUSE)
            rounds[-1][name] = side.seconds(repeats[name])
    median = lambda f: statistics.median(map(f, rounds))
    mine = median(lambda one: one["ours"])
    operations = 2 * PRODUCTS[form] * HEADS * args.length * width**2 * (3 if passes == "fwdbwd" else 1)
    for name in list(all_sides)[1:]:
        theirs, ratio = median(lambda one: one[name]), median(lambda one: one[name] / one["ours"])
        print(
            f"| {form} | {width} | {threads} | {passes} | {name} | {theirs * 1e3:.2f} | {mine * 1e3:.2f} | {ratio:.2f} "
            f"| {operations / mine / 1e9:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
