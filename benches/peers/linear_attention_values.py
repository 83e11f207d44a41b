"""Writes tests/data/onnx_linear_attention.safetensors: what ONNX Runtime (com.microsoft) and the reference evaluator of
onnx (opset 27) give for the operator LinearAttention, every rule with every form of decay, from a state to a state.

    pip install -r benches/peers/requirements.txt
    python benches/peers/linear_attention_values.py
"""

import numpy
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file

from onnx_runtime import OnnxRuntime, inputs, model
from ours import ROOT

BATCH, HEADS, TOKENS, WIDTHS = 2, (4, 2), 37, (8, 6)
SCALE = 0.4
# Rules, and the dimensions of their log-decays.
CASES = [("linear", None), ("gated", 3), ("gated", 4), ("delta", None), ("gated_delta", 3), ("gated_delta", 4)]
DECAYS = {None: "none", 3: "token", 4: "channel"}


def operands():
    generator = numpy.random.default_rng(7)
    rows = lambda heads, width: generator.standard_normal((BATCH, heads, TOKENS, width), numpy.float32)
    q, k, v = rows(HEADS[0], WIDTHS[0]), rows(HEADS[1], WIDTHS[0]), rows(HEADS[1], WIDTHS[1])
    k /= numpy.linalg.norm(k, axis=-1, keepdims=True)
    state = generator.standard_normal((BATCH, HEADS[1], *WIDTHS), numpy.float32)
    decays = {3: -generator.random((BATCH, HEADS[1], TOKENS), numpy.float32)}
    decays[4] = -generator.random((BATCH, HEADS[1], TOKENS, WIDTHS[0]), numpy.float32)
    return {"q": q, "k": k, "v": v, "state": state}, decays, generator.random((BATCH, HEADS[1], TOKENS), numpy.float32)


def main():
    rows, decays, beta = operands()
    tensors = {**rows, "beta": beta, "decay.token": decays[3], "decay.channel": decays[4]}
    for rule, rank in CASES:
        case = {**rows, "log_decay": decays.get(rank), "beta": beta if "delta" in rule else None}
        runtime = OnnxRuntime(rule, **case, scale=SCALE)
        evaluator = ReferenceEvaluator(onnx.load_from_string(model(rule, inputs(**case), HEADS, SCALE, domain="")))
        for source, run in [("runtime", runtime.session.run), ("evaluator", evaluator.run)]:
            out, state = run(["output", "present_state"], inputs(**case))
            out = numpy.moveaxis(out.reshape(BATCH, TOKENS, HEADS[0], WIDTHS[1]), 2, 1)
            name = f"{source}.{rule}.{DECAYS[rank]}"
            tensors |= {f"{name}.out": numpy.ascontiguousarray(out), f"{name}.state": state}
    about = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__, "scale": str(SCALE)}
    save_file(tensors, ROOT / "tests/data/onnx_linear_attention.safetensors", about)


if __name__ == "__main__":
    main()
