"""Times PyTorch and this crate on the CPU, sample by sample in turn, and prints the ratios.

    pip install -r benches/peers/requirements.txt
    python benches/peers/cpu.py
    python benches/peers/cpu.py --mechanisms softmax --lengths 512,2048 --dtypes f32 --passes fwd --threads 2

B 1, H 8, D 64. A ratio is the median over pairs of samples of PyTorch's time over ours. Both sides have the same
number of threads, and both allocate their results inside the time. The chunk of the eager forms is the one of
CHUNKS that is fastest for the case.
"""

import argparse
import datetime
import itertools
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import torch

import peers
from ours import ROOT, Ours

BATCH, HEADS, HEAD_DIM = 1, 8, 64
CHUNKS = (32, 64, 128, 256)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Longest length of each mechanism: the quadratic work of softmax, the memory of eager FAVOR+.
LONGEST = {"softmax": 8192, "linear": 16384, "performer": 8192}
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
    parser.add_argument("--dtypes", type=names(list(DTYPES)), default=list(DTYPES))
    parser.add_argument("--masks", type=names(["causal", "full"]), help="default causal, for softmax also full")
    parser.add_argument("--passes", type=names(["fwd", "fwdbwd"]), default=["fwd", "fwdbwd"])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--samples", type=int, default=9, help="pairs of samples of a case (default 9)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benches/results/cpu_peers.md")
    return parser.parse_args()


def cases(args):
    for mechanism in args.mechanisms:
        masks = args.masks or (["causal", "full"] if mechanism == "softmax" else ["causal"])
        lengths = [length for length in args.lengths if length <= LONGEST[mechanism]]
        yield from itertools.product([mechanism], args.threads, args.passes, masks, args.dtypes, lengths)


class Theirs:
    """One case of PyTorch's side."""

    def __init__(self, mechanism, passes, causal, dtype, length):
        shape = (BATCH, HEADS, length, HEAD_DIM)
        self.is_training = passes == "fwdbwd"
        self.q, self.k, self.v = (
            torch.randn(shape, dtype=dtype).requires_grad_(self.is_training) for _ in range(3)
        )
        self.d_out = torch.randn(shape, dtype=dtype)
        omega = torch.randn(peers.DIRECTIONS, HEAD_DIM, dtype=dtype)
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
        return torch.autograd.grad(out, (self.q, self.k, self.v), self.d_out)

    def seconds(self, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            self.run()
        return (time.perf_counter() - start) / repeats


def compare(ours, case, samples):
    """Median seconds of PyTorch and of this crate, and the median of their ratios."""
    mechanism, threads, passes, mask, dtype, length = case
    torch.set_num_threads(threads)
    theirs = Theirs(mechanism, passes, mask == "causal", DTYPES[dtype], length)
    ours.prepare(
        mechanism=mechanism,
        **{"pass": passes},
        causal=mask == "causal",
        dtype=dtype,
        batch=BATCH,
        heads=HEADS,
        head_dim=HEAD_DIM,
        len=length,
        threads=threads,
    )
    sides = (theirs, ours)
    repeats = [max(1, math.ceil(SAMPLE / min(side.seconds(1) for _ in range(2)))) for side in sides]
    pairs, start = [], time.perf_counter()
    while len(pairs) < samples and (len(pairs) < 3 or time.perf_counter() - start < BUDGET):
        pair = []
        for side, count in zip(sides, repeats):
            time.sleep(PAUSE)
            pair.append(side.seconds(count))
        pairs.append(pair)
    their_seconds, our_seconds = (statistics.median(times) for times in zip(*pairs))
    return their_seconds, our_seconds, statistics.median(theirs / ours for theirs, ours in pairs)


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
            "# CPU: PyTorch and attn-kernels in turn",
            "",
            f"{machine()}; PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}; "
            f"{datetime.date.today()}; commit {commit}{changed}; `python benches/peers/{pathlib.Path(__file__).name}"
            f"{''.join(' ' + argument for argument in sys.argv[1:])}`",
            "",
            "B 1, H 8, D 64; Performer with 256 features. `softmax` is scaled_dot_product_attention, the others are "
            "eager PyTorch in the chunk size that is fastest for it. Medians; the ratio is that of paired samples.",
            "",
            "| mechanism | threads | pass | mask | dtype | length | PyTorch ms | ours ms | ratio |",
            "| --- | ---: | --- | --- | --- | ---: | ---: | ---: | ---: |",
        ]
    )


def main():
    args = options()
    torch.manual_seed(0)
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f}); times will be off", file=sys.stderr)
    peers.check_eager()
    lines = [heading()]
    print(lines[0])
    ours = Ours()
    for case in cases(args):
        theirs, mine, ratio = compare(ours, case, args.samples)
        mechanism, threads, passes, mask, dtype, length = case
        lines.append(
            f"| {mechanism} | {threads} | {passes} | {mask} | {dtype} | {length} "
            f"| {theirs * 1e3:.3f} | {mine * 1e3:.3f} | {ratio:.2f} |"
        )
        print(lines[-1], flush=True)
    ours.close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
