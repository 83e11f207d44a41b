"""The operator `LinearAttention` of ONNX: in ONNX Runtime on the CPU, forward only.

    S'_t = e^{g_t} S_{t-1}                       (rules gated and gated_delta; g per head and token, or per channel)
    S_t = S'_t + k_t v_t                         (rules linear and gated)
    S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)   (rules delta and gated_delta)
    o_t = scale q_t S_t
"""

import time

import numpy
import onnxruntime
from onnx import TensorProto, helper

OPTIONAL = ("past_state", "decay", "beta")


def model(rule, feeds, heads, scale=1.0, domain="com.microsoft"):
    """One operator on inputs of these shapes, `heads` of queries and of keys and values; serialized."""
    names = ["query", "key", "value", *(name if name in feeds else "" for name in OPTIONAL)]
    while not names[-1]:
        names.pop()
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    node = helper.make_node(
        "LinearAttention",
        names,
        ["output", "present_state"],
        domain=domain,
        update_rule=rule,
        q_num_heads=heads[0],
        kv_num_heads=heads[1],
        scale=scale,
    )
    batch, length, _ = feeds["query"].shape
    widths = [feeds["key"].shape[2] // heads[1], feeds["value"].shape[2] // heads[1]]
    inputs = [value(name, feeds[name].shape) for name in names if name]
    outputs = [
        value("output", [batch, length, heads[0] * widths[1]]),
        value("present_state", [batch, heads[1], *widths]),
    ]
    graph = helper.make_graph([node], "linear_attention", inputs, outputs)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)] if domain else [helper.make_opsetid("", 27)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def side_by_side(x):
    """Heads in the last dimension: [B, H, N, D] as [B, N, H D], [B, H, N] as [B, N, H]."""
    batch, _, length, *_ = x.shape
    return numpy.ascontiguousarray(numpy.moveaxis(x, 1, 2)).reshape(batch, length, -1)


def inputs(q, k, v, log_decay=None, beta=None, state=None):
    """Inputs of the operator from q, k, v [B, H, N, D], the log-decay [B, H, N] or [B, H, N, D], beta [B, H, N] and the
    state [B, H, D, E]."""
    feeds = {"query": q, "key": k, "value": v, "decay": log_decay, "beta": beta}
    feeds = {name: side_by_side(x) for name, x in feeds.items() if x is not None}
    return feeds if state is None else {**feeds, "past_state": state}


class OnnxRuntime:
    """One case, its operands as for `inputs`."""

    def __init__(self, rule, q, k, v, log_decay=None, threads=1, beta=None, state=None, scale=1.0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.feeds = inputs(q, k, v, log_decay if "gated" in rule else None, beta if "delta" in rule else None, state)
        serialized = model(rule, self.feeds, (q.shape[1], k.shape[1]), scale)
        self.session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        self.heads = q.shape[1]

    def results(self):
        """[B, H, N, E]"""
        out = self.session.run(["output"], self.feeds)[0]
        return numpy.moveaxis(out.reshape(*out.shape[:2], self.heads, -1), 2, 1)

    def seconds(self, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            self.session.run(["output"], self.feeds)
        return (time.perf_counter() - start) / repeats
