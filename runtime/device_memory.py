"""Memory where graphs run: device buffers by address, pinned host arrays, copies between them, and OrtValues over them.

`llmx.runtime.cuda_memory.CudaMemory` is a GPU's. `HostMemory` is the same for the CPU provider, so that whatever is built
on a device's memory runs, and is tested, without one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from llmx.runtime.errors import OutOfMemoryError
from llmx.runtime.ort_values import CPU, ELEMENT_TYPES, ort_value


@dataclass(frozen=True)
class Buffer:
    """`nbytes` at `address`; freed by the memory that made it."""

    address: int
    nbytes: int


@dataclass(frozen=True)
class Region:
    """Rows `pitch` bytes apart, in planes `plane` bytes apart (a multiple of `pitch`), from `address` on."""

    address: int
    pitch: int
    plane: int

    def row(self, plane: int, row: int) -> int:
        return self.address + plane * self.plane + row * self.pitch


class DeviceMemory(Protocol):
    """Owns every buffer that it hands out. Copies are queued in order with the graphs' work; `synchronize` waits."""

    stream: int  # the driver's handle of the queue, 0 where there is none

    def activate(self) -> None:
        """Make the device current for the calling thread. Before anything else, in each thread."""
        ...

    def allocate(self, nbytes: int) -> Buffer:
        """Uninitialised memory on the device. Raises OutOfMemoryError."""
        ...

    def host_array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A zeroed host array that the device copies to and from without a detour (pinned)."""
        ...

    def unpin(self, array: np.ndarray) -> None:
        """Give a whole `host_array` back; nothing may use it any more."""
        ...

    def upload(self, address: int, array: np.ndarray) -> None:
        """Queue a copy of a C-contiguous host array, which must stay as it is until `synchronize`."""
        ...

    def download(self, array: np.ndarray, address: int) -> None:
        """Queue a copy to a C-contiguous host array, to be read after `synchronize`."""
        ...

    def copy_planes(self, target: Region, source: Region, width: int, rows: int, planes: int) -> None:
        """Queue a copy on the device: of each of `planes` planes the first `width` bytes of each of `rows` rows."""
        ...

    def zero(self, buffer: Buffer) -> None:
        """Queue the filling of a buffer with zero bytes."""
        ...

    def free(self, buffer: Buffer) -> None:
        """Give a buffer back, once the queue has run dry."""
        ...

    def synchronize(self) -> None: ...

    def mark(self, index: int) -> int:
        """Put a mark (of two, 0 and 1) into the queue; `wait` returns when the queue has come to it."""
        ...

    def wait(self, index: int) -> None: ...

    def capture(self, run: Callable[[], None]) -> Any:
        """What `run` queues, to be queued again by `launch` without running it. The addresses it uses must stay."""
        ...

    def launch(self, captured: Any) -> None: ...

    def forget(self, captured: Any) -> None:
        """Give back what `capture` returned, once the queue has run dry."""
        ...

    def free_bytes(self) -> int: ...

    def bind_input(self, binding: Any, name: str, address: int, shape: tuple[int, ...], dtype: str) -> None:
        """Bind memory on the device, which must outlive the binding. `dtype` is a manifest dtype name."""
        ...

    def bind_output(self, binding: Any, name: str, address: int, shape: tuple[int, ...], dtype: str) -> None: ...

    def ort_value(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        """An OrtValue over memory on the device, which must outlive it. `dtype` is a manifest dtype name."""
        ...

    def close(self) -> None: ...


class HostMemory:
    """The CPU's memory as if it were a device's."""

    stream = 0

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def activate(self) -> None: ...

    def allocate(self, nbytes: int) -> Buffer:
        try:
            array = np.zeros(max(1, nbytes) + 64, np.uint8)
        except MemoryError:
            raise OutOfMemoryError(
                f"{nbytes / 1e9:.2f} GB could not be allocated; lower max_length or slots."
            ) from None
        self._arrays.append(array)
        return Buffer(-(-array.ctypes.data // 64) * 64, nbytes)

    def host_array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.zeros(shape, dtype)

    def unpin(self, array: np.ndarray) -> None: ...

    def upload(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, address: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy_planes(self, target: Region, source: Region, width: int, rows: int, planes: int) -> None:
        for plane in range(planes):
            for row in range(rows):
                ctypes.memmove(target.row(plane, row), source.row(plane, row), width)

    def zero(self, buffer: Buffer) -> None:
        ctypes.memset(buffer.address, 0, buffer.nbytes)

    def free(self, buffer: Buffer) -> None:
        self._arrays = [a for a in self._arrays if not 0 <= buffer.address - a.ctypes.data <= 64]

    def synchronize(self) -> None: ...

    def mark(self, index: int) -> int:
        return index

    def wait(self, index: int) -> None: ...

    def capture(self, run: Callable[[], None]) -> Any:
        return run

    def forget(self, captured: Any) -> None: ...

    def launch(self, captured: Any) -> None:
        captured()

    def free_bytes(self) -> int:
        from llmx.runtime.machine import available_memory

        return available_memory()

    def bind_input(self, binding: Any, name: str, address: int, shape: tuple[int, ...], dtype: str) -> None:
        binding.bind_input(name, "cpu", 0, ELEMENT_TYPES[dtype], shape, address)

    def bind_output(self, binding: Any, name: str, address: int, shape: tuple[int, ...], dtype: str) -> None:
        binding.bind_output(name, "cpu", 0, ELEMENT_TYPES[dtype], shape, address)

    def ort_value(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        return ort_value(address, shape, dtype, CPU, 0)

    def close(self) -> None:
        self._arrays = []
