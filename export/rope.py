"""Rotary factors that depend on how long the sequence is: transformers' rope types `longrope` and `dynamic`.

transformers picks them anew in each forward call, by the largest position of the call, in Python and in place. A traced
graph takes them per token instead, from the input `rope_lengths`: the prompt's length for the prompt's tokens, however
it is cut into chunks, and position + 1 for generated ones. That is what `generate` does with its cache.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from llmx.runtime.errors import UnsupportedModelError
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True)
class LengthRule:
    """How a model's rotary factors depend on the length.

    Sequences of up to `edge` positions have the original factors. `stretch` times the config's context is what the
    scaling reaches (1 where the config's context says it already). `recomputes`: `generate` drops its cache when a
    sequence grows past the edge, and computes it anew with the factors of the longer sequence.
    """

    edge: int
    stretch: float
    recomputes: bool


@dataclass(frozen=True)
class _Rotary:
    """A module's rotary embedding for one layer type (None: for all layers), of a type that depends on the length."""

    module: Any
    layer_type: str | None
    rope_type: str

    @property
    def prefix(self) -> str:
        return "" if self.layer_type is None else f"{self.layer_type}_"

    @property
    def parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = self.module.config.rope_parameters
        return parameters if self.layer_type is None else parameters[self.layer_type]

    @property
    def edge(self) -> int:
        if self.rope_type == "longrope":
            return int(self.parameters["original_max_position_embeddings"])
        return int(self.module.original_max_seq_len)

    def frequencies(self, lengths: torch.Tensor | None) -> torch.Tensor:
        """Inverse frequencies: [dim / 2], or [batch, seq, dim / 2] for sequences of `lengths` [batch, seq]."""
        original: torch.Tensor = getattr(self.module, f"{self.prefix}original_inv_freq")
        if lengths is None:
            return original
        lengths = lengths[..., None]
        wanted = self.edge + 1 if self.rope_type == "longrope" else lengths  # long factors are one set, NTK's grow
        grown, _ = ROPE_INIT_FUNCTIONS[self.rope_type](
            self.module.config, original.device, seq_len=wanted, layer_type=self.layer_type
        )
        return torch.where(lengths > self.edge, grown, original)


def _rotaries(model: torch.nn.Module) -> list[_Rotary]:
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):  # transformers' own condition
                found.append(_Rotary(module, layer_type, kind))
    return found


def length_rule(model: Any) -> LengthRule | None:
    """How `model`'s rotary factors depend on the sequence's length; None where they do not."""
    rotaries = _rotaries(model)
    if not rotaries:
        return None
    edge = min(rotary.edge for rotary in rotaries)
    stretch = max(1.0 if r.rope_type == "longrope" else float(r.parameters["factor"]) for r in rotaries)
    recomputes = _recomputes(model, edge)
    if recomputes and any(rotary.edge != edge for rotary in rotaries):
        raise UnsupportedModelError("its layers' rotary factors change at several lengths, and its cache with them")
    return LengthRule(edge, max(1.0, stretch), recomputes)


class _FullCache(Cache):
    """A cache that says it holds `length` positions, for asking `generate` what it would do with it."""

    is_compileable = False

    def __init__(self, length: int) -> None:
        super().__init__(layers=[])
        self.length = length

    def __len__(self) -> int:
        return 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def _recomputes(model: Any, length: int) -> bool:
    """Whether `generate` drops a cache of `length` positions rather than add one more to it."""
    ids = torch.zeros(1, length + 1, dtype=torch.long)
    inputs = model.prepare_inputs_for_generation(
        ids,
        past_key_values=_FullCache(length),
        attention_mask=torch.ones_like(ids),
        next_sequence_length=1,
        use_cache=True,
    )
    return inputs.get("past_key_values") is None


@contextmanager
def by_length(model: torch.nn.Module, lengths: torch.Tensor | None) -> Iterator[None]:
    """Rotary factors are data flow meanwhile: those of a sequence of `lengths` (int64 [batch, seq], one for each token),
    or the original ones for None. Nothing happens to a model whose factors do not depend on the length.
    """
    by_module: dict[Any, dict[str | None, _Rotary]] = {}
    for rotary in _rotaries(model):
        by_module.setdefault(rotary.module, {})[rotary.layer_type] = rotary
    with ExitStack() as stack:
        for module, kinds in by_module.items():
            module.forward = functools.partial(_forward, module, kinds, lengths)
            stack.callback(delattr, module, "forward")  # the class's own shows again
        yield


def _forward(
    module: Any,
    kinds: dict[str | None, _Rotary],
    lengths: torch.Tensor | None,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    layer_type: str | None = None,
) -> Any:
    """The rotary embedding without transformers' update in front of it, on frequencies that we put in place."""
    computed = inspect.unwrap(type(module).forward)
    layer = {} if layer_type is None else {"layer_type": layer_type}
    rotary = kinds.get(layer_type)
    if rotary is None:
        return computed(module, x, position_ids, **layer)
    name = f"{rotary.prefix}inv_freq"
    own = getattr(module, name)
    setattr(module, name, rotary.frequencies(lengths))
    try:
        return computed(module, x, position_ids, **layer)
    except Exception as error:
        raise UnsupportedModelError(
            f'{type(module).__name__} (rope_type "{rotary.rope_type}") chooses its factors by the sequence\'s length in a '
            f"way of its own, which a graph cannot follow ({type(error).__name__})"
        ) from error
    finally:
        setattr(module, name, own)


@contextmanager
def untouched(model: torch.nn.Module, real: bool = False) -> Iterator[None]:
    """Whatever runs meanwhile leaves no trace in `model` but in its parameters: buffers, their values and plain
    attributes are put back. Rotary embeddings keep what they computed; under fake tensors that is no value at all.

    `real`: no fake tensors run. Then a model that changes its parameters in its first call (RWKV scales them) keeps its note
    of having done so.
    """
    saved = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    versions = [parameter._version for parameter in model.parameters()]
    try:
        yield
    finally:
        changed = real and versions != [parameter._version for parameter in model.parameters()]
        for module, attributes, buffers in saved:
            notes = {name: v for name, v in vars(module).items() if changed and isinstance(v, bool)}
            vars(module).clear()
            vars(module).update(attributes | notes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
