"""What a decode step does for the next one on the device, and the graph that finds a step's likeliest tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from llmx.export.values import constant
from llmx.runtime.candidates import NUM_TOP
from onnx_ir.passes import InPlacePass, PassResult

_OPSET = 21
_COUNTED = ("position_ids", "seqlens_k", "rope_lengths")  # inputs that grow by 1 with each step


class GreedyTokens(InPlacePass):
    """Further outputs `next_input_ids`, the most likely tokens after each asked position, and `greedy_logits`, theirs."""

    def call(self, model: ir.Model) -> PassResult:
        logits = model.graph.outputs[0]
        assert logits.name == "logits" and logits.dtype is not None and logits.shape is not None
        nodes, scores = [], logits
        if logits.dtype == ir.DataType.BFLOAT16:  # no ArgMax in bfloat16
            nodes.append(ir.node("Cast", [logits], {"to": ir.DataType.FLOAT.value}))
            scores = nodes[-1].outputs[0]
        axis = constant(model.graph, "greedy_axis", np.array([2], np.int64))
        nodes.append(ir.node("ArgMax", [scores], {"axis": 2, "keepdims": 0}))
        tokens = nodes[-1].outputs[0]
        nodes.append(ir.node("Unsqueeze", [tokens, axis]))
        nodes.append(ir.node("GatherElements", [logits, nodes[-1].outputs[0]], {"axis": 2}))
        model.graph.extend(nodes)
        shape = [dim if isinstance(dim, int) else str(dim) for dim in logits.shape]
        _output(model, tokens, "next_input_ids", ir.DataType.INT64, shape[:2])
        _output(model, nodes[-1].outputs[0], "greedy_logits", logits.dtype, [*shape[:2], 1])
        return PassResult(model, modified=True)


def _output(model: ir.Model, value: ir.Value, name: str, dtype: ir.DataType, shape: list[int | str]) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    model.graph.outputs.append(value)


class Feedback(InPlacePass):
    """Decode, after `GreedyTokens`: the next values of the inputs that count are outputs too (`next_position_ids` …).

    Bound to the inputs' memory they make a greedy step's result the next step's input. So each must be written after
    every other node has read its input: a counter grows by a 1 that is computed from the tokens, which come last.
    """

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        nodes: list[ir.Node] = []
        following: list[tuple[ir.Value, ir.Value]] = []

        def add(op: str, inputs: list[ir.Value | None], **attributes: int | float | list[int]) -> ir.Value:
            nodes.append(ir.node(op, inputs, attributes))
            return nodes[-1].outputs[0]

        tokens = next(value for value in graph.outputs if value.name == "next_input_ids")
        one = constant(model.graph, "greedy_one", np.array(1, np.int64))
        ones = add("Clip", [tokens, one, one])  # [batch, 1] of 1, after the tokens
        flat = None
        for value in graph.inputs:
            if value.name not in _COUNTED or not value.uses():
                continue
            assert value.name is not None and value.dtype is not None and value.shape is not None
            step = ones
            if len(value.shape) == 1:
                shape = constant(model.graph, "greedy_flat", np.array([-1], np.int64))
                flat = flat or add("Cast", [add("Reshape", [ones, shape])], to=value.dtype.value)
                step = flat
            following.append((value, add("Add", [value, step])))
        graph.extend(nodes)
        for value, after in following:
            assert value.dtype is not None and value.shape is not None
            shape_of = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
            _output(model, after, f"next_{value.name}", value.dtype, shape_of)
        return PassResult(model, modified=True)


def candidates_graph(vocab: int, dtype: ir.DataType) -> ir.Model:
    """logits [batch, 1, vocab] and temperature float32 [batch] to the `TopLogits` of each row (llmx.runtime.step_logits):
    `top_logits` float32 [batch, k], `top_ids` int64 [batch, k], `log_sum` float32 [batch].
    """
    logits = ir.Value(name="logits", type=ir.TensorType(dtype), shape=ir.Shape(["batch", 1, vocab]))
    temperature = ir.Value(name="temperature", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch"]))
    graph = ir.Graph([logits, temperature], [], nodes=[], opset_imports={"": _OPSET}, name="candidates")
    model = ir.Model(graph, ir_version=10)

    def add(op: str, inputs: list[ir.Value | None], num_outputs: int = 1, **attributes: int) -> ir.Node:
        graph.append(ir.node(op, inputs, attributes, num_outputs=num_outputs))
        return graph[-1]

    rows = add("Reshape", [logits, constant(model.graph, "rows", np.array([-1, vocab], np.int64))]).outputs[0]
    if dtype != ir.DataType.FLOAT:
        rows = add("Cast", [rows], to=ir.DataType.FLOAT.value).outputs[0]
    count = constant(model.graph, "count", np.array([min(NUM_TOP, vocab)], np.int64))
    top = add("TopK", [rows, count], 2, axis=-1, largest=1, sorted=1)
    last = constant(model.graph, "last_axis", np.array([1], np.int64))
    first = add(
        "Slice", [top.outputs[0], *(constant(model.graph, f"n{n}", np.array([n], np.int64)) for n in (0, 1, 1))]
    )
    shifted = add("Sub", [rows, first.outputs[0]])
    column = add("Unsqueeze", [temperature, last])
    scaled = add("Div", [shifted.outputs[0], column.outputs[0]])
    weights = add("Exp", [scaled.outputs[0]])
    total = add("ReduceSum", [weights.outputs[0], last], keepdims=0)
    log_sum = add("Log", [total.outputs[0]])
    outputs = [(top.outputs[0], "top_logits", ir.DataType.FLOAT), (top.outputs[1], "top_ids", ir.DataType.INT64)]
    for value, name, kind in outputs:
        value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape(["batch", min(NUM_TOP, vocab)])
    end = log_sum.outputs[0]
    end.name, end.type, end.shape = "log_sum", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch"])
    graph.outputs.extend([top.outputs[0], top.outputs[1], end])
    return model
