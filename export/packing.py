"""Passes that give an attention node its query, key and value as one matrix product, and take detours out of its way."""

from __future__ import annotations

import onnx_ir as ir
from llmx.export.fusions import MICROSOFT, only_user, producer
from llmx.export.packed import is_parameter, packed_parameter, parameter_names
from onnx_ir.passes import InPlacePass, PassResult


class StraightHeads(InPlacePass):
    """Reshapes that split and join heads around `GroupQueryAttention` go where they change nothing.

    The node reads and writes [batch, seq, heads * head_dim], row by row what the linear layers write and read.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in model.graph:
            if node.op_type != "GroupQueryAttention" or node.domain != MICROSOFT:
                continue
            for index in range(3):
                value = node.inputs[index] if index < len(node.inputs) else None
                source = _before_reshapes(value)
                if source is not value and _is_linear(source) and _width(source) == _width(value) is not None:
                    node.replace_input_with(index, source)
                    modified = True
            end = _after_reshapes(node.outputs[0])
            if end is not node.outputs[0] and _width(end) == _width(node.outputs[0]) is not None:
                ir.convenience.replace_all_uses_with(end, node.outputs[0], replace_graph_outputs=True)
                modified = True
        return PassResult(model, modified=modified)


class PackedQkv(InPlacePass):
    """Three products of one input that a `GroupQueryAttention` reads become one, whose weight is theirs, one after another.

    The packed weight is a parameter made of parameters (`llmx.export.packed`): they lie side by side in `weights.data`.
    Biases are packed alike. Left alone: weights that something else reads too, and node inputs that are no linear layer's.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT:
                modified |= self._pack(model, node)
        return PassResult(model, modified=modified)

    def _pack(self, model: ir.Model, node: ir.Node) -> bool:
        if any(value is None for value in node.inputs[:3]):
            return False
        layers = [_linear(value) for value in node.inputs[:3]]
        if any(layer is None for layer in layers):
            return False
        products, biases = [], []
        for layer in layers:
            assert layer is not None
            products.append(layer[0])
            biases.append(layer[1])
        if len({id(product.inputs[0]) for product in products}) != 1:
            return False
        if any(bias is None for bias in biases) != all(bias is None for bias in biases):
            return False
        weights = [product.inputs[1] for product in products]
        if not all(_own_parameter(value) for value in [*weights, *(bias for bias in biases if bias is not None)]):
            return False
        product = ir.node(
            "FusedMatMul", [products[0].inputs[0], packed_parameter(model, weights)], {"transB": 1}, domain=MICROSOFT
        )
        nodes, packed = [product], product.outputs[0]
        if biases[0] is not None:
            add = ir.node("Add", [packed, packed_parameter(model, biases)])
            nodes, packed = [product, add], add.outputs[0]
        packed.type = node.inputs[0].type
        model.graph.insert_before(node, nodes)
        node.replace_input_with(0, packed)
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
        return True


class PackedPair(InPlacePass):
    """Two linear layers of one input and equal width (gate and up of a gated activation) become one product and a `Split`.

    One larger product has less to start and hand over than two.
    Weights and biases are packed as `PackedQkv`'s. Left alone: inputs that more layers read, or layers of several widths.
    """

    def call(self, model: ir.Model) -> PassResult:
        readers: dict[ir.Value, list[ir.Node]] = {}
        for node in model.graph:
            if node.op_type == "FusedMatMul" and node.inputs[0] is not None and _linear(node.outputs[0]) is not None:
                readers.setdefault(node.inputs[0], []).append(node)
        modified = False
        for nodes in readers.values():
            if len(nodes) == 2:
                modified |= self._pack(model, nodes)
        return PassResult(model, modified=modified)

    def _pack(self, model: ir.Model, products: list[ir.Node]) -> bool:
        ends = [_with_bias(product) for product in products]
        layers = [_linear(end) for end in ends]
        weights = [product.inputs[1] for product in products]
        biases = [layer[1] for layer in layers if layer is not None and layer[1] is not None]
        if any(end.dtype is None for end in ends) or len(biases) not in (0, 2):
            return False
        if not all(map(_own_parameter, [*weights, *biases])):
            return False
        shapes = [list(value.shape.numpy()) for value in weights if value is not None and value.shape is not None]
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            return False
        product = ir.node(
            "FusedMatMul", [products[0].inputs[0], packed_parameter(model, weights)], {"transB": 1}, domain=MICROSOFT
        )
        nodes = [product]
        if biases:
            nodes.append(ir.node("Add", [product.outputs[0], packed_parameter(model, biases)]))
        split = ir.node("Split", [nodes[-1].outputs[0]], {"axis": -1, "num_outputs": 2}, num_outputs=2)
        for node in nodes:
            node.outputs[0].type = ends[0].type
        # The first of the two layers: whatever reads either comes after it, and what both read before.
        first = next(node for node in model.graph if node in products)
        model.graph.insert_before(first, [*nodes, split])
        for old, new in zip(ends, split.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        return True


def _with_bias(product: ir.Node) -> ir.Value:
    """The layer's output: the product's, or its sum with a stored vector where nothing else reads the product."""
    add = only_user(product.outputs[0], "Add")
    return add.outputs[0] if add is not None and _linear(add.outputs[0]) is not None else product.outputs[0]


class QuickSilu(InPlacePass):
    """`x * Sigmoid(x)` becomes `QuickGelu(x)` with alpha 1: one pass over the data instead of two."""

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Sigmoid" or node.domain != "":
                continue
            multiply = only_user(node.outputs[0], "Mul")
            if multiply is None or node.inputs[0] not in multiply.inputs:
                continue
            fused = ir.node("QuickGelu", [node.inputs[0]], {"alpha": 1.0}, domain=MICROSOFT)
            model.graph.insert_before(multiply, fused)
            fused.outputs[0].type, fused.outputs[0].shape = multiply.outputs[0].type, multiply.outputs[0].shape
            ir.convenience.replace_all_uses_with(multiply.outputs[0], fused.outputs[0], replace_graph_outputs=True)
            model.graph.remove([multiply, node], safe=True)
            modified = True
        if modified:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return PassResult(model, modified=modified)


def _before_reshapes(value: ir.Value | None) -> ir.Value | None:
    while (reshape := producer(value, "Reshape")) is not None:
        value = reshape.inputs[0]
    return value


def _after_reshapes(value: ir.Value) -> ir.Value:
    while (reshape := only_user(value, "Reshape")) is not None and reshape.inputs[0] is value:
        value = reshape.outputs[0]
    return value


def _width(value: ir.Value | None) -> int | None:
    """The last of three axes, where it is known."""
    if value is None or value.shape is None or len(value.shape) != 3:
        return None
    last = value.shape[-1]
    return last if isinstance(last, int) else None


def _is_linear(value: ir.Value | None) -> bool:
    return _linear(value) is not None


def _linear(value: ir.Value | None) -> tuple[ir.Node, ir.Value | None] | None:
    """(product with a stored [out, in] weight, bias or None) that makes `value`."""
    bias = None
    add = producer(value, "Add")
    if add is not None:
        found = [
            (left, right) for left, right in (add.inputs, add.inputs[::-1]) if right is not None and _is_bias(right)
        ]
        if not found:
            return None
        value, bias = found[0]
    product = producer(value, "FusedMatMul", MICROSOFT)
    if product is None or product.inputs[1] is None or not product.inputs[1].is_initializer():
        return None
    attributes = {name: a.value for name, a in product.attributes.items()}
    plain = attributes.pop("transB", 0) == 1 and attributes.pop("alpha", 1.0) == 1.0 and not any(attributes.values())
    return (product, bias) if plain else None


def _is_bias(value: ir.Value) -> bool:
    return value.is_initializer() and value.shape is not None and len(value.shape) == 1


def _own_parameter(value: ir.Value | None) -> bool:
    """Whether `value` is one of the model's parameters, read here alone."""
    return (
        value is not None and is_parameter(value) and len(parameter_names(value)) == 1 and len(list(value.uses())) == 1
    )
