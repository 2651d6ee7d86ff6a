"""A decoder as one traced graph: tokens and state in, logits and state out.

The model is traced once, with symbolic batch and sequence sizes, as the prefill graph; `llmx.export.passes` derives the
decode graph from it. What the model keeps between steps is found by a probing run under fake tensors, never from its
name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from llmx.export import attention
from llmx.export.attention import LayerState, Recorder, StepInputs, recording
from llmx.export.lengths import longest_right
from llmx.export.lowering import class_place, forward_failed, lower
from llmx.export.rope import by_length, untouched
from llmx.export.shims import fake_tensors, shimmed
from llmx.runtime.errors import LlmxError, UnsupportedModelError

#: Placeholder for "the rows of `hidden` at `positions`"; each graph lowers it its own way (llmx.export.passes).
GATHER_POSITIONS = ("llmx", "GatherPositions")

#: The output with the hidden states that the output head reads.
HIDDEN = "last_hidden_state"

# Sizes that the example inputs are made with. All differ, and none is 0 or 1, which tracing would specialise away.
_BATCH, _SEQ, _ASKED, _LENGTH = 3, 5, 2, 32


class PrefillModule(torch.nn.Module):
    """The traced function, with the model's parameters under their own names (prefix `model.`)."""

    def __init__(self, model: torch.nn.Module, layers: list[LayerState], hidden: bool = False) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.layers_kept = layers
        self.hidden = hidden

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logits_positions: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
        query_seqlens: torch.Tensor | None = None,
        rope_lengths: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Logits [batch, asked, vocab] at the asked columns, with `hidden` what the head reads there [batch, asked, hidden],
        and each layer's state with the new rows in it.
        """
        by_layer = {state.layer: tensors for state, tensors in zip(self.layers_kept, past, strict=True)}
        steps = StepInputs(by_layer, seqlens_k, total_sequence_length, query_seqlens)
        recorder = Recorder(steps)
        read: list[torch.Tensor] = []
        hook = keep_positions(self.model, lambda states: _gather_positions(states, logits_positions), read)
        try:
            with recording(recorder) as cache, by_length(self.model, rope_lengths):
                logits = _call(self.model, input_ids, position_ids, cache)
        finally:
            hook.remove()
        present = [recorder.present[state.layer] for state in self.layers_kept]
        return {"logits": logits, **({HIDDEN: read[-1].clone()} if self.hidden else {}), "present": present}


def keep_positions(
    model: torch.nn.Module, gather: Callable[[torch.Tensor], torch.Tensor], read: list[torch.Tensor]
) -> Any:
    """A hook (to be removed) that lets the output head read `gather(hidden states)`, and notes that in `read`."""

    def hook(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        read.append(gather(args[0]))
        return (read[-1], *args[1:])

    return output_head(model).register_forward_pre_hook(hook)


def _gather_positions(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[batch, seq, hidden] at [batch, asked] -> [batch, asked, hidden], as a placeholder node."""
    return torch.onnx.ops.symbolic(
        "::".join(GATHER_POSITIONS),
        [hidden, positions],
        dtype=hidden.dtype,
        shape=(*positions.shape, hidden.shape[-1]),
        version=1,
    )


def output_head(model: torch.nn.Module) -> torch.nn.Module:
    """The module that turns hidden states into logits. Raises UnsupportedModelError where there is none."""
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output embeddings, so it gives no next-token logits"
        )
    return head


def _call(model: torch.nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
    return model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True).logits


def probe_layers(model: torch.nn.Module) -> list[LayerState]:
    """Run `model` once under fake tensors and return what each layer keeps, by layer number.

    Raises UnsupportedModelError for a model that takes no position ids, or whose layers keep something else.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in ("position_ids", "past_key_values"):
        if name not in parameters and not takes_all:
            raise UnsupportedModelError(f"{type(model).__name__}.forward takes no {name}")
    output_head(model)
    recorder = Recorder()
    with (
        torch.no_grad(),
        untouched(model),
        by_length(model, None),
        fake_tensors(),
        shimmed(),
        recording(recorder) as cache,
    ):
        ids = torch.ones(_BATCH, _SEQ, dtype=torch.long)
        try:
            _call(model, ids, torch.arange(_SEQ)[None].expand(_BATCH, -1), cache)
        except LlmxError:
            raise
        except Exception as error:
            needs = "it would have to keep its state by `update` of transformers' Cache alone"
            raise forward_failed(error, needs) from error
    if not recorder.layers:
        raise UnsupportedModelError(
            f"{type(model).__name__}{class_place(type(model))} does not use transformers' attention interface, which the "
            "export traces through"
        )
    return [recorder.layers[layer] for layer in sorted(recorder.layers)]


def trace(
    model: torch.nn.Module,
    layers: list[LayerState],
    query_seqlens: bool,
    rope_lengths: bool = False,
    hidden: bool = False,
) -> ir.Model:
    """The prefill graph of `model`, unoptimised, with the package format's input and output names and shapes.

    `rope_lengths`: the graph takes the lengths that decide the rotary factors; else it has the original factors.
    `hidden`: it returns the hidden states that the head reads, too.
    """
    dtype = next(model.parameters()).dtype
    # State shapes are constants while tracing: they only pass through the attention node, which reads them at run
    # time, and symbolic ones would cost the tracer a guard for each layer.
    past = [tuple(torch.zeros(_BATCH, s.kv_heads, _LENGTH, s.head_dim, dtype=dtype) for _ in range(2)) for s in layers]
    inputs: dict[str, Any] = {
        "input_ids": torch.ones(_BATCH, _SEQ, dtype=torch.long),
        "position_ids": torch.arange(_SEQ)[None].repeat(_BATCH, 1),
        "seqlens_k": torch.full((_BATCH,), _SEQ - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(_SEQ, dtype=torch.int32),
        "logits_positions": torch.zeros(_BATCH, _ASKED, dtype=torch.long),
        "past": past,
    }
    if query_seqlens:
        inputs["query_seqlens"] = torch.full((_BATCH,), _SEQ, dtype=torch.int32)
    if rope_lengths:
        inputs["rope_lengths"] = torch.full((_BATCH, _SEQ), _SEQ)
    symbolic = torch.export.Dim.DYNAMIC
    dynamic: dict[str, Any] = dict.fromkeys(inputs)
    for name in {"input_ids", "position_ids", "logits_positions", "rope_lengths"} & set(inputs):
        dynamic[name] = {0: symbolic, 1: symbolic}
    dynamic["past"] = [(None, None)] * len(layers)
    graph_model = lower(PrefillModule(model, layers, hidden), inputs, dynamic)
    if not any(value.uses() for value in graph_model.graph.inputs if value.name == "position_ids"):
        # It would be right for whole prompts and wrong for everything after them.
        raise UnsupportedModelError(
            f"{type(model).__name__} ignores position_ids: it counts positions by the length of its cache"
        )
    _name_inputs_and_outputs(graph_model.graph, layers)
    return graph_model


def check_lengths(traced: ir.Model, context: int) -> None:
    """Raises UnsupportedModelError where the graph is not right for chunks of some length up to the context."""

    def size(name: str, axis: int) -> int | None:
        return _BATCH if axis == 0 else _ASKED if name == "logits_positions" else None

    found = longest_right(traced, 2, context, size)
    if found < context:
        raise UnsupportedModelError(
            f"its code takes another way for {found + 1} tokens than for {_SEQ}, and a graph has no branches"
        )


_SHAPES: dict[str, list[str]] = {
    "input_ids": ["batch", "seq"],
    "position_ids": ["batch", "seq"],
    "seqlens_k": ["batch"],
    "total_sequence_length": [],
    "query_seqlens": ["batch"],
    "logits_positions": ["batch", "asked"],
    "rope_lengths": ["batch", "seq"],
}


def state_names(layer: int) -> list[tuple[str, str, str]]:
    """(part, input name, output name) of a layer's state tensors, in the ecosystem's names."""
    return [(part, f"past_key_values.{layer}.{part}", f"present.{layer}.{part}") for part in ("key", "value")]


def _name_inputs_and_outputs(graph: ir.Graph, layers: list[LayerState]) -> None:
    state: dict[str, tuple[str, LayerState]] = {}
    for index, layer in enumerate(layers):
        for side, (_, past_name, present_name) in enumerate(state_names(layer.layer)):
            state[f"past.{index}.{side}"] = (past_name, layer)
            state[f"present.{index}.{side}"] = (present_name, layer)
    for value in [*graph.inputs, *graph.outputs]:
        if value.name in state:
            value.name, layer = state[value.name]
            value.shape = ir.Shape(["slots", layer.kv_heads, "max_length", layer.head_dim])
        elif value.name in _SHAPES:
            value.shape = ir.Shape(_SHAPES[value.name])
    assert graph.outputs[0].name == "logits"
    for value in graph.outputs:
        if value.name in ("logits", HIDDEN) and value.shape is not None:
            value.shape = ir.Shape(["batch", "asked", value.shape[2]])


attention.register()
