"""StepAttention: a decode step's attention is computed another way, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from llmx.export.step_attention import StepAttention

HEADS, KV_HEADS, HEAD_DIM, LENGTH, BATCH = 6, 2, 32, 40, 4
SCALE = 0.137  # no power of two


def one_node(packed: bool, dtype: ir.DataType = ir.DataType.FLOAT, sink: bool = False, **attributes: float) -> ir.Model:
    """A graph of one GroupQueryAttention with rotary embedding and a cache, one position a row."""

    def value(name: str, shape: list[int | str], kind: ir.DataType = dtype) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))

    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM if packed else HEADS * HEAD_DIM
    state = ["batch", KV_HEADS, LENGTH, HEAD_DIM]
    query = value("query", ["batch", 1, rows])
    new = [value(name, ["batch", 1, KV_HEADS * HEAD_DIM]) for name in ("key", "value")]
    past = [value(name, state) for name in ("past_key", "past_value")]
    lengths, total = value("seqlens_k", ["batch"], ir.DataType.INT32), value("total", [], ir.DataType.INT32)
    tables = [value(name, [LENGTH, HEAD_DIM // 2]) for name in ("cos", "sin")]
    sinks = [value("sink", [HEADS])] if sink else []
    inputs = [query, *([None, None] if packed else new), *past, lengths, total, *tables]
    inputs += [None, None, *sinks] if sink else []
    given = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": SCALE, "do_rotary": 1, **attributes}
    node = ir.node("GroupQueryAttention", inputs, given, domain="com.microsoft", num_outputs=3)
    for output, name, shape in zip(
        node.outputs, ("y", "new_key", "new_value"), (["batch", 1, HEADS * HEAD_DIM], state, state), strict=True
    ):
        output.name, output.shape, output.type = name, ir.Shape(shape), ir.TensorType(dtype)
    opsets = {"": 21, "com.microsoft": 1}
    read = [item for item in inputs if item is not None]
    return ir.Model(ir.Graph(read, node.outputs, nodes=[node], opset_imports=opsets, name="g"), ir_version=10)


def run(model: ir.Model, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    lengths = rng.integers(0, LENGTH, BATCH, dtype=np.int32)
    feeds: dict[str, np.ndarray] = {"seqlens_k": lengths, "total": np.array(lengths.max() + 1, np.int32)}
    angles = rng.uniform(0, 6, (LENGTH, HEAD_DIM // 2))
    feeds |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    for item in session.get_inputs():
        if item.name not in feeds:
            shape = [BATCH if size == "batch" else size for size in item.shape]
            feeds[item.name] = rng.standard_normal(shape).astype(np.float32) * 3
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_numbers_stay(packed: bool, sink: bool) -> None:
    before, after = one_node(packed, sink=sink), one_node(packed, sink=sink)
    assert StepAttention()(after).modified
    node = next(node for node in after.graph if node.op_type == "GroupQueryAttention")
    assert node.attributes["scale"].as_float() == 1.0 and node.inputs[11] is not None
    assert (node.inputs[11].name == "sink") == sink
    assert not StepAttention()(after).modified
    for seed in range(5):
        for expected, actual in zip(run(before, seed), run(after, seed), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "model", [one_node(True, ir.DataType.FLOAT16), one_node(True, local_window_size=8), one_node(True, scale=1.0)]
)
def test_others_are_left_alone(model: ir.Model) -> None:
    assert not StepAttention()(model).modified
    assert len(model.graph) == 1 and len(model.graph.initializers) == 0


def test_only_decode_graphs_are_rewritten(package: Callable[[str], Path]) -> None:
    folder = package("llama")
    for graph, rewritten in (("prefill", False), ("decode", True)):
        nodes = [n for n in ir.load(folder / f"{graph}.onnx").graph if n.op_type == "GroupQueryAttention"]
        assert nodes and all((node.attributes["scale"].as_float() == 1.0) == rewritten for node in nodes)
