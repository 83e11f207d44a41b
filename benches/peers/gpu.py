"""Times this crate and its peers on a GPU in turn, and writes records, a table and a picture per recipe.

    pip install torch fla-core einops      # what is absent is named and skipped
    python benches/peers/gpu.py --out target/peers
    python benches/peers/gpu.py --recipes A,D --longest 4096 --out target/peers
    python benches/peers/report.py target/peers --into benches/results/h200.md

Both sides get the same operands. A time is the median over at least 20 runs, in rounds in which the sides alternate,
of events of the device around a run whose operands are not in the cache; gradients and results are allocated beforehand
on our side, by PyTorch's caching allocator on theirs. Results are compared with each other, and one head with an f64
formula. Records are kept after each case: the same command goes on where it was stopped.

`--device cpu` runs what can be run without a GPU, with few heads and no batches, to try the program.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import tempfile
import time

import torch

import forms
import peers
import report
from ours import Ours
from recipes import DIRECTIONS, PEERS, RECIPES
from timing import BATCH, Timer

ROUNDS = 3
# Seconds of samples of one side in a round beyond the fewest, and the fewest samples.
BUDGET, FEWEST = 0.5, math.ceil(BATCH / ROUNDS)
# Numbers of results up to which they are compared, and rows up to which the materialised reference is computed.
COMPARED, MATERIALISED = 1 << 28, 4096
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def options():
    def names(text):
        unknown = [name for name in text.split(",") if name not in RECIPES]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]}, known are {', '.join(RECIPES)}")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--recipes", type=names, default=list(RECIPES))
    parser.add_argument("--longest", type=int, default=1 << 20, help="no cases of more keys than this")
    parser.add_argument("--minutes", type=float, default=1e9, help="begins no case after so long")
    parser.add_argument("--program", help="the example peer_bench, if it is built already")
    parser.add_argument("--commit", default="", help="to be named in the records")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("target/peers"))
    parser.add_argument("--scratch", type=pathlib.Path, help="folder for operands, up to 8 GiB [default: temporary]")
    return parser.parse_args()


def small(case):
    """One batch entry and at most two key heads."""
    key_heads = min(case.key_heads, 2)
    heads = key_heads * (case.heads // case.key_heads)
    return dataclasses.replace(case, batch=1, heads=heads, key_heads=key_heads)


@dataclasses.dataclass
class Operands:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor
    # [H] or [B, H, N] in f32, [m, D] in f32, and the state in f32.
    log_decay: torch.Tensor | None = None
    omega: torch.Tensor | None = None
    s: torch.Tensor | None = None
    z: torch.Tensor | None = None
    # [B, N, H], for fla.
    gate_by_token: torch.Tensor | None = None

    def map(self, change):
        """The same with each tensor changed."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Operands(**{name: tensor if tensor is None else change(tensor) for name, tensor in tensors.items()})

    def inputs(self):
        """What gradients are taken of."""
        gate = [] if self.gate_by_token is None else [self.gate_by_token]
        return [self.q, self.k, self.v, *gate]


def make(case, device):
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(shape):
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        if case.recipe == "I":
            x += 10 * torch.randn(shape, generator=generator, device=device) * (
                torch.rand(shape, generator=generator, device=device) < 0.001
            )
        return x

    q, k, v, d_out = (normal(shape).to(dtype) for shape in case.shapes())
    if case.kind in ("linear_normalized", "linear_step"):
        q, k = q.abs(), k.abs()
    if case.kind in ("linear", "flash"):
        q, k = q * case.width**-0.5, k
    operands = Operands(q, k, v, d_out)
    if case.kind == "retention":
        operands.log_decay = forms.retention_log_decay(case.heads).to(device)
    if case.kind == "gated":
        gate = torch.nn.functional.logsigmoid(normal((case.batch, case.heads, case.length)) + 4)
        operands.log_decay, operands.gate_by_token = gate, gate.transpose(1, 2).contiguous()
    if case.kind == "performer":
        operands.q, operands.k = q / 4, k / 4
        operands.omega = normal((DIRECTIONS, case.width))
    if case.state_shapes():
        operands.s, operands.z = (normal(shape).abs() for shape in case.state_shapes())
    return operands


def write(operands, path):
    tensors = [operands.q, operands.k, operands.v, operands.d_out]
    tensors += [operands.log_decay, operands.omega, operands.s, operands.z]
    with open(path, "wb") as file:
        for tensor in tensors:
            if tensor is not None:
                file.write(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)


def request(case, device, path):
    """The case as our program takes it."""
    fields = {
        "mechanism": {"linear_normalized": "linear", "linear_step": "linear", "gated": "linear"}.get(
            case.kind, case.kind
        ),
        "pass": case.passes,
        "device": "gpu" if device.type == "cuda" else "cpu",
        "head_dim": case.width,
        "value_dim": case.value_width,
        "len": case.length,
        "inputs": str(path),
        "log_decay": {"retention": "head", "gated": "token"}.get(case.kind),
        "state": bool(case.state_shapes()),
    }
    fields |= {name: getattr(case, name) for name in ("causal", "dtype", "batch", "heads", "key_heads", "keys")}
    if fields["mechanism"] == "linear":
        normalized = case.kind in ("linear_normalized", "linear_step")
        fields["linear"] = {"identity": True, "normalized": normalized}
    return fields


class Mine:
    name = "ours"

    def __init__(self, ours, case, device, path):
        self.ours, self.extra_bytes = ours, 0
        ours.prepare(**request(case, device, path))
        self.case, self.path = case, path.with_suffix(".results")

    def samples(self, count):
        seconds, self.host_seconds, self.extra_bytes = self.ours.samples(count)
        return seconds

    def results(self):
        """In f32: the output, or the gradients of q, k, v."""
        self.ours.results(self.path)
        flat = torch.from_file(str(self.path), size=self.path.stat().st_size // 4, dtype=torch.float32)
        q, k, v, out = self.case.shapes()
        shapes = [out] if self.case.passes == "fwd" else [q, k, v]
        parts = flat.split([math.prod(shape) for shape in shapes] + [len(flat) - sum(map(math.prod, shapes))])
        results = [part.view(shape) for part, shape in zip(parts, shapes)]
        if self.case.kind == "flash" and self.case.passes != "fwd":
            # The gradients through the branch between chunks follow.
            for result, part in zip(results, parts[-1].split([math.prod(q), math.prod(k)])):
                result += part.view(result.shape)
        return results


class Theirs:
    def __init__(self, timer, case, name, operands):
        self.timer, self.case, self.name, self.host_seconds = timer, case, name, 1e-4
        self.is_training = case.passes != "fwd"
        self.by_token = name in forms.FLA
        self.fresh = operands
        functions = forms.attention(case, name, timer.device)
        if self.by_token:
            turned = (x.transpose(1, 2).contiguous() for x in (operands.q, operands.k, operands.v, operands.d_out))
            operands = dataclasses.replace(operands, **dict(zip(("q", "k", "v", "d_out"), turned)))
        if operands.omega is not None:
            operands = dataclasses.replace(operands, omega=operands.omega.to(operands.q.dtype))
        self.sets = [operands.map(torch.clone) for _ in range(timer.copies(case))]
        if self.is_training:
            for x in (x for operands in self.sets for x in operands.inputs()):
                x.requires_grad_()
        self.attention = functions[0]
        if len(functions) > 1:
            self.attention = min(functions, key=self.quickest)
        self.prepare()

    def quickest(self, function):
        self.attention = function
        self.prepare()
        return min(self.samples(3))

    def prepare(self):
        self.runs = [self.run_of(operands) for operands in self.sets]
        for _ in range(3):
            self.runs[0]()
        self.samples(len(self.runs))

    def run_of(self, operands):
        if not self.is_training:
            return lambda: self.forward(operands)
        if self.case.passes == "bwd":
            out = self.attention(operands)
            return lambda: torch.autograd.grad(out, operands.inputs(), operands.d_out, retain_graph=True)
        return lambda: torch.autograd.grad(self.attention(operands), operands.inputs(), operands.d_out)

    def forward(self, operands):
        with torch.inference_mode():
            return self.attention(operands)

    def samples(self, count):
        seconds, self.host_seconds = self.timer.samples(self.runs, count, self.host_seconds)
        return seconds

    def extra_bytes(self):
        """Memory of a run beyond its operands and results."""
        if self.timer.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = self.runs[0]()
        results = results if isinstance(results, tuple) else [results]
        own = sum(x.numel() * x.element_size() for x in results)
        return max(torch.cuda.max_memory_allocated() - before - own, 0)

    def results(self):
        # A run may have changed the state of its operands.
        run = self.run_of(self.fresh.map(torch.clone)) if self.case.state_shapes() else self.runs[0]
        results = run()
        results = results[:3] if isinstance(results, tuple) else [results]
        return [(x.transpose(1, 2) if self.by_token else x).float().cpu() for x in results]


def wanted(case, operands):
    """Of the last head of the last batch entry, in f64."""
    if case.kind == "linear_step" or max(case.length, case.keys) > MATERIALISED:
        return None
    q, k, v, d_out = (x[-1, -1].double() for x in (operands.q, operands.k, operands.v, operands.d_out))
    if case.heads != case.key_heads and case.passes != "fwd":
        return None
    for x in (q, k, v):
        x.requires_grad_()
    omega = None if operands.omega is None else operands.omega.double()
    decay = None
    if operands.log_decay is not None:
        decay = (operands.log_decay[-1] if case.kind == "retention" else operands.log_decay[-1, -1]).double()
    out = forms.reference(case, q, k, v, omega, decay)
    if case.passes == "fwd":
        return [out.detach().cpu()]
    return [x.cpu() for x in torch.autograd.grad(out, (q, k, v), d_out)]


def distance(results, others):
    """The largest root mean square of a difference, relative to the others'."""
    return max(((x - y).double().norm() / y.double().norm()).item() for x, y in zip(results, others))


def errors(case, operands, sides):
    """Distances from the reference and, of peers, from ours."""
    if 3 * max(math.prod(shape) for shape in case.shapes()) > COMPARED:
        return
    reference, mine = wanted(case, operands), None
    for side, record in sides:
        results = side.results()
        mine = mine or results
        if reference is not None:
            record["error"] = distance([x[-1, -1] for x in results], reference)
        record["from_ours"] = distance(results, mine)


def first_line(error):
    return str(error).strip().splitlines()[0]


def compare(timer, ours, case, scratch):
    """Records of all sides of a case."""
    if timer.device.type == "cuda":
        torch.cuda.empty_cache()
    operands = make(case, timer.device)
    path = scratch / "operands"
    write(operands, path)
    sides = [(Mine(ours, case, timer.device, path), {"side": "ours"})]
    records = [sides[0][1]]
    for name in PEERS[case.kind]:
        record = {"side": name}
        records.append(record)
        try:
            sides.append((Theirs(timer, case, name, operands), record))
        except (forms.Skipped, RuntimeError, NotImplementedError) as error:
            record["skipped"] = first_line(error)
    times = [[] for _ in sides]
    for _ in range(ROUNDS):
        for (side, _), seconds in zip(sides, times):
            count = FEWEST if not seconds else int(BUDGET / statistics.median(seconds))
            seconds += side.samples(min(max(count, FEWEST), BATCH))
    for (side, record), seconds in zip(sides, times):
        extra = side.extra_bytes() if callable(side.extra_bytes) else side.extra_bytes
        record |= {"ms": 1e3 * statistics.median(seconds), "samples": len(seconds), "extra_bytes": extra}
        record["host_ms"] = 1e3 * side.host_seconds
    errors(case, operands, sides)
    return records


def about(args, timer):
    is_gpu = timer.device.type == "cuda"
    name = torch.cuda.get_device_name(timer.device) if is_gpu else "cpu"
    return {"device": name, "torch": torch.__version__, "commit": args.commit, **timer.bounds()}


def main():
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    path = args.out / "records.json"
    timer = Timer(device)
    kept = json.loads(path.read_text()) if path.exists() else {"about": about(args, timer), "cases": {}}
    peers.check_eager()
    ours = Ours(args.program, features=["gpu"] if args.device == "cuda" else [])
    cases = [case for recipe in args.recipes for case in RECIPES[recipe]() if case.keys <= args.longest]
    if args.device == "cpu":
        cases = [small(case) for case in cases]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for number, case in enumerate(cases):
            if case.name in kept["cases"]:
                continue
            if time.monotonic() - start > 60 * args.minutes:
                print(f"{len(cases) - number} cases are left after {args.minutes} minutes")
                break
            try:
                records = compare(timer, ours, case, pathlib.Path(scratch))
            except RuntimeError as error:
                records = [{"side": "ours", "failed": first_line(error)}]
                # It may have lost its device.
                ours.close()
                ours = Ours(ours.program)
            kept["cases"][case.name] = {"case": dataclasses.asdict(case), "records": records}
            path.write_text(json.dumps(kept, indent=1))
            print(f"{number + 1}/{len(cases)} {case.name}: {report.brief(records)}", flush=True)
    report.write(args.out, kept, ours)
    ours.close()
    return report.failures(kept)


if __name__ == "__main__":
    raise SystemExit("\n".join(main()) or 0)
