"""Values of a graph that passes make: constants, and results that take others' place."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer `name`, made of `array` where there is none yet."""
    known = graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def take_over(old: ir.Value, new: ir.Value) -> None:
    """`new` stands wherever `old` stood, with its type and shape."""
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def take_name(old: ir.Value, new: ir.Value) -> None:
    """As `take_over`, with `old`'s name as well; whoever made `old` is to be removed."""
    take_over(old, new)
    old.name, new.name = None, old.name
