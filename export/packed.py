"""Initializers made of several of the model's parameters, one after another along the first axis."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
_PACKED = "llmx.packed"


def is_parameter(value: ir.Value) -> bool:
    """Whether an initializer is one of the model's parameters (as torch.export noted on it), or made of some."""
    return value.metadata_props.get(_KIND) == "PARAMETER"


def parameter_names(value: ir.Value) -> list[str]:
    """The names of the parameters that a parameter initializer is made of: its own, but for a packed one."""
    packed = value.metadata_props.get(_PACKED)
    return packed.split("\n") if packed is not None else [value.name or ""]


def packed_parameter(model: ir.Model, values: Sequence[ir.Value | None]) -> ir.Value:
    """A new initializer of `model` that holds the parameters `values`, equal but for their first axis, in this order."""
    names: list[str] = []
    rows, rest = 0, None
    for value in values:
        assert value is not None and value.name is not None and value.shape is not None and is_parameter(value)
        shape = value.shape.numpy()
        assert rest is None or rest == shape[1:]
        names, rows, rest = [*names, value.name], rows + int(shape[0]), shape[1:]
    assert rest is not None and values[0] is not None and values[0].dtype is not None
    dtype, shape = values[0].dtype, ir.Shape([rows, *rest])
    name = "+".join(names)
    packed = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=_unread(name, dtype, shape))
    packed.metadata_props[_KIND] = "PARAMETER"
    packed.metadata_props[_PACKED] = "\n".join(names)
    model.graph.register_initializer(packed)
    return packed


def _unread(name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.TensorProtocol:
    """A tensor whose size is known and whose values are read when the weights are written."""

    def never() -> ir.TensorProtocol:
        raise AssertionError(f"the values of {name} are not at hand before its weights are written")

    return ir.LazyTensor(never, dtype=dtype, shape=shape, name=name)
