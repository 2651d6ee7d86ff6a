"""The state of all slots: allocated once, bound as past and present at the same time."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from dataclasses import dataclass

import numpy as np
from llmx.runtime.dtypes import itemsize, numpy_dtype
from llmx.runtime.errors import OutOfMemoryError, RequestError
from llmx.runtime.kv_budget import PAGE, KVBudget, plan_budget
from llmx.runtime.machine import available_memory
from llmx.runtime.manifest import Manifest, StateTensor

DEFAULT_MAX_LENGTH = 4096
_ALIGNMENT = 64  # bytes
_MAP_NORESERVE = 0x4000  # Linux: address space beyond what memory could hold; Python names it from 3.13 on


@dataclass(frozen=True)
class StatePlan:
    """How much state fits: `slots` requests of `max_length` positions, `bytes` in all. With a `budget` they take turns:
    less than that is in use at any time.
    """

    slots: int
    max_length: int
    bytes: int
    budget: KVBudget | None = None


def plan_state(
    manifest: Manifest,
    max_length: int | None = None,
    slots: int = 1,
    free: int | None = None,
    weights: int = 0,
    where: str = "",
    bound: int | None = None,
) -> StatePlan:
    """Choose or check the state's size before anything is allocated.

    The default length is what the model's context and half of the free memory allow, at most 4,096. `weights` bytes are
    still to be loaded and are not free; `where` says whose memory it is. `bound`: bytes that all slots share (`plan_budget`).
    Raises RequestError for lengths past the context, OutOfMemoryError for more than what is free.
    """
    context = manifest.model.context_length
    per_token = manifest.state_bytes_per_token()
    free = available_memory() if free is None else free
    if weights > free:
        advice = ", use a smaller model or dtype" + ("" if where else ", or leave mapped_cache on, which shares them")
        raise OutOfMemoryError(
            f"The weights take {weights / 1e9:.2f} GB and {max(0, free) / 1e9:.2f} GB are free{where and ' ' + where}; "
            f"free some memory{advice}."
        )
    if slots < 1:
        raise RequestError(f"slots must be at least 1, and is {slots}.")
    free -= weights
    budget = None
    if bound is not None and (max_length is None or 2 <= max_length <= context):
        max_length, budget = plan_budget(manifest, bound, slots, free, min(context, DEFAULT_MAX_LENGTH), max_length)
    free -= manifest.state_bytes_per_slot() * slots
    if free < 0:
        raise OutOfMemoryError(f"{slots} slot(s) of recurrent state take more than the free memory; lower slots.")
    if max_length is None:
        fits = free // 2 // max(1, per_token * slots)
        max_length = int(min(context, DEFAULT_MAX_LENGTH, fits))
        if max_length < 2:
            raise OutOfMemoryError(_too_much(per_token, slots, min(context, DEFAULT_MAX_LENGTH), free))
    if not 2 <= max_length <= context:
        raise RequestError(
            f"max_length must lie between 2 and the package's context of {context} positions, and is {max_length}."
        )
    plan = StatePlan(slots, max_length, per_token * slots * max_length, budget)
    if budget is None and plan.bytes > free:
        raise OutOfMemoryError(_too_much(per_token, slots, max_length, free))
    return plan


def _too_much(per_token: int, slots: int, max_length: int, free: int) -> str:
    wanted = per_token * slots * max_length
    shorter, fewer = free // max(1, per_token * slots), free // max(1, per_token * max_length)
    options = [f"max_length {shorter}"] if shorter >= 2 else []
    options += [f"slots {fewer}"] if 1 <= fewer < slots else []
    advice = f"{' or '.join(options)} would fit" if options else "free some memory or use a smaller model"
    return (
        f"{slots} slot(s) of {max_length:,} positions take {wanted / 1e9:.2f} GB ({per_token:,} bytes a position) and "
        f"{free / 1e9:.2f} GB are free; {advice}."
    )


class StatePool:
    """Owns the state buffers: an array [slots, kv_heads, max_length, head_dim] for each state tensor, in one allocation.

    Invariant: `views(i)` and `rows(n)` share memory with the buffers, so that binding them as past and present lets a
    step write its rows in place. A slot is a contiguous range, its outermost axis being the batch axis.

    With a budget the buffers are address space of which as much is resident as has been written and not freed since. A
    head of a slot begins at a page then, its positions being rounded up to whole blocks.
    """

    def __init__(self, manifest: Manifest, plan: StatePlan) -> None:
        self.plan, budget = plan, plan.budget
        self.tensors: list[StateTensor] = manifest.state
        self._buffers: list[np.ndarray] = []
        length = plan.max_length if budget is None else -(-plan.max_length // budget.block) * budget.block
        sizes = {"slots": plan.slots, "max_length": length}
        shapes = [[sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape] for tensor in self.tensors]
        assert all(tensor.layout == "in_place" for tensor in self.tensors)
        places = [0]
        for tensor, shape in zip(self.tensors, shapes, strict=True):
            size, step = math.prod(shape) * itemsize(tensor.dtype), _ALIGNMENT if budget is None else PAGE
            places.append(places[-1] + -(-size // step) * step)
        self._map: mmap.mmap | None = None
        try:
            # One allocation: from 4 MB on, numpy asks for huge pages (Linux), which a step reads faster. Zeroed pages cost
            # no memory until they are written.
            memory = np.zeros(places[-1], np.uint8) if budget is None else self._reserve(places[-1])
        except (MemoryError, OSError):
            raise OutOfMemoryError(
                f"The state of {plan.bytes / 1e9:.2f} GB could not be allocated; lower max_length or slots."
            ) from None
        self._places = places[:-1]
        for place, tensor, shape in zip(places, self.tensors, shapes, strict=False):
            size = math.prod(shape) * itemsize(tensor.dtype)
            self._buffers.append(memory[place : place + size].view(numpy_dtype(tensor.dtype)).reshape(shape))

    def _reserve(self, size: int) -> np.ndarray:
        """Zeroed address space uint8 [size], of which only what is written is resident, in pages as small as they are."""
        if sys.platform != "linux":
            return np.zeros(size, np.uint8)
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(self._map, np.uint8)

    def rows(self, first: int, count: int) -> list[np.ndarray]:
        """Views of slots `first` to `first + count - 1`, in the order of `tensors`."""
        return [buffer[first : first + count] for buffer in self._buffers]

    def free(self, slot: int) -> None:
        """Give a slot's memory back to the system, where it was reserved; the slot reads as zeros then."""
        if self._map is not None:
            for place, buffer in zip(self._places, self._buffers, strict=True):
                size = buffer[0].nbytes
                self._map.madvise(mmap.MADV_DONTNEED, place + slot * size, size)

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Copy positions `start` … `length - 1` of one slot to another."""
        for buffer in self._buffers:
            buffer[target, :, start:length] = buffer[source, :, start:length]

    def read(self, slot: int, start: int, end: int) -> list[np.ndarray]:
        """Copies [kv_heads, end - start, head_dim] of a slot's positions, in the order of `tensors`."""
        return [buffer[slot, :, start:end].copy() for buffer in self._buffers]

    def write(self, slot: int, start: int, state: list[np.ndarray]) -> None:
        """Put what `read` returned at the positions from `start` on."""
        for buffer, values in zip(self._buffers, state, strict=True):
            buffer[slot, :, start : start + values.shape[1]] = values

    def check_integrity(self) -> None:
        """Raises AssertionError where the buffers no longer have the planned sizes."""
        total = sum(buffer.nbytes for buffer in self._buffers)
        assert total == self.plan.bytes or self.plan.budget, f"{total} bytes of state, planned {self.plan.bytes}"
        for tensor, buffer in zip(self.tensors, self._buffers, strict=True):
            assert buffer.flags.c_contiguous, tensor.input
            assert buffer.dtype.itemsize == itemsize(tensor.dtype), tensor.input

    def close(self) -> None:
        self._buffers, self._map = [], None
