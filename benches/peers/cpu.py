"""Times this crate and others on the CPU, sample by sample in turn, and prints the ratios.

    pip install -r benches/peers/requirements.txt
    python benches/peers/cpu.py
    python benches/peers/cpu.py --mechanisms softmax --lengths 512,2048 --widths 64,128 --dtypes f32 --passes fwd --threads 2

B 1, H 8. Every side has the same number of threads and allocates its results inside the time, each with its own
allocator. A ratio is the median over rounds of the peer's time over ours, for ours twice:

* through candle, as its users run it (`peer_candle`, with mimalloc, candle's threads sleeping between operations):
  out = attention(q, k, v); fwdbwd is the forward pass of
  Σ out ⊙ d_out and `backward`. PyTorch runs the same with its autograd.
* the engine alone (`peer_bench`), which is given d_out. So is PyTorch beside it.

Forward passes of PyTorch are those of inference mode. The peer is PyTorch for softmax (scaled_dot_product_attention), linear
and performer (eager in the chunk size of CHUNKS that is fastest for the case); candle's own operations for `operations`, softmax
with an N×M matrix; ONNX Runtime's LinearAttention for `recurrent` and `gated`, forward only.
"""

import argparse
import copy
import datetime
import itertools
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy
import onnxruntime
import torch

import peers
from onnx_runtime import OnnxRuntime
from ours import ROOT, Ours

BATCH, HEADS = 1, 8
CHUNKS = (32, 64, 128, 256)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Longest length of each: the quadratic work of softmax, the memory of N×M matrices and of eager FAVOR+.
LONGEST = {"softmax": 8192, "linear": 16384, "performer": 8192, "operations": 2048, "recurrent": 16384, "gated": 16384}
# The rules of ONNX Runtime.
RULES = {"recurrent": "linear", "gated": "gated"}
# Seconds that a sample should last at least, and that all samples of a case may take beyond the third pair.
SAMPLE, BUDGET = 0.02, 4.0
# Idle time before a sample of ours, in which PyTorch's threads stop waiting actively.
PAUSE = 0.01


def options():
    def names(known):
        def parse(text):
            unknown = [name for name in text.split(",") if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"unknown {unknown[0]}, known are {', '.join(known)}")
            return text.split(",")

        return parse

    def numbers(text):
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", type=names(list(LONGEST)), default=list(LONGEST))
    parser.add_argument("--lengths", type=numbers, default=LENGTHS)
    parser.add_argument("--widths", type=numbers, default=[64], help="of heads (default 64)")
    parser.add_argument("--dtypes", type=names(list(DTYPES)), default=list(DTYPES))
    parser.add_argument("--masks", type=names(["causal", "full"]), help="default causal, for softmax also full")
    parser.add_argument("--passes", type=names(["fwd", "fwdbwd"]), default=["fwd", "fwdbwd"])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--samples", type=int, default=9, help="rounds of a case (default 9)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benches/results/cpu_peers.md")
    return parser.parse_args()


def cases(args):
    for mechanism in args.mechanisms:
        both = mechanism in ("softmax", "operations")
        masks = args.masks or (["causal", "full"] if both else ["causal"])
        passes, dtypes = args.passes, args.dtypes
        if mechanism in RULES:
            passes, dtypes, masks = ["fwd"], ["f32"], ["causal"]
        lengths = [length for length in args.lengths if length <= LONGEST[mechanism]]
        yield from itertools.product([mechanism], args.threads, passes, masks, dtypes, args.widths, lengths)


class PyTorch:
    """One case of PyTorch's side."""

    def __init__(self, mechanism, passes, causal, dtype, width, length):
        self.has_loss = True
        shape = (BATCH, HEADS, length, width)
        self.is_training = passes == "fwdbwd"
        self.q, self.k, self.v = (
            torch.randn(shape, dtype=dtype).requires_grad_(self.is_training) for _ in range(3)
        )
        self.d_out = torch.randn(shape, dtype=dtype)
        omega = torch.randn(peers.DIRECTIONS, width, dtype=dtype)
        chunks = CHUNKS if mechanism != "softmax" else CHUNKS[:1]
        forms = [peers.attention(mechanism, causal, chunk, omega) for chunk in chunks]
        self.attention = forms[0]
        if len(forms) > 1:
            self.attention = min(forms, key=self.best_seconds)

    def best_seconds(self, attention):
        self.attention = attention
        self.seconds(1)
        return min(self.seconds(1) for _ in range(3))

    def run(self):
        if not self.is_training:
            with torch.inference_mode():
                return self.attention(self.q, self.k, self.v)
        out = self.attention(self.q, self.k, self.v)
        if self.has_loss:
            return torch.autograd.grad((out * self.d_out).sum(), (self.q, self.k, self.v))
        return torch.autograd.grad(out, (self.q, self.k, self.v), self.d_out)

    def without_loss(self):
        """The same with the gradient of the output given."""
        other = copy.copy(self)
        other.has_loss = False
        return other

    def seconds(self, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            self.run()
        return (time.perf_counter() - start) / repeats


class Case:
    """The sides of one case: the peer twice, and ours twice."""

    def __init__(self, engine, candle, operations, case, folder):
        mechanism, threads, passes, mask, dtype, width, length = case
        torch.set_num_threads(threads)
        fields = {
            "mechanism": "softmax" if mechanism == "operations" else "linear" if mechanism in RULES else mechanism,
            "pass": passes,
            "causal": mask == "causal",
            "dtype": dtype,
            "batch": BATCH,
            "heads": HEADS,
            "head_dim": width,
            "len": length,
            "threads": threads,
        }
        if mechanism in RULES:
            theirs = self.onnx_runtime(RULES[mechanism], width, length, threads, folder, fields)
        elif mechanism == "operations":
            theirs = operations
            operations.prepare_operations(**fields)
        else:
            theirs = PyTorch(mechanism, passes, mask == "causal", DTYPES[dtype], width, length)
        without_loss = theirs.without_loss() if isinstance(theirs, PyTorch) and passes == "fwdbwd" else None
        engine.prepare(**fields)
        candle.prepare(**fields)
        if mechanism in RULES:
            self.check(engine, theirs, folder)
        self.theirs, self.candle, self.without_loss, self.engine = theirs, candle, without_loss, engine

    def onnx_runtime(self, rule, width, length, threads, folder, fields):
        """Also writes the operands for our side."""
        generator = numpy.random.default_rng(0)
        q, k, v, d_out = (
            generator.standard_normal((BATCH, HEADS, length, width), numpy.float32) for _ in range(4)
        )
        log_decay = -generator.random((BATCH, HEADS, length), numpy.float32)
        arrays = [q, k, v, d_out] + ([log_decay] if rule == "gated" else [])
        (folder / "inputs").write_bytes(b"".join(array.tobytes() for array in arrays))
        fields["inputs"], fields["linear"] = str(folder / "inputs"), {"identity": True, "normalized": False}
        if rule == "gated":
            fields["log_decay"] = "token"
        return OnnxRuntime(rule, q, k, v, log_decay, threads)

    def check(self, engine, theirs, folder):
        wanted = theirs.results()
        engine.results(folder / "results")
        got = numpy.fromfile(folder / "results", numpy.float32)[: wanted.size].reshape(wanted.shape)
        error = numpy.abs(got - wanted).max() / numpy.abs(wanted).max()
        if not error < 1e-4:
            raise RuntimeError(f"results differ by {error}")

    def sides(self):
        return [side for side in (self.theirs, self.candle, self.without_loss, self.engine) if side]

    def rounds(self, samples):
        """Seconds of every side, in turn."""
        sides = self.sides()
        repeats = [max(1, math.ceil(SAMPLE / min(side.seconds(1) for _ in range(2)))) for side in sides]
        rounds, start = [], time.perf_counter()
        while len(rounds) < samples and (len(rounds) < 3 or time.perf_counter() - start < BUDGET):
            rounds.append([])
            for side, count in zip(sides, repeats):
                time.sleep(PAUSE)
                rounds[-1].append(side.seconds(count))
        if not self.without_loss:
            rounds = [(theirs, candle, theirs, engine) for theirs, candle, engine in rounds]
        return rounds


def compare(case, samples):
    """Median seconds and median ratios: the peer, through candle, ratio; the peer, the engine, ratio."""
    columns = list(zip(*case.rounds(samples)))
    medians = [statistics.median(column) for column in columns]
    ratio = lambda a, b: statistics.median(theirs / ours for theirs, ours in zip(columns[a], columns[b]))
    return [medians[0], medians[1], ratio(0, 1), medians[2], medians[3], ratio(2, 3)]


def output(*command):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {platform.system()}"


def heading():
    commit = output("git", "rev-parse", "--short", "HEAD") or "none"
    changed = " with changes" if output("git", "status", "--porcelain", "--", "src", "examples") else ""
    return "\n".join(
        [
            "# CPU: peers and attn-kernels in turn",
            "",
            f"{machine()}; PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}; ONNX Runtime "
            f"{onnxruntime.__version__}; {datetime.date.today()}; commit {commit}{changed}; "
            f"`python benches/peers/{pathlib.Path(__file__).name}{''.join(' ' + argument for argument in sys.argv[1:])}`",
            "",
            "B 1, H 8; Performer with 256 features. What each row is: `benches/peers/cpu.py`. Medians; ratios are "
            "those of one round, the peer's time over ours.",
            "",
            "| mechanism | peer | threads | pass | mask | dtype | width | length | peer ms | through candle ms | ratio "
            "| peer, d_out given, ms | engine alone ms | ratio |",
            "| --- | --- | ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
    )


def peer(mechanism):
    return "ONNX Runtime" if mechanism in RULES else "candle" if mechanism == "operations" else "PyTorch"


def main():
    args = options()
    torch.manual_seed(0)
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f}); times will be off", file=sys.stderr)
    peers.check_eager()
    lines = [heading()]
    print(lines[0])
    engine, candles = Ours(), {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(args):
            mechanism, threads, passes, mask, dtype, width, length = case
            if threads not in candles:
                candles[threads] = [Ours(name="peer_candle", threads=threads) for _ in range(2)]
            sides = Case(engine, *candles[threads], case, pathlib.Path(folder))
            theirs, mine, ratio, given, alone, engine_ratio = compare(sides, args.samples)
            lines.append(
                f"| {mechanism} | {peer(mechanism)} | {threads} | {passes} | {mask} | {dtype} | {width} | {length} "
                f"| {theirs * 1e3:.3f} | {mine * 1e3:.3f} | {ratio:.2f} "
                f"| {given * 1e3:.3f} | {alone * 1e3:.3f} | {engine_ratio:.2f} |"
            )
            print(lines[-1], flush=True)
    for program in (engine, *itertools.chain(*candles.values())):
        program.close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
