"""For which lengths a traced graph is right: those that take the example's branches.

Where a model's code asks for a size ("is the prompt longer than a block?"), the tracer follows the example's answer and
notes the condition (a guard). A graph says nothing of it, so each length that a package may meet is asked here. Guards are
sufficient, not necessary: many only decide how PyTorch lays out a tensor. So an example of another length is traced as
well, and where it gives the same graph, that is right for the lengths of both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import onnx_ir as ir
from llmx.export.packed import is_parameter

#: Where `llmx.export.lowering.lower` leaves the guards of a graph, in its `meta`: a list of Python expressions for each
#: trace that gave it.
GUARDS = "llmx.guards"
_SIZE = re.compile(r"L\['(\w+)'\](?:\[\d+\])*\.size\(\)\[(\d+)\]")
USEFUL = 64  # a graph that is right for fewer tokens than so many is refused
_EVERY = 4096  # lengths up to here are all asked, of longer ones samples
_STRIDE = 509  # a prime: no pattern of blocks hides between samples

Size = Callable[[str, int], int | None]


def longest_right(model: ir.Model, shortest: int, longest: int, size: Size = lambda *_: None) -> int:
    """The largest length up to `longest` such that the graph is right for it and all from `shortest` on; `shortest` - 1
    where there is none.

    `size(input, axis)`: the size of an input's axis that does not follow the length.
    """
    last = shortest - 1
    holds = _condition(model, size)
    for length in _lengths(shortest, longest):
        if not holds(length):
            return last
        last = length
    return last


def shortest_right(model: ir.Model, longest: int, size: Size = lambda *_: None) -> int:
    """The smallest length such that the graph is right for it and all up to `longest` (of the first few thousand)."""
    holds = _condition(model, size)
    wrong = [length for length in range(2, min(longest, _EVERY) + 1) if not holds(length)]
    return wrong[-1] + 1 if wrong else 2


def wrong_block(model: ir.Model, longest: int, size: Size = lambda *_: None) -> int | None:
    """The smallest block all of whose multiples the graph is wrong for, where it is right for most other lengths: of a model
    that pads to a multiple of it, and takes another way where nothing is to be padded.
    """
    holds = _condition(model, size)
    end = min(longest, _EVERY) + 1
    right = {length for length in range(2, end) if holds(length)}
    if 2 * len(right) < end:
        return None
    blocks = range(2, min(end // 3, max(right) // 2))  # right beyond two blocks: else it is a matter of length alone
    return next((b for b in blocks if right.isdisjoint(range(b, end, b))), None)


def _lengths(shortest: int, longest: int) -> Iterator[int]:
    yield from range(shortest, min(longest, _EVERY) + 1)
    yield from range(max(shortest, _EVERY) + 1, longest, _STRIDE)
    if longest > max(shortest, _EVERY):
        yield longest


def _condition(model: ir.Model, size: Size) -> Callable[[int], bool]:
    """Whether the graph is right, as a function of the length: the guards of one of its traces hold."""

    def place(found: re.Match[str]) -> str:
        fixed = size(found[1], int(found[2]))
        return "length" if fixed is None else str(fixed)

    names: dict[str, Any] = {"math": math, "min": min, "max": max, "abs": abs, "__builtins__": {}}
    traces = []
    for guards in model.meta[GUARDS]:
        parts = sorted({_SIZE.sub(place, guard) for guard in guards})
        traces.append(compile(" and ".join(f"({part})" for part in parts) or "True", "guards", "eval"))

    def holds(trace: CodeType, length: int) -> bool:
        try:
            return bool(eval(trace, {**names, "length": length}))
        except ZeroDivisionError:  # a size that the example would not have had
            return False

    return lambda length: any(holds(trace, length) for trace in traces)


def joined(model: ir.Model, other: ir.Model) -> bool:
    """Whether two traces gave the same graph; `model` is then right for the lengths of both."""
    if _written(model.graph) != _written(other.graph):
        return False
    model.meta[GUARDS] = [*model.meta[GUARDS], *other.meta[GUARDS]]
    return True


def _written(graph: ir.Graph) -> list[Any]:
    """A graph's nodes with their attributes and where their inputs come from, whatever its values are called."""
    place: dict[ir.Value | None, Any] = {None: None}
    for index, value in enumerate(graph.inputs):
        place[value] = ("input", index)
    for name, value in graph.initializers.items():
        place[value] = name if is_parameter(value) or value.const_value is None else value.const_value.tobytes()
    nodes: list[Any] = []
    for index, node in enumerate(graph):
        attributes = sorted((name, _content(a.value)) for name, a in node.attributes.items())
        nodes.append((node.domain, node.op_type, attributes, [place.get(value, "outer") for value in node.inputs]))
        place |= {value: (index, out) for out, value in enumerate(node.outputs)}
    return [*nodes, [place[value] for value in graph.outputs]]


def _content(value: Any) -> Any:
    if isinstance(value, ir.TensorProtocol):
        return str(value.dtype), tuple(map(str, value.shape)), value.tobytes()
    return _written(value) if isinstance(value, ir.Graph) else repr(value)
