"""Decoders whose state no attention operator keeps: plain ONNX, the state carried from one call to the next.

For models outside transformers' attention interface, attention that GroupQueryAttention cannot express, and recurrences.
The model runs its own code; what it keeps after a call (`Holder` says where) are the graph's outputs, and the next call's
inputs. Which tensors those are is found by running the model at two lengths under fake tensors: one whose size follows the
length has the layout `grow`, any other `replace`.

Two graphs of batch 1: `prefill` takes a whole prompt and no state; `decode` takes one token and the state. Where the
prefill cannot be traced (its Python loops over the prompt), prompts go through `decode` token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import onnx_ir as ir
import torch
from llmx.export.holders import Carried, CarriedTensor
from llmx.export.lengths import USEFUL, joined, longest_right, shortest_right
from llmx.export.lowering import lower
from llmx.export.packed import is_parameter
from llmx.export.passes import encoder_graph
from llmx.export.places import SEQ, Holder, State, tracing
from llmx.export.recurrences import recurrences_as_operators
from llmx.export.rope import untouched
from llmx.export.trace import HIDDEN, keep_positions
from llmx.runtime.errors import UnsupportedModelError


class _Module(torch.nn.Module):
    """Base of the two traced functions, with the model's parameters under their own names (prefix `model.`)."""

    def __init__(self, model: torch.nn.Module, holder: Holder, carried: Carried, hidden: bool) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.holder, self.carried, self.hidden = holder, carried, hidden

    def _run(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        state: State,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, Any]:
        read: list[torch.Tensor] = []
        hook = keep_positions(self.model, gather, read)
        try:
            logits = self.holder.call(self.model, input_ids, position_ids, state)
        finally:
            hook.remove()
        present = [tensor.read(state) for tensor in self.carried.tensors]
        return {"logits": logits, **({HIDDEN: read[-1].clone()} if self.hidden else {}), "present": present}


class CarriedPrefill(_Module):
    """A whole prompt: logits [1, asked, vocab] at the asked columns, and the state after it."""

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_positions: torch.Tensor
    ) -> dict[str, Any]:
        state = self.holder.start(self.config)
        return self._run(input_ids, position_ids, state, lambda states: states.index_select(1, logits_positions[0]))


class CarriedDecode(_Module):
    """One token after the state: logits [1, 1, vocab] and the new state."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]) -> dict[str, Any]:
        begun = [
            torch.where(position_ids[0, 0] == 0, torch.full_like(value, tensor.initial), value)
            if tensor.initial
            else value
            for tensor, value in zip(self.carried.tensors, past, strict=True)
        ]
        all_tokens = self.holder.argument is None
        gather = (lambda states: states[:, -1:]) if all_tokens else (lambda states: states)
        return self._run(input_ids, position_ids, self.carried.filled(begun), gather)


def carried_graphs(
    model: torch.nn.Module, holder: Holder, carried: Carried, context: int, hidden: bool, operators: bool
) -> dict[str, ir.Model]:
    """The graphs by name: `decode`, and `prefill` where it can be traced for prompts of any length up to the `context`; with
    `hidden`, both return the hidden states that the head reads, too. `operators`: whether the provider has an operator for
    recurrences. Raises UnsupportedModelError.
    """
    graphs = {}
    with recurrences_as_operators(model) if operators else nullcontext():
        prefill = _trace_prefill(CarriedPrefill(model, holder, carried, hidden), context)
    if prefill is not None:
        graphs["prefill"] = prefill
    graphs["decode"] = _trace_decode(CarriedDecode(model, holder, carried, hidden))
    separate_names(graphs)
    return graphs


def longest_state(decode: ir.Model, context: int) -> int:
    """The longest context, up to `context`, whose steps the graph is right for. Raises UnsupportedModelError for a few tokens."""
    found = longest_right(decode, 2, context - 1, lambda name, _: SEQ if name == "cross" else None) + 1
    if found < min(context, USEFUL):
        raise UnsupportedModelError(f"its code takes another way after {found} tokens, and a graph has no branches")
    return found


def separate_names(graphs: dict[str, ir.Model]) -> None:
    """Constants are named by each trace for itself, and one file holds those of all graphs."""
    for name, graph in graphs.items():
        for value in list(graph.graph.initializers.values()):
            if not is_parameter(value):
                value.name = f"{name}.{value.name}"


def _trace_prefill(module: CarriedPrefill, context: int) -> ir.Model | None:
    """The graph of whole prompts, or None where there is none for prompts of any length.

    Recurrences work in blocks, and a loop over the blocks is unrolled by the tracer, whatever the symbolic length: such a
    graph is right for the example's number of blocks alone. Traced with another, it is another graph.
    """
    carried = module.carried
    try:
        graph = _lower_prefill(module, SEQ)
        short = longest_right(graph, SEQ, context, _size) < context
        if short or any(tensor.grows is None for tensor in carried.tensors):
            other = _lower_prefill(module, min(2 * longest_block(module.config) + 5, context))
            if not joined(other, graph):
                return None
            graph = other  # whose sizes are less often 1 by chance
    except UnsupportedModelError:
        return None
    if longest_right(graph, SEQ, context, _size) < context:
        return None
    _name(graph.graph, carried, {"input_ids": "seq", "position_ids": "seq", "logits_positions": "asked"}, "asked")
    return encoder_graph(graph)


def _size(name: str, _: int) -> int | None:
    return 2 if name == "logits_positions" else None


def shortest_prompt(graphs: dict[str, ir.Model], context: int) -> int:
    """From how many tokens on the prefill graph is right; shorter prompts go through the decode graph."""
    return shortest_right(graphs["prefill"], context, _size) if "prefill" in graphs else 1


def _lower_prefill(module: CarriedPrefill, length: int) -> ir.Model:
    inputs = {
        "input_ids": torch.ones(1, length, dtype=torch.long),
        "position_ids": torch.arange(length)[None],
        "logits_positions": torch.tensor([[0, 4]]),
    }
    dynamic = {name: {1: torch.export.Dim.DYNAMIC} for name in inputs}
    with untouched(module.model), tracing():
        return lower(module, inputs, dynamic)


def longest_block(config: Any) -> int:
    """The largest block that a recurrence may work in: the config's, and 64 where it is written in the code."""
    sizes = [v for name, v in vars(config.get_text_config(decoder=True)).items() if "chunk" in name and type(v) is int]
    return max([64, *sizes])


def _trace_decode(module: CarriedDecode) -> ir.Model:
    carried = module.carried
    inputs = {
        "input_ids": torch.ones(1, 1, dtype=torch.long),
        "position_ids": torch.full((1, 1), SEQ),
        "past": [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in carried.tensors],
    }
    dynamic: dict[str, Any] = {
        "input_ids": None,
        "position_ids": None,
        "past": [None if t.grows is None else {t.grows: torch.export.Dim.DYNAMIC} for t in carried.tensors],
    }
    with untouched(module.model), tracing():
        graph = lower(module, inputs, dynamic)
    _name(graph.graph, carried, {"input_ids": 1, "position_ids": 1}, 1)
    return encoder_graph(graph)


def _name(graph: ir.Graph, carried: Carried, columns: dict[str, int | str], asked: int | str) -> None:
    """The package format's names and shapes for inputs and outputs."""
    by_name = {f"{side}.{i}": tensor for side in ("past", "present") for i, tensor in enumerate(carried.tensors)}
    graph_state_names(graph, by_name, columns)
    assert graph.outputs[0].name == "logits"
    for value in graph.outputs:
        if value.name in ("logits", HIDDEN) and value.shape is not None:
            value.shape = ir.Shape([1, asked, value.shape[2]])


def graph_state_names(graph: ir.Graph, state: dict[str, CarriedTensor], columns: dict[str, int | str]) -> None:
    """Rename the inputs and outputs that hold `state` (by their traced names), and give the `columns` of the others."""
    for values, is_input in ((graph.inputs, True), (graph.outputs, False)):
        for value in values:
            tensor = state.get(value.name or "")
            if tensor is not None:
                value.name = tensor.input if is_input else tensor.output
                value.shape = ir.Shape([1, *tensor.describe().shape[1:]])
            elif value.name in columns:
                value.shape = ir.Shape([1, columns[value.name]])
