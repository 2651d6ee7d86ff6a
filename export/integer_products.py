"""Prompts through integer products: a pass over the prefill graph of a quantized package for the CPU.

`MatMulNBits` reads each weight once for a few rows, and the memory bounds it; with the hundreds of rows of a prompt
arithmetic does, at the rate of float32. `MatMulIntegerToFloat` (uint8 x int8) has the CPU's integer units: VNNI, and AMX
where there is one. So a matrix gets a second form, int8 with one scale for each output, and a row of activations is
written as two digits to the base of 126:

    x = scale * (high + low / 126),  scale = max|x| / 63,  high and low integers in -63 … 63

Invariants: digits are stored as 64 + digit, at most 127, so that CPUs which add products in pairs of 16 bits (AVX2)
cannot overflow. Sums are exact integers and a scale belongs to one row, so no row's result depends on the others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from llmx.export.fusions import MICROSOFT
from llmx.export.quantization import Plan, QuantizedWeight, side_by_side
from llmx.export.values import constant, take_name
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

_DIGIT = 63  # the largest digit
_ZERO = 64  # what digit 0 is stored as


def integer_form(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [columns, rows] and float32 [rows], whose product is the nearest to what the quantized `weight` stands for."""
    rows, columns = weight.shape
    codes, scales = torch.empty((columns, rows), dtype=torch.int8), torch.empty(rows)
    at = 0
    for member in weight.below_each_other:
        for blocks in member.blocks():
            values = blocks.dequantized()
            end = at + len(values)
            scales[at:end] = values.abs().amax(1) / 127
            steps = torch.where(scales[at:end] == 0, 1.0, scales[at:end])
            codes[:, at:end] = (values / steps[:, None]).round_().to(torch.int8).T
            at = end
    return codes, scales


@dataclass(frozen=True)
class _Row:
    """A value's digits, uint8 in its shape, and its scales [..., 1]."""

    high: ir.Value
    low: ir.Value
    scale: ir.Value


class IntegerProducts(InPlacePass):
    """`MatMulNBits` with a matrix of `plan` becomes two products of integers.

    `key`: metadata of a node's codes, which says what parameters they belong to (llmx.export.quantized_graph).
    """

    def __init__(self, plan: Plan, key: str) -> None:
        super().__init__()
        self.plan, self.key = plan, key
        self._rows: dict[ir.Value, _Row] = {}

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        self._rows.clear()
        for node in list(model.graph):
            if (node.domain, node.op_type) != (MICROSOFT, "MatMulNBits"):
                continue
            codes = node.inputs[1]
            assert codes is not None
            names = [key.removesuffix(":codes") for key in codes.metadata_props.get(self.key, "").split("\n")]
            weight = side_by_side([self.plan.get(name) for name in names])
            if weight is None:
                continue
            made, row = _Nodes(model, node), self._row(model, node)
            bias = node.inputs[5] if len(node.inputs) > 5 else None
            split = _split(node.outputs[0], weight) if bias is None else None
            if split is not None:
                for member, part in zip(weight.below_each_other, split.outputs, strict=True):
                    take_name(part, self._product(made, row, member))
                model.graph.remove([node, split], safe=True)
            else:
                product = self._product(made, row, weight)
                take_name(node.outputs[0], product if bias is None else made.node("Add", [product, bias]))
                model.graph.remove(node, safe=True)
            modified = True
        if modified:
            RemoveUnusedNodesPass()(model)  # codes that nothing reads any more
        return PassResult(model, modified=modified)

    def _row(self, model: ir.Model, node: ir.Node) -> _Row:
        """The digits of the node's input, which several products may share."""
        x = node.inputs[0]
        assert x is not None
        if x not in self._rows:
            self._rows[x] = _Nodes(model, node).digits(x)
        return self._rows[x]

    @staticmethod
    def _product(made: _Nodes, row: _Row, weight: QuantizedWeight) -> ir.Value:
        matrix, scales = made.integers(weight)
        zero, one, step = made.zero, made.number(1), made.number(0.5 / _DIGIT)
        high = made.node("MatMulIntegerToFloat", [row.high, matrix, one, scales, zero], domain=MICROSOFT)
        low = made.node("MatMulIntegerToFloat", [row.low, matrix, step, scales, zero], domain=MICROSOFT)
        return made.node("Mul", [made.node("Add", [high, low]), row.scale])


def _split(product: ir.Value, weight: QuantizedWeight) -> ir.Node | None:
    """The node that takes `product` apart into those of the matrices that `weight` is made of."""
    users = list(product.uses())
    split = users[0].node if len(users) == 1 and not product.is_graph_output() else None
    axis = split.attributes.get("axis") if split is not None and split.op_type == "Split" else None
    last = -1 if product.shape is None else len(product.shape) - 1
    if split is None or axis is None or axis.as_int() not in (-1, last):
        return None
    wanted = [member.shape[0] for member in weight.below_each_other]
    if len(split.inputs) > 1 and split.inputs[1] is not None:
        sizes = split.inputs[1].const_value
        return split if sizes is not None and sizes.numpy().tolist() == wanted else None
    return split if len(split.outputs) == len(wanted) and len(set(wanted)) == 1 else None


class _Nodes:
    """Nodes put before a given one."""

    def __init__(self, model: ir.Model, before: ir.Node) -> None:
        self._graph, self._before = model.graph, before

    def node(self, kind: str, inputs: list[ir.Value | None], domain: str = "", **attributes: int) -> ir.Value:
        made = ir.node(kind, inputs, attributes, domain=domain)
        self._graph.insert_before(self._before, made)
        return made.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"llmx.constant.{array.dtype}.{'_'.join(str(v) for v in np.atleast_1d(array).tolist())}"
        return constant(self._graph, name, array)

    @property
    def zero(self) -> ir.Value:
        return self.constant(np.array(_ZERO, np.uint8))

    def number(self, value: float) -> ir.Value:
        return self.constant(np.array(value, np.float32))

    def digits(self, x: ir.Value) -> _Row:
        """A row of zeros has scale 0 and any digits, and its products are zeros. A row of NaN, as norms make of one NaN, stays
        NaN; one among finite values is passed over (as ReduceMax does).
        """
        largest = self.node("ReduceMax", [self.node("Abs", [x]), self.constant(np.array([-1], np.int64))], keepdims=1)
        scale = self.node("Mul", [largest, self.number(1 / _DIGIT)])
        scaled = self.node("Div", [x, scale])
        high = self.node("QuantizeLinear", [scaled, self.number(1), self.zero])
        rest = self.node("Sub", [scaled, self.node("DequantizeLinear", [high, self.number(1), self.zero])])
        return _Row(high, self.node("QuantizeLinear", [rest, self.number(0.5 / _DIGIT), self.zero]), scale)

    def integers(self, weight: QuantizedWeight) -> tuple[ir.Value, ir.Value]:
        """The integer form as initializers, computed when they are written: nothing is kept of a matrix meanwhile."""
        rows, columns = weight.shape
        kinds = {"int8": ([columns, rows], ir.DataType.INT8), "int8_scales": ([rows], ir.DataType.FLOAT)}
        values, form = [], _Form(weight)
        for kind, (shape, dtype) in kinds.items():
            name = f"{weight.name}.{kind}"
            value = self._graph.initializers.get(name)
            if value is None:
                tensor = ir.LazyTensor(functools.partial(form.read, kind), dtype, ir.Shape(shape), name=name)
                value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(dtype))
                self._graph.register_initializer(value)
            values.append(value)
        return values[0], values[1]


class _Form:
    """The integer form of a weight, for whoever writes it: of a matrix that was read, the scales are kept."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self._weight = weight
        self._scales: torch.Tensor | None = None

    def read(self, kind: str) -> ir.TensorProtocol:
        if kind == "int8_scales" and self._scales is not None:
            return ir.tensor(self._scales.numpy())
        codes, self._scales = integer_form(self._weight)
        return ir.tensor((codes if kind == "int8" else self._scales).numpy())
