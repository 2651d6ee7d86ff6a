"""What a decoder keeps between two calls: in which objects, as which tensors, and where in them each lies.

A state is any structure of lists, dicts and objects that holds tensors: transformers' cache, a cache of the model's own
class, tensors in attributes of its modules, or the tokens so far. A tensor's place in it is a path (`("layers", 0, "keys")`).
Which tensors follow the sequence's length is seen by comparing two states, after prompts of two lengths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from llmx.runtime.errors import UnsupportedModelError
from llmx.runtime.manifest import StateTensor
from transformers import PreTrainedConfig

Path = tuple[Any, ...]


def children(value: Any) -> list[tuple[Any, Any]]:
    """(key, part) of what a state's object consists of; nothing for tensors, settings and functions."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    plain = (torch.Tensor, torch.nn.Module, PreTrainedConfig, type)
    if isinstance(value, plain) or callable(value) or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).items())


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, value) of everything in a state that consists of nothing else."""
    parts = children(value)
    if not parts:
        yield path, value
    for key, part in parts:
        yield from leaves(part, (*path, key))


def tensors(state: Any) -> Iterator[tuple[Path, torch.Tensor]]:
    """(path, tensor) of everything that a state holds for its sequence; scalars are settings."""
    return ((path, leaf) for path, leaf in leaves(state) if isinstance(leaf, torch.Tensor) and leaf.ndim > 0)


def copied(value: Any) -> Any:
    """A state of the same tensors in lists, dicts and objects of its own (tuples become lists, which can be written)."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(part) for part in value]
    parts = children(value)
    if not parts:
        return value
    other = copy.copy(value)
    vars(other).update((key, copied(part)) for key, part in parts)
    return other


def _step(value: Any, key: Any) -> Any:
    return value[key] if isinstance(value, (dict, list, tuple)) else getattr(value, key)


@dataclass(frozen=True)
class CarriedTensor:
    """One tensor of a state. `shape` is of batch 1, `grows` the axis that follows the sequence's length (None: the tensor is
    replaced), `initial` what a replaced one is filled with before the first token.
    """

    layer: int
    part: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    grows: int | None
    side: str | None = None  # of an encoder-decoder: "decoder", or "encoder" for the cross-attention's
    initial: float = 0.0

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

    def read(self, state: Any) -> torch.Tensor:
        for key in self.path:
            state = _step(state, key)
        assert isinstance(state, torch.Tensor)
        return state

    def write(self, state: Any, tensor: torch.Tensor | None) -> None:
        for key in self.path[:-1]:
            state = _step(state, key)
        if isinstance(state, (dict, list)):
            state[self.path[-1]] = tensor
        else:
            setattr(state, self.path[-1], tensor)

    def describe(self) -> StateTensor:
        """The manifest's entry."""
        sizes: list[int | str] = ["slots", *self.shape[1:]]
        if self.grows is not None:
            sizes[self.grows] = "max_length" if self.side != "encoder" else "source_length"
        layout = "cross" if self.side == "encoder" else "replace" if self.grows is None else "grow"
        dtype = str(self.dtype).removeprefix("torch.")
        return StateTensor(self.layer, self.name, layout, self.input, self.output, dtype, sizes)


_NAMES = {"keys": "key", "values": "value"}


def compare(
    first: Any,
    second: Any,
    lengths: tuple[int, int],
    side: str | None = None,
    where: Callable[[int], str] = lambda _: "",
) -> list[CarriedTensor]:
    """The tensors of a state from those after prompts of two `lengths`. `where`: the place in the model's source
    that writes a layer.

    Raises UnsupportedModelError for what cannot be passed on: shapes that do not follow the length, numbers that count.
    """
    ones, others = dict(leaves(first)), dict(leaves(second))
    found = []
    for path in [*ones, *(path for path in others if path not in ones)]:
        leaf, other = ones.get(path), others.get(path)
        tensor = next((value for value in (leaf, other) if isinstance(value, torch.Tensor) and value.ndim > 0), None)
        if tensor is None:
            continue
        layer, part = _named(path)
        grows = _grows(leaf, other, lengths, f"layer {layer} of its cache keeps {part}{where(layer)}")
        found.append(CarriedTensor(layer, part, path, tuple(int(d) for d in tensor.shape), tensor.dtype, grows, side))
    for path, leaf in ones.items():
        if isinstance(leaf, (int, float)) and leaf != others.get(path):
            layer, part = _named(path)
            raise UnsupportedModelError(
                f"layer {layer} of its cache counts positions in {part}{where(layer)}; it would have to take them "
                "from position_ids"
            )
    return found


def _grows(first: Any, second: Any, lengths: tuple[int, int], what: str) -> int | None:
    """The axis of a tensor, given as it is after prompts of two `lengths`, that follows them."""
    tensors = isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    if not tensors or first.ndim != second.ndim or first.shape[0] != 1:
        raise UnsupportedModelError(
            f"{what} in a form that depends on the prompt; it would have to be one tensor a row"
        )
    moved = [axis for axis in range(first.ndim) if first.shape[axis] != second.shape[axis]]
    if [(first.shape[axis], second.shape[axis]) for axis in moved] not in ([], [lengths]):
        sizes = [" x ".join(str(int(size)) for size in tensor.shape) for tensor in (first, second)]
        raise UnsupportedModelError(
            f"{what}, which is {sizes[0]} after {lengths[0]} tokens and {sizes[1]} after {lengths[1]}; it would have to grow by "
            "one a token along one axis, from none, or keep its size"
        )
    return moved[0] if moved else None


def _named(path: Path) -> tuple[int, str]:
    """(layer, name within it): the path's first number, and the rest of it but what only says where layers are kept."""
    words = [word for key in path for word in str(key).split(".")]
    at = next((index for index, word in enumerate(words) if word.isdigit()), None)
    if at is None:
        return 0, ".".join(words[-1:])
    rest = words[at + 1 :] if any(not word.isdigit() for word in words[at + 1 :]) else [words[at - 1], *words[at + 1 :]]
    return int(words[at]), ".".join(rest)


@dataclass(frozen=True)
class Carried:
    """What a model carries: its state as it is after a prompt (whose settings are a template), and the tensors in it."""

    template: Any
    tensors: list[CarriedTensor]

    @staticmethod
    def of(state: Any, tensors: list[CarriedTensor]) -> Carried:
        """With `state` as the template. A tensor left in it would be a bug: every trace puts its own there."""
        template = copied(state)
        for tensor in tensors:
            tensor.write(template, None)
        return Carried(template, tensors)

    def describe(self) -> list[StateTensor]:
        return [tensor.describe() for tensor in self.tensors]

    def filled(self, past: list[torch.Tensor]) -> Any:
        """A state that holds `past`, as if the model had filled it."""
        state = copied(self.template)
        for tensor, value in zip(self.tensors, past, strict=True):
            tensor.write(state, value.clone())  # models write recurrent states in place
        return state
