"""A CUDA device's memory, through the driver."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from llmx.runtime.cuda_driver import Copy3D, check, check_cuda_device
from llmx.runtime.cuda_graphs import CudaGraphs
from llmx.runtime.device_memory import Buffer, Region
from llmx.runtime.ort_values import CUDA, ELEMENT_TYPES, ort_value


class CudaMemory:
    """A CUDA device's memory, in the primary context that onnxruntime uses too.

    Raises ProviderError where there is no driver, or no device `index`.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._driver = check_cuda_device(index)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._check(self._driver.cuDeviceGet(ctypes.byref(device), index), "open the device")
        self._device = device
        self._check(self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device), "open the device")
        self.activate()
        stream = ctypes.c_void_p()
        self._check(self._driver.cuStreamCreate(ctypes.byref(stream), 1), "make a stream")  # 1: non-blocking
        self.stream = int(stream.value or 0)
        self._stream = stream
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self._events:
            self._check(self._driver.cuEventCreate(ctypes.byref(event), 2), "make an event")  # 2: no timing
        self._graphs = CudaGraphs(self._driver, self._stream)
        self._buffers: list[int] = []
        self._pinned: list[int] = []

    def _check(self, status: int, what: str) -> None:
        check(self._driver, status, what)

    @property
    def capability(self) -> int:
        """The GPU's compute capability, 10 times (90: Hopper)."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        for value, attribute in ((major, 75), (minor, 76)):
            status = self._driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, self._device)
            self._check(status, "tell what it is")
        return 10 * major.value + minor.value

    def activate(self) -> None:
        self._check(self._driver.cuCtxSetCurrent(self._context), "use the device")

    def allocate(self, nbytes: int) -> Buffer:
        pointer = ctypes.c_uint64()
        status = self._driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(1, nbytes)))
        self._check(status, f"allocate {nbytes / 1e9:.2f} GB with {self.free_bytes() / 1e9:.2f} GB free")
        self._buffers.append(pointer.value)
        return Buffer(pointer.value, nbytes)

    def host_array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nbytes = max(1, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        pointer = ctypes.c_void_p()
        self._check(self._driver.cuMemHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(nbytes), 0), "pin host memory")
        assert pointer.value is not None
        self._pinned.append(pointer.value)
        raw = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint8)), (nbytes,))
        array = raw[: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize].view(dtype).reshape(shape)
        array.view(np.uint8 if array.ndim else dtype)[...] = 0
        return array

    def unpin(self, array: np.ndarray) -> None:
        self._pinned.remove(array.ctypes.data)
        self._check(self._driver.cuMemFreeHost(ctypes.c_void_p(array.ctypes.data)), "free host memory")

    def upload(self, address: int, array: np.ndarray) -> None:
        status = self._driver.cuMemcpyHtoDAsync_v2(
            ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), self._stream
        )
        self._check(status, "copy to the device")

    def download(self, array: np.ndarray, address: int) -> None:
        status = self._driver.cuMemcpyDtoHAsync_v2(
            ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes), self._stream
        )
        self._check(status, "copy from the device")

    def copy_planes(self, target: Region, source: Region, width: int, rows: int, planes: int) -> None:
        shape = Copy3D(
            srcMemoryType=2, srcDevice=source.address, srcPitch=source.pitch, srcHeight=source.plane // source.pitch,
            dstMemoryType=2, dstDevice=target.address, dstPitch=target.pitch, dstHeight=target.plane // target.pitch,
            WidthInBytes=width, Height=rows, Depth=planes,
        )  # fmt: skip
        self._check(self._driver.cuMemcpy3DAsync_v2(ctypes.byref(shape), self._stream), "copy on the device")

    def zero(self, buffer: Buffer) -> None:
        status = self._driver.cuMemsetD8Async(
            ctypes.c_uint64(buffer.address), ctypes.c_ubyte(0), ctypes.c_size_t(buffer.nbytes), self._stream
        )
        self._check(status, "clear memory")

    def free(self, buffer: Buffer) -> None:
        self.synchronize()
        self._buffers.remove(buffer.address)
        self._check(self._driver.cuMemFree_v2(ctypes.c_uint64(buffer.address)), "free memory")

    def synchronize(self) -> None:
        self._check(self._driver.cuStreamSynchronize(self._stream), "finish its work")

    def mark(self, index: int) -> int:
        self._check(self._driver.cuEventRecord(self._events[index], self._stream), "record an event")
        return index

    def wait(self, index: int) -> None:
        self._check(self._driver.cuEventSynchronize(self._events[index]), "finish its work")

    def capture(self, run: Callable[[], None]) -> Any:
        """A CUDA graph of the work; `run` itself, where it cannot be captured.

        Work of another thread, or a session that is collected meanwhile, may spoil a capture: it is tried three times.
        """
        reason = ""
        for _ in range(3):
            self.synchronize()
            executable, reason = self._graphs.capture(run)
            if executable is not None:
                return executable
        warnings.warn(f"steps run without a CUDA graph, which is slower ({reason})", stacklevel=2)
        return run

    def forget(self, captured: Any) -> None:
        if isinstance(captured, ctypes.c_void_p):
            self.synchronize()
            self._graphs.forget(captured)

    def launch(self, captured: Any) -> None:
        if isinstance(captured, ctypes.c_void_p):
            self._check(self._driver.cuGraphLaunch(captured, self._stream), "run a graph")
        else:
            captured()

    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._check(self._driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "tell its memory")
        return int(free.value)

    def bind_input(self, binding: Any, name: str, address: int, shape: tuple[int, ...], dtype: str) -> None:
        binding.bind_input(name, "cuda", self.index, ELEMENT_TYPES[dtype], shape, address)

    def bind_output(self, binding: Any, name: str, address: int, shape: tuple[int, ...], dtype: str) -> None:
        binding.bind_output(name, "cuda", self.index, ELEMENT_TYPES[dtype], shape, address)

    def ort_value(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        return ort_value(address, shape, dtype, CUDA, self.index)

    def close(self) -> None:
        """Free every buffer; nothing may use them any more. The stream stays: sessions that are not collected yet know it."""
        if not self.stream:
            return
        self.activate()
        self._driver.cuStreamSynchronize(self._stream)
        self._graphs.close()
        for event in self._events:
            self._driver.cuEventDestroy_v2(event)
        for address in self._buffers:
            self._driver.cuMemFree_v2(ctypes.c_uint64(address))
        for pointer in self._pinned:
            self._driver.cuMemFreeHost(ctypes.c_void_p(pointer))
        self._buffers, self._pinned, self.stream = [], [], 0
