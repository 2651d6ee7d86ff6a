"""Fusions into onnxruntime's own operators. Each pass keeps the numbers; what does not match is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from llmx.export.values import take_over
from onnx_ir.passes import InPlacePass, PassResult

MICROSOFT = "com.microsoft"


def producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value`, if it is an `op_type`."""
    node = value.producer() if value is not None else None
    return node if node is not None and (node.domain, node.op_type) == (domain, op_type) else None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads `value`, if it is an `op_type` and nothing else reads it."""
    users = list(value.uses())
    node = users[0].node if len(users) == 1 and not value.is_graph_output() else None
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def scalar(value: ir.Value | None) -> float | None:
    """The number that `value` is, where it is a constant of one element."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a two-input node that is not `value`."""
    left, right = node.inputs[0], node.inputs[1]
    return right if left is value else left


class RmsNorm(InPlacePass):
    """`x * rsqrt(mean(x^2) + eps) * weight` becomes `SimplifiedLayerNormalization(x, weight)`.

    A cast to float32 around the statistics and back is part of the operator (stash_type 1). The weight may be any
    1-D value of the last axis' size, `1 + w` included.
    """

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Reciprocal" and node.domain == "" and node.graph is not None:
                modified |= self._fuse(model, node)
        return PassResult(model, modified=modified)

    def _fuse(self, model: ir.Model, reciprocal: ir.Node) -> bool:
        root = producer(reciprocal.inputs[0], "Sqrt")
        total = producer(root.inputs[0], "Add") if root else None
        mean = next((m for v in (total.inputs if total else ()) if (m := producer(v, "ReduceMean"))), None)
        power = producer(mean.inputs[0], "Pow") if mean else None
        if total is None or mean is None or power is None or scalar(power.inputs[1]) != 2.0:
            return False
        axes = ir.convenience.get_const_tensor(mean.inputs[1]) if len(mean.inputs) > 1 and mean.inputs[1] else None
        if axes is None or axes.numpy().reshape(-1).tolist() != [-1]:
            return False
        epsilon = scalar(other_input(total, mean.outputs[0]))
        x = power.inputs[0]
        normed = only_user(reciprocal.outputs[0], "Mul")
        if epsilon is None or x is None or normed is None or other_input(normed, reciprocal.outputs[0]) is not x:
            return False
        cast_in, result = producer(x, "Cast"), normed.outputs[0]
        source = x
        cast_out = only_user(result, "Cast")
        scaled = only_user(cast_out.outputs[0] if cast_out else result, "Mul")
        if scaled is None:
            return False
        if cast_out is not None:  # x (16 bits) -> float32 -> norm -> 16 bits -> weight
            if cast_in is None or cast_in.inputs[0] is None or cast_in.inputs[0].dtype != cast_out.outputs[0].dtype:
                return False
            source, result = cast_in.inputs[0], cast_out.outputs[0]
        weight = other_input(scaled, result)
        assert source is not None
        if weight is None or weight.shape is None or len(weight.shape) != 1 or weight.dtype != result.dtype:
            return False
        if source.shape is None or source.shape[-1] != weight.shape[0]:
            return False
        attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        fused = ir.node("SimplifiedLayerNormalization", [source, weight], attributes)
        model.graph.insert_before(scaled, fused)
        take_over(scaled.outputs[0], fused.outputs[0])
        return True


class SkipRmsNorm(InPlacePass):
    """`SimplifiedLayerNormalization(a + b)` becomes `SkipSimplifiedLayerNormalization`, whose fourth output is a + b."""

    def call(self, model: ir.Model) -> PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "SimplifiedLayerNormalization":
                continue
            add = producer(node.inputs[0], "Add")
            if add is None or not _same_shape(add.inputs[0], add.inputs[1]):
                continue
            attributes = {"epsilon": node.attributes["epsilon"].as_float()}
            inputs = [add.inputs[0], add.inputs[1], node.inputs[1]]
            fused = ir.node("SkipSimplifiedLayerNormalization", inputs, attributes, domain=MICROSOFT, num_outputs=4)
            for unused in fused.outputs[1:3]:
                unused.name = ""
            # At the sum's place: its other readers come after it, and the weight is there from the start.
            if node.inputs[1] is not None and node.inputs[1].producer() is not None:
                continue
            model.graph.insert_before(add, fused)
            take_over(node.outputs[0], fused.outputs[0])
            take_over(add.outputs[0], fused.outputs[3])
            model.graph.remove([node, add], safe=False)
            modified = True
        if modified:
            model.opset_imports.setdefault(MICROSOFT, 1)
        return PassResult(model, modified=modified)


def _same_shape(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether both are known to be [batch, seq, hidden] of one shape: nothing is broadcast."""
    if left is None or right is None or left.shape is None or right.shape is None:
        return False
    return len(left.shape) == 3 and [str(d) for d in left.shape] == [str(d) for d in right.shape]


class RotaryInAttention(InPlacePass):
    """Rotary embedding of query and key moves into `GroupQueryAttention` (`do_rotary`, with cos and sin tables).

    The tables are what the traced graph itself computes from positions 0 … context - 1, so that every scaling rule
    comes out as PyTorch has it. Only rotations of the whole head by halves are moved, and only while the tables stay
    small beside the weights (a long context of a small model computes them in the graph instead).
    """

    _ALWAYS_FINE = 1 << 20  # bytes
    _LARGEST_PART = 0.02

    def __init__(self, context_length: int) -> None:
        super().__init__()
        self.context_length = context_length

    def call(self, model: ir.Model) -> PassResult:
        tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}
        modified = False
        for node in list(model.graph):
            if node.op_type != "GroupQueryAttention" or node.attributes.get("do_rotary") is not None:
                continue
            query, key = _rotation(node.inputs[0]), _rotation(node.inputs[1])
            if query is None or key is None or (query.cos, query.sin) != (key.cos, key.sin):
                continue
            pair = (query.cos, query.sin)
            if pair not in tables:
                tables[pair] = self._tables(model, *pair, query.head_dim)
            caches = tables[pair]
            if caches is None:
                continue
            if len(node.inputs) < 9:  # absent inputs at the end are not listed
                node.resize_inputs(9)
            for index, rotation in enumerate((query, key)):
                rotated, straight = node.inputs[index], rotation.unrotated(model, node)
                assert rotated is not None
                straight.type, straight.shape = rotated.type, rotated.shape
                node.replace_input_with(index, straight)
            node.replace_input_with(7, caches[0])
            node.replace_input_with(8, caches[1])
            node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
            modified = True
        return PassResult(model, modified=modified)

    def _tables(self, model: ir.Model, cos: ir.Value, sin: ir.Value, head_dim: int) -> tuple[ir.Value, ir.Value] | None:
        """Initializers [context, head_dim / 2] of what `cos` and `sin` are at each position, or None."""
        assert cos.dtype is not None
        size = self.context_length * head_dim * cos.dtype.itemsize  # both tables, half of the head's size each
        if size > max(self._ALWAYS_FINE, self._LARGEST_PART * _weight_bytes(model)):
            return None
        arrays = evaluate_at_positions(model, [cos, sin], self.context_length)
        if arrays is None:
            return None
        values = []
        for name, array, like in zip(("cos", "sin"), arrays, (cos, sin), strict=True):
            rows = array.reshape(self.context_length, -1)
            half = head_dim // 2
            if rows.shape[1] != head_dim or not np.array_equal(rows[:, :half], rows[:, half:]):
                return None
            unique = f"rotary_{name}_{len(model.graph.initializers)}"
            tensor = ir.Tensor(np.ascontiguousarray(rows[:, :half]), dtype=like.dtype, name=unique)
            value = ir.Value(name=unique, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            model.graph.register_initializer(value)
            values.append(value)
        return values[0], values[1]


def _weight_bytes(model: ir.Model) -> int:
    """Bytes of the graph's initializers, whether their values are at hand or not."""
    total = 0.0
    for value in model.graph.initializers.values():
        if value.shape is not None and value.dtype is not None:
            total += float(np.prod(value.shape.numpy())) * value.dtype.itemsize
    return int(total)


class _Rotation:
    """A rotation found in the graph: `heads` [batch, heads, seq, head_dim] before it, and its cos and sin."""

    def __init__(self, heads: ir.Value, cos: ir.Value, sin: ir.Value, head_dim: int, flat_shape: ir.Value) -> None:
        self.heads, self.cos, self.sin, self.head_dim, self.flat_shape = heads, cos, sin, head_dim, flat_shape

    def unrotated(self, model: ir.Model, before: ir.Node) -> ir.Value:
        """[batch, seq, heads * head_dim] of the unrotated heads."""
        swap = producer(self.heads, "Transpose")
        if swap is not None and _perm(swap) == [0, 2, 1, 3]:
            swapped = swap.inputs[0]
            nodes = []
        else:
            transpose = ir.node("Transpose", [self.heads], {"perm": [0, 2, 1, 3]})
            swapped, nodes = transpose.outputs[0], [transpose]
        reshape = ir.node("Reshape", [swapped, self.flat_shape])
        model.graph.insert_before(before, [*nodes, reshape])
        return reshape.outputs[0]


def _perm(node: ir.Node) -> list[int]:
    perm = node.attributes.get("perm")
    return list(perm.as_ints()) if perm is not None else []


def _rotation(flat: ir.Value | None) -> _Rotation | None:
    """`Reshape(Transpose(x * cos + rotate_half(x) * sin))` as a _Rotation, or None."""
    reshape = producer(flat, "Reshape")
    transpose = producer(reshape.inputs[0], "Transpose") if reshape else None
    add = producer(transpose.inputs[0], "Add") if transpose and _perm(transpose) == [0, 2, 1, 3] else None
    if reshape is None or add is None or reshape.inputs[1] is None:
        return None
    for straight, turned in ((0, 1), (1, 0)):
        left, right = producer(add.inputs[straight], "Mul"), producer(add.inputs[turned], "Mul")
        if left is None or right is None:
            continue
        for index in (0, 1):
            half, sin = right.inputs[index], right.inputs[1 - index]
            x = _rotate_half_source(half)
            if x is None or x not in left.inputs or sin is None:
                continue
            cos = other_input(left, x)
            size = x.shape[-1] if x.shape is not None else None
            if cos is not None and isinstance(size, int) and size % 16 == 0:
                return _Rotation(x, cos, sin, size, reshape.inputs[1])
    return None


def _rotate_half_source(value: ir.Value | None) -> ir.Value | None:
    """x, where `value` is `Concat(-x[..., d/2:], x[..., :d/2])` over the last axis."""
    concat = producer(value, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return None
    negated = producer(concat.inputs[0], "Neg")
    upper = _last_axis_slice(negated.inputs[0]) if negated else None
    lower = _last_axis_slice(concat.inputs[1])
    if upper is None or lower is None or upper[0] is not lower[0] or upper[0].shape is None:
        return None
    size = upper[0].shape[-1]
    if not isinstance(size, int) or (lower[1], lower[2]) != (0, size // 2) or upper[1] != size // 2 or upper[2] < size:
        return None
    return upper[0]


def _last_axis_slice(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """(x, start, end), where `value` is x sliced over its last axis with step 1."""
    node = producer(value, "Slice")
    if node is None or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    start, end, axis = (scalar(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 2, 3))
    step = scalar(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else 1.0
    rank = len(node.inputs[0].shape)
    if start is None or end is None or axis not in (-1.0, rank - 1.0) or step != 1.0:
        return None
    return node.inputs[0], int(start), int(end)


def evaluate_at_positions(model: ir.Model, wanted: list[ir.Value], count: int) -> list[np.ndarray] | None:
    """`wanted` computed by onnxruntime for `position_ids` [[0 … count - 1]], or None where they need other inputs."""
    import onnxruntime

    nodes: dict[ir.Node, None] = {}
    needed: dict[str, ir.Value] = {}

    def visit(value: ir.Value | None) -> bool:
        if value is None:
            return True
        node = value.producer()
        if node is None:
            if value.is_graph_input():
                return value.name == "position_ids"
            needed[value.name or ""] = value
            return value.const_value is not None
        if node not in nodes:
            if not all(visit(v) for v in node.inputs):
                return False
            nodes[node] = None
        return True

    if not all(visit(value) for value in wanted):
        return None
    position_ids = next(v for v in model.graph.inputs if v.name == "position_ids")
    order = [node for node in model.graph if node in nodes]
    mapping: dict[ir.Value | None, ir.Value | None] = {None: None}
    inputs = [ir.Value(name="position_ids", type=position_ids.type, shape=ir.Shape(["batch", "seq"]))]
    mapping[position_ids] = inputs[0]
    initializers = []
    for name, value in needed.items():
        copy = ir.Value(name=name, const_value=value.const_value, type=value.type, shape=value.shape)
        mapping[value] = copy
        initializers.append(copy)
    copies = []
    for node in order:
        copy_node = ir.Node(
            node.domain,
            node.op_type,
            [mapping[v] for v in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, copy_node.outputs, strict=True):
            new.name, new.type = old.name, old.type
            mapping[old] = new
        copies.append(copy_node)
    outputs = []
    for value in wanted:
        target = mapping[value]
        assert target is not None
        outputs.append(target)
    graph = ir.Graph(
        inputs, outputs, nodes=copies, initializers=initializers, opset_imports=model.opset_imports, name="positions"
    )
    small = ir.Model(graph, ir_version=model.ir_version)
    raw = ir.to_proto(small).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        results: list[np.ndarray] = session.run(None, {"position_ids": np.arange(count, dtype=np.int64)[None]})
    except Exception:  # bfloat16, which numpy and the CPU provider lack: the rotation stays in the graph
        return None
    return results
