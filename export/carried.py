"""Decoders whose state no attention operator keeps: plain ONNX, the state carried from one call to the next.

For models outside transformers' attention interface, attention that GroupQueryAttention cannot express, and recurrences.
The model runs its own code on transformers' cache object; what that holds after a call are the graph's outputs, and the
next call's inputs. Which tensors those are is found by running the model at two lengths under fake tensors: one whose size
follows the length has the layout `grow`, any other `replace`.

Two graphs of batch 1: `prefill` takes a whole prompt and no state; `decode` takes one token and the state. Where the
prefill cannot be traced (its Python loops over the prompt), prompts go through `decode` token by token.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from llmx.export.lengths import USEFUL, joined, longest_right, shortest_right
from llmx.export.lowering import _first_line, _place, lower
from llmx.export.packed import is_parameter
from llmx.export.passes import encoder_graph
from llmx.export.recurrences import recurrences_as_operators
from llmx.export.rope import length_rule, untouched
from llmx.export.shims import fake_tensors, replaced, shimmed
from llmx.export.trace import HIDDEN, keep_positions, output_head
from llmx.runtime.errors import LlmxError, UnsupportedModelError
from llmx.runtime.manifest import StateTensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

# Lengths of the example prompts: different, above 1, and no size that a model is likely to have.
_SEQ, _OTHER_SEQ = 11, 13


@dataclass(frozen=True)
class CarriedTensor:
    """One tensor of the cache. `part` is its path in the layer's object (`keys`, `conv_states.0`), `shape` of batch 1,
    `grows` the axis that follows the sequence's length (None: the tensor is replaced).
    """

    layer: int
    part: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    grows: int | None
    side: str | None = None  # of an encoder-decoder: "decoder", or "encoder" for the cross-attention's

    @property
    def name(self) -> str:
        part = _NAMES.get(self.part, self.part)
        return part if self.side is None else f"{self.side}.{part}"

    @property
    def input(self) -> str:
        return f"past_key_values.{self.layer}.{self.name}"

    @property
    def output(self) -> str:
        return f"present.{self.layer}.{self.name}"

    def read(self, layer: Any) -> torch.Tensor:
        tensor: torch.Tensor = dict(_tensors(layer))[self.part]
        return tensor

    def write(self, layer: Any, tensor: torch.Tensor | None) -> None:
        name, _, key = self.part.partition(".")
        if key:
            getattr(layer, name)[int(key)] = tensor
        else:
            setattr(layer, name, tensor)

    def describe(self) -> StateTensor:
        """The manifest's entry."""
        sizes: list[int | str] = ["slots", *self.shape[1:]]
        if self.grows is not None:
            sizes[self.grows] = "max_length" if self.side != "encoder" else "source_length"
        layout = "cross" if self.side == "encoder" else "replace" if self.grows is None else "grow"
        dtype = str(self.dtype).removeprefix("torch.")
        return StateTensor(self.layer, self.name, layout, self.input, self.output, dtype, sizes)


_NAMES = {"keys": "key", "values": "value"}


def _tensors(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of everything that a cache layer holds for its sequence; scalars are settings."""
    for name, value in vars(layer).items():
        items = value.items() if isinstance(value, dict) else [(None, value)]
        for key, tensor in items:
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 0:
                yield (name if key is None else f"{name}.{key}"), tensor


@dataclass(frozen=True)
class Carried:
    """What a model carries: the cache as it is after a prompt (its settings are a template), and its tensors."""

    template: DynamicCache
    tensors: list[CarriedTensor]
    argument: str  # under which the model takes its cache

    @staticmethod
    def of(cache: DynamicCache, tensors: list[CarriedTensor], argument: str) -> Carried:
        """With `cache` as the template. A tensor left in it would be a bug: every trace puts its own there."""
        for tensor in tensors:
            tensor.write(cache.layers[tensor.layer], None)
        return Carried(cache, tensors, argument)

    def describe(self) -> list[StateTensor]:
        return [tensor.describe() for tensor in self.tensors]

    def cache(self, past: list[torch.Tensor]) -> DynamicCache:
        """A cache that holds `past`, as if the model had filled it."""
        cache = copy.copy(self.template)
        cache.layers = [_copy(layer) for layer in self.template.layers]
        for tensor, value in zip(self.tensors, past, strict=True):
            tensor.write(cache.layers[tensor.layer], value.clone())  # models write recurrent states in place
        return cache


def _copy(layer: Any) -> Any:
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(other, name, dict(value))
    return other


def new_cache(config: Any) -> DynamicCache:
    """An empty cache of the kind that `generate` makes, but for sliding windows: their layers keep every position, and the
    model's mask hides what has left the window, so that no size depends on the window in a way that a trace would fix.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer):
            cache.layers[index] = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[index] = DynamicLayer()
    return cache


def probe_carried(model: torch.nn.Module) -> Carried:
    """Run `model` at two lengths under fake tensors and compare what its cache holds.

    Raises UnsupportedModelError for a model that takes no cache of transformers' common kind, or keeps nothing in it.
    """
    argument = cache_argument(model)
    if argument is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward takes no cache (past_key_values) that could be carried from step to step; it "
            "would have to keep its state in one of transformers'"
        )
    output_head(model)
    if any(vars(module).get("is_decoder") is False for module in model.modules()):
        # its tokens see those after them, which no cache can hold
        raise UnsupportedModelError("its config says is_decoder: false; export it with --task embed or fill-mask")
    if length_rule(model) is not None:
        raise UnsupportedModelError(
            "its rotary factors depend on the sequence's length, which carried state has no input for"
        )
    caches = []
    with torch.no_grad(), untouched(model), tracing(), fake_tensors(), shimmed():
        for length in (_SEQ, _OTHER_SEQ):
            cache = new_cache(model.config)
            try:
                call_with_cache(
                    model, argument, torch.ones(1, length, dtype=torch.long), torch.arange(length)[None], cache
                )
            except LlmxError:
                raise
            except Exception as error:
                raise UnsupportedModelError(f"its forward pass failed: {_first_line(error)}{_place(error)}") from error
            caches.append(cache)
    tensors = [
        tensor
        for index, layers in enumerate(zip(caches[0].layers, caches[1].layers, strict=True))
        for tensor in compare_layers(index, *layers, length=_SEQ)
    ]
    if not tensors:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps nothing in the cache that it is given, as it would have to"
        )
    return Carried.of(caches[0], tensors, argument)


def cache_argument(model: Any) -> str | None:
    """The name under which a model takes its cache."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), None)


def compare_layers(index: int, layer: Any, other: Any, length: int, side: str | None = None) -> Iterator[CarriedTensor]:
    """The tensors of a layer from its states after prompts of two lengths, the first being `length`."""
    seconds = dict(_tensors(other))
    for part, first in _tensors(layer):
        second = seconds.get(part)
        if second is None or first.ndim != second.ndim or first.shape[0] != 1:
            raise UnsupportedModelError(f"layer {index} of its cache keeps {part} in a form that depends on the prompt")
        moved = [axis for axis in range(first.ndim) if first.shape[axis] != second.shape[axis]]
        if [first.shape[a] for a in moved] not in ([], [length]):
            raise UnsupportedModelError(
                f"layer {index} of its cache keeps {part}, whose size is not the sequence's length"
            )
        shape = tuple(int(d) for d in first.shape)
        yield CarriedTensor(index, part, shape, first.dtype, moved[0] if moved else None, side)
    for name, value in vars(layer).items():
        if isinstance(value, int) and value != vars(other)[name]:
            raise UnsupportedModelError(f"layer {index} of its cache counts positions in {name}")


@contextmanager
def tracing() -> Iterator[None]:
    """Fake and traced tensors have no address to mark."""
    with replaced(torch._dynamo, "mark_static_address", lambda *_, **__: None):
        yield


def call_with_cache(
    model: Any, argument: str, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Any
) -> torch.Tensor:
    more: dict[str, Any] = {argument: cache, "use_cache": True, "return_dict": True}
    if "position_ids" in inspect.signature(model.forward).parameters:
        more["position_ids"] = position_ids
    logits: torch.Tensor = model(input_ids=input_ids, **more).logits
    return logits


class _Module(torch.nn.Module):
    """Base of the two traced functions, with the model's parameters under their own names (prefix `model.`)."""

    def __init__(self, model: torch.nn.Module, carried: Carried, hidden: bool) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.carried, self.hidden = carried, hidden

    def _run(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Any,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, Any]:
        read: list[torch.Tensor] = []
        hook = keep_positions(self.model, gather, read)
        try:
            logits = call_with_cache(self.model, self.carried.argument, input_ids, position_ids, cache)
        finally:
            hook.remove()
        present = [tensor.read(cache.layers[tensor.layer]) for tensor in self.carried.tensors]
        return {"logits": logits, **({HIDDEN: read[-1].clone()} if self.hidden else {}), "present": present}


class CarriedPrefill(_Module):
    """A whole prompt: logits [1, asked, vocab] at the asked columns, and the state after it."""

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_positions: torch.Tensor
    ) -> dict[str, Any]:
        cache = new_cache(self.config)
        return self._run(input_ids, position_ids, cache, lambda states: states.index_select(1, logits_positions[0]))


class CarriedDecode(_Module):
    """One token after the state: logits [1, 1, vocab] and the new state."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]) -> dict[str, Any]:
        return self._run(input_ids, position_ids, self.carried.cache(past), lambda states: states)


def carried_graphs(
    model: torch.nn.Module, carried: Carried, context: int, hidden: bool, operators: bool
) -> dict[str, ir.Model]:
    """The graphs by name: `decode`, and `prefill` where it can be traced for prompts of any length up to the `context`; with
    `hidden`, both return the hidden states that the head reads, too. `operators`: whether the provider has an operator for
    recurrences. Raises UnsupportedModelError.
    """
    graphs = {}
    with recurrences_as_operators(model) if operators else nullcontext():
        prefill = _trace_prefill(model, carried, context, hidden)
    if prefill is not None:
        graphs["prefill"] = prefill
    graphs["decode"] = _trace_decode(model, carried, hidden)
    separate_names(graphs)
    return graphs


def longest_state(decode: ir.Model, context: int) -> int:
    """The longest context, up to `context`, whose steps the graph is right for. Raises UnsupportedModelError for a few tokens."""
    found = longest_right(decode, 2, context - 1, lambda name, _: _SEQ if name == "cross" else None) + 1
    if found < min(context, USEFUL):
        raise UnsupportedModelError(f"its code takes another way after {found} tokens, and a graph has no branches")
    return found


def separate_names(graphs: dict[str, ir.Model]) -> None:
    """Constants are named by each trace for itself, and one file holds those of all graphs."""
    for name, graph in graphs.items():
        for value in list(graph.graph.initializers.values()):
            if not is_parameter(value):
                value.name = f"{name}.{value.name}"


def _trace_prefill(model: torch.nn.Module, carried: Carried, context: int, hidden: bool) -> ir.Model | None:
    """The graph of whole prompts, or None where there is none for prompts of any length.

    Recurrences work in blocks, and a loop over the blocks is unrolled by the tracer, whatever the symbolic length: such a
    graph is right for the example's number of blocks alone. Traced with another, it is another graph.
    """

    try:
        graph = _lower_prefill(model, carried, _SEQ, hidden)
        short = longest_right(graph, _SEQ, context, _size) < context
        if short or any(tensor.grows is None for tensor in carried.tensors):
            other = _lower_prefill(model, carried, min(2 * longest_block(model.config) + 5, context), hidden)
            if not joined(other, graph):
                return None
            graph = other  # whose sizes are less often 1 by chance
    except UnsupportedModelError:
        return None
    if longest_right(graph, _SEQ, context, _size) < context:
        return None
    _name(graph.graph, carried, {"input_ids": "seq", "position_ids": "seq", "logits_positions": "asked"}, "asked")
    return encoder_graph(graph)


def _size(name: str, _: int) -> int | None:
    return 2 if name == "logits_positions" else None


def shortest_prompt(graphs: dict[str, ir.Model], context: int) -> int:
    """From how many tokens on the prefill graph is right; shorter prompts go through the decode graph."""
    return shortest_right(graphs["prefill"], context, _size) if "prefill" in graphs else 1


def _lower_prefill(model: torch.nn.Module, carried: Carried, length: int, hidden: bool) -> ir.Model:
    inputs = {
        "input_ids": torch.ones(1, length, dtype=torch.long),
        "position_ids": torch.arange(length)[None],
        "logits_positions": torch.tensor([[0, 4]]),
    }
    dynamic = {name: {1: torch.export.Dim.DYNAMIC} for name in inputs}
    with untouched(model), tracing():
        return lower(CarriedPrefill(model, carried, hidden), inputs, dynamic)


def longest_block(config: Any) -> int:
    """The largest block that a recurrence may work in: the config's, and 64 where it is written in the code."""
    sizes = [v for name, v in vars(config.get_text_config(decoder=True)).items() if "chunk" in name and type(v) is int]
    return max([64, *sizes])


def _trace_decode(model: torch.nn.Module, carried: Carried, hidden: bool) -> ir.Model:
    inputs = {
        "input_ids": torch.ones(1, 1, dtype=torch.long),
        "position_ids": torch.full((1, 1), _SEQ),
        "past": [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in carried.tensors],
    }
    dynamic: dict[str, Any] = {
        "input_ids": None,
        "position_ids": None,
        "past": [None if t.grows is None else {t.grows: torch.export.Dim.DYNAMIC} for t in carried.tensors],
    }
    with untouched(model), tracing():
        graph = lower(CarriedDecode(model, carried, hidden), inputs, dynamic)
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
