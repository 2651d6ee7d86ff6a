"""Values that follow from sizes and constants alone, known while a model is traced.

A model may ask for a value to choose a branch ("does any token attend to all?"), which a tracer refuses: its tensors have
none. Where no input reaches the tensor (a mask of ones that nobody gave), the value is what the example's sizes make of
it, and is computed beside the trace. That it is the same for other sizes is for the caller to see, by tracing at two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

_VALUE = "_llmx_value"
_LARGEST = 1 << 16  # elements of a value that is kept: more decide no branch
_FACTORIES = frozenset([torch.ones, torch.zeros, torch.full, torch.arange, torch.tensor, torch.eye])
_FILLED = {
    torch.ones_like: 1,
    torch.zeros_like: 0,
    torch.Tensor.new_ones: 1,
    torch.Tensor.new_zeros: 0,
}  # a tensor of another's kind, whatever that one holds
_ASKED = frozenset([torch.Tensor.item, torch.Tensor.__bool__])


class KnownValues(TorchFunctionMode):
    """While it is entered, tensors made of sizes and constants carry their values, and boolean ones answer `item()` and
    `bool()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost: set[int] = set()  # storages of values that something unknown was written into
        self._kept: list[torch.Tensor] = []  # so that no address is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ASKED and self._known(args[0]) and args[0].dtype == torch.bool:  # a number may be used as a size
            value = getattr(args[0], _VALUE)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return func(value)
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        written = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
        if func in _FILLED and isinstance(result, torch.Tensor):
            shape = _hints(tuple(result.shape))
            if None not in shape and math.prod(shape) <= _LARGEST:  # None: a size that depends on values
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    self._keep(result, torch.full(shape, _FILLED[func], dtype=result.dtype))
        elif self._follows(func, args, kwargs):
            self._compute(func, args, kwargs, result)
        elif written and args and self._known(args[0]):
            self._lost.add(getattr(args[0], _VALUE).untyped_storage().data_ptr())
        return result

    def fill(self, tensor: torch.Tensor) -> float | None:
        """The number that all of a tensor is known to be filled with."""
        value = getattr(tensor, _VALUE, None) if self._known(tensor) else None
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            same = value is not None and value.numel() > 0 and bool((value == value.flatten()[0]).all())
            return float(value.flatten()[0]) if value is not None and same else None

    def _follows(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call's result is made of known values alone."""
        tensors = [value for value in _flat((args, kwargs)) if isinstance(value, torch.Tensor)]
        return func in _FACTORIES if not tensors else all(map(self._known, tensors))

    def _known(self, tensor: Any) -> bool:
        value = getattr(tensor, _VALUE, None)
        return value is not None and value.untyped_storage().data_ptr() not in self._lost

    def _compute(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            try:
                value = func(*_hints(args), **_hints(kwargs))
            except Exception:  # what cannot be computed is not known
                value = None
        for whole, part in zip(_flat(result), _flat(value), strict=False):
            if isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor):
                self._keep(whole, part)

    def _keep(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        if value.numel() <= _LARGEST:
            self._kept.append(value)
            setattr(tensor, _VALUE, value)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in _flat(item)]
    return [part for item in value.values() for part in _flat(item)] if isinstance(value, dict) else [value]


def _hints(value: Any) -> Any:
    """`value` with tensors' values in their places, and the example's sizes for symbolic ones."""
    if isinstance(value, torch.Tensor):
        return getattr(value, _VALUE)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    if isinstance(value, (list, tuple)):
        return (
            type(value)(_hints(item) for item in value) if type(value) in (list, tuple) else tuple(map(_hints, value))
        )
    if isinstance(value, dict):
        return {key: _hints(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(_hints(value.start), _hints(value.stop), _hints(value.step))
    return value
