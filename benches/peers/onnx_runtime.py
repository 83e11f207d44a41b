"""ONNX Runtime's `LinearAttention` on the CPU: the recurrence without feature map and divisor, forward only.

    S_t = S_{t-1} + k_t v_t             (rule linear)
    S_t = e^{g_t} S_{t-1} + k_t v_t     (rule gated, g per head and token)
    o_t = q_t S_t
"""

import time

import numpy
import onnxruntime
from onnx import TensorProto, helper

RULES = ("linear", "gated")


def model(rule, batch, length, heads, width):
    """One operator. Heads are side by side in the last dimension."""
    names = ["query", "key", "value", "past_state", "decay"]
    used = names[:3] if rule == "linear" else names[:3] + ["", "decay"]
    rows, state = [batch, length, heads * width], [batch, heads, width, width]
    shapes = {**dict.fromkeys(names[:3], rows), "decay": [batch, length, heads]}
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    node = helper.make_node(
        "LinearAttention",
        used,
        ["output", "present_state"],
        domain="com.microsoft",
        update_rule=rule,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=1.0,
    )
    inputs = [value(name, shapes[name]) for name in used if name]
    outputs = [value("output", rows), value("present_state", state)]
    graph = helper.make_graph([node], "linear_attention", inputs, outputs)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


class OnnxRuntime:
    """One case: q, k, v are [B, H, N, D], the log-decay [B, H, N]."""

    def __init__(self, rule, q, k, v, log_decay, threads):
        batch, heads, length, width = q.shape
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        serialized = model(rule, batch, length, heads, width)
        self.session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        side_by_side = lambda x: numpy.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(batch, length, -1)
        self.feeds = {"query": side_by_side(q), "key": side_by_side(k), "value": side_by_side(v)}
        if rule == "gated":
            self.feeds["decay"] = numpy.ascontiguousarray(log_decay.transpose(0, 2, 1))
        self.shape = q.shape

    def results(self):
        """[B, H, N, D]"""
        batch, heads, length, width = self.shape
        return self.session.run(["output"], self.feeds)[0].reshape(batch, length, heads, width).transpose(0, 2, 1, 3)

    def seconds(self, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            self.session.run(["output"], self.feeds)
        return (time.perf_counter() - start) / repeats
