"""Graph passes that let a graph read the quantized form of the matrices of a plan."""

from __future__ import annotations

import onnx_ir as ir
from llmx.export.fusions import MICROSOFT
from llmx.export.integer_products import IntegerProducts
from llmx.export.packed import parameter_names
from llmx.export.quantization import Plan, QuantizedWeight, side_by_side
from llmx.export.values import take_name
from llmx.export.weights import SourceModel
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

#: Metadata of an initializer: the key that its bytes are written under (llmx.export.writer).
KEY = "llmx.key"

PREFIX = "model."  # the traced modules hold the model under this name


class QuantizedMatrices(InPlacePass):
    """Products with a planned matrix become `MatMulNBits`, lookups in one `GatherBlockQuantized`.

    `names`: initializer -> the stored names of the parameters that it is made of. `accuracy_level`: MatMulNBits' (4: activations are rounded to
    int8, block by block). A bias that is added to a product goes into it. What uses a matrix otherwise keeps it.
    `used` collects the stored names that a graph reads quantized.
    """

    def __init__(self, plan: Plan, names: dict[str, list[str]], accuracy_level: int) -> None:
        super().__init__()
        self.plan, self.names, self.accuracy_level = plan, names, accuracy_level
        self.used: set[str] = set()

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if (node.domain, node.op_type) == (MICROSOFT, "MoE"):
                modified |= self._experts(model, node)
                continue
            for value in node.inputs:
                names = self.names.get(value.name or "", []) if value is not None and value.is_initializer() else []
                weight = side_by_side([self.plan.get(name) for name in names])
                if value is None or weight is None:
                    continue
                if _is_product(node, value, weight):
                    self._product(model, node, value, weight)
                elif _is_lookup(node, value, weight):
                    self._lookup(model, node, value, weight)
                else:
                    continue
                self.used.update(names)
                modified = True
                break
        if modified:
            model.opset_imports.setdefault(MICROSOFT, 1)
            for name, value in list(model.graph.initializers.items()):
                if (
                    self.used.issuperset(self.names.get(name) or [""])
                    and not value.uses()
                    and not value.is_graph_output()
                ):
                    del model.graph.initializers[name]
        return PassResult(model, modified=modified)

    def _product(self, model: ir.Model, node: ir.Node, value: ir.Value, weight: QuantizedWeight) -> None:
        rows, columns = weight.shape
        blocks = [
            rows,
            weight.scheme.blocks(columns),
            weight.scheme.row_bytes(columns) // weight.scheme.blocks(columns),
        ]
        attributes = {"K": columns, "N": rows, "bits": weight.scheme.bits, "block_size": weight.scheme.block_size}
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        inputs = [node.inputs[0], *_parts(model, value, weight, blocks)]
        if len(node.inputs) > 2:
            add, bias = None, node.inputs[2]
        else:
            add, bias = _bias(node.outputs[0], rows)
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        fused = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT)
        last = add if add is not None else node
        model.graph.insert_before(last, fused)
        _replace(model, [last, *([node] if add is not None else [])], fused)

    def _experts(self, model: ir.Model, node: ir.Node) -> bool:
        """A MoE whose matrices are both planned becomes a QMoE."""
        values = [node.inputs[2], node.inputs[4]]
        weights = [
            self.plan.get(names[0]) if len(names) == 1 else None
            for names in (self.names.get(value.name or "", []) if value is not None else [] for value in values)
        ]
        if weights[0] is None or weights[1] is None or weights[0].scheme != weights[1].scheme:
            return False
        parts = []
        for value, weight in zip(values, weights, strict=True):
            assert value is not None and weight is not None and value.shape is not None
            shape = [int(value.shape[0]), int(value.shape[1])]
            parts.append(
                _parts(model, value, weight, [*shape, weight.scheme.row_bytes(weight.shape[1])], leading=shape)
            )
            self.used.add(weight.name)
        scheme = weights[0].scheme
        bits = {"expert_weight_bits": scheme.bits, "block_size": scheme.block_size}
        added = [ir.AttrInt64(name, number) for name, number in bits.items()]
        if self.accuracy_level:
            added.append(ir.AttrInt64("accuracy_level", self.accuracy_level))
        biases = [node.inputs[3], node.inputs[5] if len(node.inputs) > 5 else None]
        inputs = [*node.inputs[:2], *parts[0][:2], biases[0], *parts[1][:2], biases[1]]
        if weights[0].zero_points is not None:
            inputs += [None, None, None, parts[0][2], parts[1][2]]
        fused = ir.Node(MICROSOFT, "QMoE", inputs, [*node.attributes.values(), *added], num_outputs=1)
        model.graph.insert_before(node, fused)
        _replace(model, [node], fused)
        return True

    def _lookup(self, model: ir.Model, node: ir.Node, value: ir.Value, weight: QuantizedWeight) -> None:
        codes, scales, *zero_points = _parts(
            model, value, weight, [weight.shape[0], weight.scheme.row_bytes(weight.shape[1])], "table"
        )
        attributes = {
            "bits": weight.scheme.bits, "block_size": weight.scheme.block_size, "gather_axis": 0, "quantize_axis": 1,
        }  # fmt: skip
        inputs = [codes, node.inputs[1], scales, *zero_points]
        fused = ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)
        model.graph.insert_before(node, fused)
        _replace(model, [node], fused)


def quantize_graphs(
    graphs: dict[str, ir.Model], source: SourceModel, plan: Plan, accuracy_level: int
) -> list[QuantizedWeight]:
    """Let `graphs` read the plan's matrices quantized; those that they do, in the plan's order."""
    bound = {name: stored for name, (stored, _) in source.parameters_by_name().items()}
    used: set[str] = set()
    for model in graphs.values():
        initializers = {
            name: [bound.get(part.removeprefix(PREFIX), "") for part in parameter_names(value)]
            for name, value in model.graph.initializers.items()
        }
        rewrite = QuantizedMatrices(plan, initializers, accuracy_level)
        rewrite(model)
        RemoveUnusedOpsetsPass()(model)
        used |= rewrite.used
    return [weight for name, weight in plan.items() if name in used]


def integer_prompts(graphs: dict[str, ir.Model], second: Plan) -> bool:
    """Let the prefill graph, where it has a state to go on from, multiply with an integer form of the matrices in `second`; what
    it was becomes the graph "append", for few tokens. Whether there was one to change.
    """
    prefill = graphs.get("prefill")
    if prefill is None or "seqlens_k" not in {value.name for value in prefill.graph.inputs}:
        return False
    append = prefill.clone()
    if IntegerProducts(second, KEY)(prefill).modified:
        graphs["append"] = append
    return "append" in graphs


def _replace(model: ir.Model, nodes: list[ir.Node], fused: ir.Node) -> None:
    take_name(nodes[0].outputs[0], fused.outputs[0])
    model.graph.remove(nodes, safe=True)


def _is_product(node: ir.Node, value: ir.Value, weight: QuantizedWeight) -> bool:
    """Whether `node` is x @ weight^T for the weight as [rows, columns], plus a vector where it is a Gemm."""
    if len(node.inputs) < 2 or node.inputs[1] is not value or node.inputs[0] is value:
        return False
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    turned = given.pop("transB", 0) == 1
    if any(v != (1.0 if k in ("alpha", "beta") else 0) for k, v in given.items()) or turned == weight.transposed:
        return False
    if (node.domain, node.op_type) == ("", "Gemm"):
        return len(node.inputs) < 3 or _is_vector(node.inputs[2], weight.shape[0])
    return (node.domain, node.op_type) in (("", "MatMul"), (MICROSOFT, "FusedMatMul"))


def _is_vector(value: ir.Value | None, size: int) -> bool:
    """Whether `value` is a stored vector of that size."""
    return value is not None and value.is_initializer() and value.shape is not None and list(value.shape) == [size]


def _is_lookup(node: ir.Node, value: ir.Value, weight: QuantizedWeight) -> bool:
    """Whether `node` takes rows of the table; GatherBlockQuantized has no padding for a last block that is not full."""
    if (node.domain, node.op_type) != ("", "Gather") or node.inputs[0] is not value or weight.transposed:
        return False
    axis = node.attributes.get("axis")
    return (axis is None or axis.as_int() == 0) and weight.shape[1] % weight.scheme.block_size == 0


def _bias(product: ir.Value, rows: int) -> tuple[ir.Node | None, ir.Value | None]:
    """The node that adds a stored vector to `product` and is its only reader, with the vector."""
    users = list(product.uses())
    add = users[0].node if len(users) == 1 and not product.is_graph_output() else None
    if add is None or (add.domain, add.op_type) != ("", "Add"):
        return None, None
    bias = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
    return (add, bias) if _is_vector(bias, rows) else (None, None)


def _parts(
    model: ir.Model,
    value: ir.Value,
    weight: QuantizedWeight,
    codes_shape: list[int],
    kind: str = "codes",
    leading: list[int] | None = None,
) -> list[ir.Value]:
    """Codes, scales and, where the scheme has them, zero points of `weight` as initializers; codes of both kinds are one
    range of the weights file, seen with two shapes. `leading`: what stands for the rows in the shapes.
    """
    assert value.dtype is not None
    rows, columns = weight.shape
    scheme = weight.scheme
    leading = leading or [rows]
    wanted = [
        (f"{value.name}.{kind}", weight.codes, codes_shape, ir.DataType.UINT8),
        (f"{value.name}.scales", weight.scales, [*leading, scheme.blocks(columns)], value.dtype),
    ]
    if weight.zero_points is not None:
        shape = [*leading, scheme.zero_point_bytes(columns)]
        wanted.append((f"{value.name}.zero_points", weight.zero_points, shape, ir.DataType.UINT8))
    values = []
    for name, key, shape, dtype in wanted:
        part = model.graph.initializers.get(name)
        if part is None:
            part = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            part.metadata_props[KEY] = key
            model.graph.initializers[name] = part
        values.append(part)
    return values
