"""Packed products: query, key and value, and gate and up, as one matrix; what does not fit is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from llmx.export.packed import parameter_names
from llmx.export.packing import PackedPair
from llmx.runtime import load_manifest


def tiny(rows: tuple[int, ...], bias: bool = False, further_reader: bool = False) -> ir.Model:
    """Layers of `rows` outputs over one input of 8, multiplied with each other."""

    def value(name: str, shape: list[Any], array: np.ndarray | None = None) -> ir.Value:
        tensor = ir.tensor(array, name=name) if array is not None else None
        made = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        if array is not None:
            made.metadata_props["pkg.torch.export.graph_signature.InputSpec.kind"] = "PARAMETER"
            initializers.append(made)
        return made

    initializers: list[ir.Value] = []
    x = value("x", ["n", 8])
    nodes, ends = [], []
    for i, count in enumerate(rows):
        weight = value(f"w{i}", [count, 8], np.zeros((count, 8), np.float32))
        nodes.append(ir.node("FusedMatMul", [x, weight], {"transB": 1}, domain="com.microsoft"))
        end = nodes[-1].outputs[0]
        end.type = x.type
        if bias:
            nodes.append(ir.node("Add", [end, value(f"b{i}", [count], np.zeros(count, np.float32))]))
            end = nodes[-1].outputs[0]
            end.type = x.type
        ends.append(end)
    nodes.append(ir.node("Concat", ends, {"axis": -1}))
    outputs = [nodes[-1].outputs[0]]
    outputs[0].name, outputs[0].type = "y", x.type
    if further_reader:
        nodes.append(ir.node("Identity", [initializers[0]]))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = "again", x.type
        outputs.append(nodes[-1].outputs[0])
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 21, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("bias", [False, True])
def test_a_pair_is_packed(bias: bool) -> None:
    model = tiny((16, 16), bias)
    assert PackedPair()(model).modified
    split = next(node for node in model.graph if node.op_type == "Split")
    concat = next(node for node in model.graph if node.op_type == "Concat")
    assert list(concat.inputs) == list(split.outputs)
    names = [parameter_names(v) for v in model.graph.initializers.values() if len(parameter_names(v)) > 1]
    assert names == [["w0", "w1"], ["b0", "b1"]][: 1 + bias]
    assert not PackedPair()(model).modified


@pytest.mark.parametrize(
    "model", [tiny((16, 24)), tiny((16, 16, 16)), tiny((16,)), tiny((16, 16), further_reader=True)]
)
def test_others_are_left_alone(model: ir.Model) -> None:
    before = [node.op_type for node in model.graph]
    assert not PackedPair()(model).modified
    assert [node.op_type for node in model.graph] == before


def test_packages_have_one_product_each(package: Callable[[str], Path]) -> None:
    """Verified against PyTorch while exporting; llama without biases, qwen2 with some in query, key and value alone."""
    for name in ("llama", "qwen2"):
        folder = package(name)
        for graph in ("prefill", "decode"):
            found = Counter(node.op_type for node in ir.load(folder / f"{graph}.onnx").graph)
            assert found["FusedMatMul"] == 3 * 4 + 1 and found["Split"] == 3 and found["GroupQueryAttention"] == 3
        manifest = load_manifest(folder)
        assert manifest.files["weights.data"].size < 4 * manifest.model.parameters * 1.05 + 40 * 4096  # once each
