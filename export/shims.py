"""Python that a tracer cannot follow, in other words: what stands in for tensor methods while a model is probed or traced.

Each says the same for any input that verification could tell apart from it; none knows a model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import symbolic_shapes


def fake_tensors() -> FakeTensorMode:
    """Tensors without values, whose sizes may depend on values (they become symbols)."""
    env = symbolic_shapes.ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` meanwhile."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def shimmed() -> Iterator[None]:
    """All of this module's stand-ins for tensor methods."""
    with ExitStack() as stack:
        for owner, name, make in _SHIMS:
            stack.enter_context(replaced(owner, name, make(getattr(owner, name))))
        yield


@contextmanager
def symbolic_int(model: torch.nn.Module) -> Iterator[None]:
    """`int` in the source of `model` leaves a size that the tracer keeps symbolic as it is, where Python's own makes a
    constant of it.
    """
    touched = []
    for source in {type(module).__module__ for module in model.modules()} & set(sys.modules):
        names = vars(sys.modules[source])
        if not source.startswith(("torch.", "llmx.", "builtins")) and "int" not in names:
            names["int"] = _Int
            touched.append(names)
    try:
        yield
    finally:
        for names in touched:
            del names["int"]


class _IntType(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)

    def __call__(cls, *args: Any) -> Any:
        return args[0] if len(args) == 1 and isinstance(args[0], torch.SymInt) else int(*args)


class _Int(metaclass=_IntType):
    """What stands for `int`."""


class EveryIndex:
    """`hits.nonzero()` of a vector of static length, for a loop over the hits: every index, hit or not.

    Mixtures of experts loop over the experts that some token chose. A loop over all of them does the same, as one that
    nobody chose has no rows. It can be looped over and nothing else; that the loop's body is neutral for the others is seen
    in verification, whose single decoded tokens choose few experts.
    """

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[_Index]:
        return (_Index([index]) for index in range(self._length))


class _Index(list[int]):
    """A row [index] of `nonzero()`: an index for tensors as it is, a number by `[0]` or `item()`."""

    def item(self) -> int:
        return self[0]

    def __getitem__(self, key: Any) -> Any:
        return _Row(super().__getitem__(key))


class _Row(int):
    """The number of an expert. Where masks count one expert more than there are (a place for "none"), nobody chooses the
    last, for which eager PyTorch would fail: any row serves.
    """

    def within(self, tensor: torch.Tensor) -> int:
        size = tensor.shape[0] if tensor.ndim else 0
        return 0 if type(size) is int and self >= size else int(self)


def _nonzero(original: Callable[..., Any]) -> Callable[..., Any]:
    def nonzero(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not args and not kwargs.get("as_tuple", False)
        caller = str(sys._getframe(1).f_globals.get("__name__"))  # PyTorch's own shape functions want the tensor
        if (
            plain
            and not caller.startswith("torch.")
            and self.ndim == 1
            and self.dtype == torch.bool
            and type(self.shape[0]) is int
        ):
            return EveryIndex(self.shape[0])
        return original(self, *args, **kwargs)

    return nonzero


def _where(original: Callable[..., Any]) -> Callable[..., Any]:
    """Where a mask's hits are counted by the input, a graph is traced for "some": none and one run through it as well."""

    def where(condition: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(condition, *args, **kwargs)
        if isinstance(found, tuple) and found and isinstance(found[0].shape[0], torch.SymInt):
            torch._check(found[0].shape[0] > 1)
        return found

    return where


def _constrain(original: Callable[..., Any]) -> Callable[..., Any]:
    """A single token has one hit or none, and a graph traced for "some" is not for at most one: no upper bounds."""

    def constrain(size: Any, min: int | None = None, max: int | None = None) -> None:
        original(size, min)

    return constrain


def _getitem(original: Callable[..., Any]) -> Callable[..., Any]:
    """Complex tensors by their parts: ONNX has no complex Unsqueeze."""

    def getitem(self: torch.Tensor, index: Any) -> torch.Tensor:
        if isinstance(index, _Row):
            index = index.within(self)
        if self.is_complex():
            return torch.complex(original(self.real, index), original(self.imag, index))
        item: torch.Tensor = original(self, index)
        return item

    return getitem


def _squeeze(original: Callable[..., Any]) -> Callable[..., Any]:
    """Squeezing an axis of another size than 1 does nothing in PyTorch, and is an error in ONNX."""

    def squeeze(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) == 1 and not kwargs and type(args[0]) is int:
            size = self.shape[args[0]] if self.ndim else 1
            if type(size) is int and size != 1:
                return self
        tensor: torch.Tensor = original(self, *args, **kwargs)
        return tensor

    return squeeze


def _div(original: Callable[..., Any]) -> Callable[..., Any]:
    """The quotient of two sizes is a size; as a tensor, its value would be unknown where it is used as a size again."""

    def div(input: Any, other: Any, *, rounding_mode: str | None = None, out: Any = None) -> Any:
        sizes = isinstance(input, torch.SymInt) and isinstance(other, (int, torch.SymInt))
        if sizes and rounding_mode in ("trunc", "floor") and out is None:
            return input // other  # sizes are positive: truncated and floored are one
        return original(input, other, rounding_mode=rounding_mode, out=out)

    return div


def _module_to(original: Callable[..., Any]) -> Callable[..., Any]:
    """Routers convert their own weights in each call, to what they are: nothing to trace."""

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        same = len(args) == 1 and not kwargs and all(p.dtype == args[0] for p in self.parameters())
        module: torch.nn.Module = self if same else original(self, *args, **kwargs)
        return module

    return to


_SHIMS: list[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = [
    (torch.Tensor, "nonzero", _nonzero),
    (torch, "where", _where),
    (torch.Tensor, "squeeze", _squeeze),
    (torch, "div", _div),
    (torch.nn.Module, "to", _module_to),
    (symbolic_shapes, "_constrain_range_for_size", _constrain),
    (torch.Tensor, "__getitem__", _getitem),
]
