"""The state of slots on a device: tensors of one shape side by side, so that a slot is copied in one go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from llmx.runtime.device_memory import Buffer, DeviceMemory, Region
from llmx.runtime.dtypes import itemsize, numpy_dtype
from llmx.runtime.manifest import Manifest, StateTensor


class DeviceState:
    """State tensors [slots, heads, length, width] of a package, zeroed: a kernel may load what it masks.

    Tensors of one shape and dtype share a buffer, one after the other.
    """

    def __init__(self, manifest: Manifest, memory: DeviceMemory, slots: int, length: int) -> None:
        """`length`: positions of each slot."""
        self._memory, self._tensors, self.slots, self.length = memory, manifest.state, slots, length
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for index, tensor in enumerate(self._tensors):
            kinds.setdefault((*tensor.shape, tensor.dtype), []).append(index)
        self._groups: list[tuple[Buffer, list[int]]] = []
        self._addresses = [0] * len(self._tensors)
        for members in kinds.values():
            nbytes = self._nbytes(self._tensors[members[0]])
            buffer = memory.allocate(nbytes * len(members))
            memory.zero(buffer)
            self._groups.append((buffer, members))
            for place, index in enumerate(members):
                self._addresses[index] = buffer.address + place * nbytes

    def _sizes(self, tensor: StateTensor, slots: int) -> tuple[int, ...]:
        sizes = {"slots": slots, "max_length": self.length}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape)

    def _nbytes(self, tensor: StateTensor, slots: int | None = None) -> int:
        shape = self._sizes(tensor, self.slots if slots is None else slots)
        return int(np.prod(shape, dtype=np.int64)) * itemsize(tensor.dtype)

    def bind(self, binding: Any, first: int, rows: int) -> None:
        """Bind past and present of slots `first` … `first + rows - 1`."""
        for tensor, address in zip(self._tensors, self._addresses, strict=True):
            at, shape = address + first * self._nbytes(tensor, 1), self._sizes(tensor, rows)
            self._memory.bind_input(binding, tensor.input, at, shape, tensor.dtype)
            self._memory.bind_output(binding, tensor.output, at, shape, tensor.dtype)

    def copy(self, slot: int, source: DeviceState, source_slot: int, start: int, end: int) -> None:
        """Queue a copy of positions `start` … `end - 1` from a slot of `source`, which may have another length."""
        for (target, members), (origin, _) in zip(self._groups, source._groups, strict=True):
            tensor = self._tensors[members[0]]
            width, heads = int(tensor.shape[-1]) * itemsize(tensor.dtype), int(tensor.shape[1])
            regions = []
            for state, buffer, index in ((self, target, slot), (source, origin, source_slot)):
                at = buffer.address + index * state._nbytes(tensor, 1) + start * width
                regions.append(Region(at, state.length * width, state._nbytes(tensor)))
            if end > start:
                self._memory.copy_planes(regions[0], regions[1], (end - start) * width, heads, len(members))

    def read(self, slot: int, start: int, end: int) -> list[np.ndarray]:
        """Positions `start` … `end - 1` of a slot, on the host: [heads, positions, width] of each tensor."""
        arrays = []
        for tensor, head_addresses in self._heads(slot, start):
            array = np.empty((len(head_addresses), end - start, int(tensor.shape[-1])), numpy_dtype(tensor.dtype))
            for head, at in enumerate(head_addresses if end > start else []):
                self._memory.download(array[head].view(np.uint8), at)
            arrays.append(array)
        self._memory.synchronize()
        return arrays

    def write(self, slot: int, start: int, arrays: list[np.ndarray]) -> None:
        """Put what `read` returned at the positions from `start` on."""
        for array, (_, head_addresses) in zip(arrays, self._heads(slot, start), strict=True):
            for head, at in enumerate(head_addresses if array.shape[1] else []):
                self._memory.upload(at, array[head].view(np.uint8))
        self._memory.synchronize()  # the arrays are the caller's

    def _heads(self, slot: int, start: int) -> Iterator[tuple[StateTensor, list[int]]]:
        """Each tensor, and where position `start` of each of the slot's heads lies."""
        for tensor, address in zip(self._tensors, self._addresses, strict=True):
            width, heads = int(tensor.shape[-1]) * itemsize(tensor.dtype), int(tensor.shape[1])
            at = address + slot * self._nbytes(tensor, 1) + start * width
            yield tensor, [at + head * self.length * width for head in range(heads)]
