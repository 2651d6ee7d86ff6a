"""Memory where graphs run: device buffers by address, pinned host arrays, copies between them, and OrtValues over them.

`CudaMemory` speaks to the NVIDIA driver (libcuda) through ctypes: it is there wherever a GPU is, whatever CUDA version
onnxruntime was built for, and needs no further package. `HostMemory` is the same for the CPU provider, so that whatever
is built on a device's memory runs, and is tested, without one.
"""

from __future__ import annotations

import ctypes
import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from llmx.runtime.errors import LlmxError, OutOfMemoryError, ProviderError
from llmx.runtime.providers import import_onnxruntime

_DLPACK_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}
_CPU, _CUDA = 1, 2  # DLPack's device types
_RELAXED = 2  # the driver's capture mode that other work of the thread does not disturb

#: ONNX element types of the manifest's dtype names.
_ELEMENT_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """`nbytes` at `address`; freed by the memory that made it."""

    address: int
    nbytes: int


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

    def copy_rows(self, target: int, source: int, width: int, pitch: int, rows: int) -> None:
        """Queue a copy on the device of `rows` pieces of `width` bytes that lie `pitch` bytes apart."""
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

    def copy_rows(self, target: int, source: int, width: int, pitch: int, rows: int) -> None:
        for row in range(rows):
            ctypes.memmove(target + row * pitch, source + row * pitch, width)

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

    def launch(self, captured: Any) -> None:
        captured()

    def free_bytes(self) -> int:
        from llmx.runtime.machine import available_memory

        return available_memory()

    def bind_input(self, binding: Any, name: str, address: int, shape: tuple[int, ...], dtype: str) -> None:
        binding.bind_input(name, "cpu", 0, _ELEMENT_TYPES[dtype], shape, address)

    def bind_output(self, binding: Any, name: str, address: int, shape: tuple[int, ...], dtype: str) -> None:
        binding.bind_output(name, "cpu", 0, _ELEMENT_TYPES[dtype], shape, address)

    def ort_value(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        return _ort_value(address, shape, dtype, _CPU, 0)

    def close(self) -> None:
        self._arrays = []


def check_cuda_device(index: int) -> Any:
    """The NVIDIA driver, started. Raises ProviderError where there is none, or no device `index`."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise ProviderError(
            "There is no NVIDIA driver here (libcuda.so.1 cannot be loaded); use --device cpu, or run on a machine "
            "with a GPU (`llmx doctor` shows what is there)."
        ) from None
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        raise ProviderError(f"The NVIDIA driver does not start (error {status}); use --device cpu, or restart it.")
    if not 0 <= index < count.value:
        many = f"it has cuda:0 to cuda:{count.value - 1}" if count.value > 1 else f"it has {count.value or 'none'}"
        raise ProviderError(
            f"There is no CUDA device {index} on this machine ({many}); choose another, or --device cpu."
        )
    return driver


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
        self._graphs: list[ctypes.c_void_p] = []
        self._buffers: list[int] = []
        self._pinned: list[int] = []

    def _check(self, status: int, what: str) -> None:
        if status:
            raise (OutOfMemoryError if status == 2 else LlmxError)(
                f"The CUDA driver could not {what}: {self._name(status)}"
                + ("; lower max_length or slots, or use a smaller model." if status == 2 else ".")
            )

    def _name(self, status: int) -> str:
        text = ctypes.c_char_p()
        if self._driver.cuGetErrorName(status, ctypes.byref(text)) or not text.value:
            return f"error {status}"
        return text.value.decode()

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

    def copy_rows(self, target: int, source: int, width: int, pitch: int, rows: int) -> None:
        shape = _Copy2D(
            srcMemoryType=2, srcDevice=source, srcPitch=pitch,
            dstMemoryType=2, dstDevice=target, dstPitch=pitch,
            WidthInBytes=width, Height=rows,
        )  # fmt: skip
        self._check(self._driver.cuMemcpy2DAsync_v2(ctypes.byref(shape), self._stream), "copy on the device")

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
            executable, reason = self._captured(run)
            if executable is not None:
                self._graphs.append(executable)
                return executable
        warnings.warn(f"steps run without a CUDA graph, which is slower ({reason})", stacklevel=2)
        return run

    def _captured(self, run: Callable[[], None]) -> tuple[ctypes.c_void_p | None, str]:
        """The graph, or None and why not."""
        self.synchronize()
        error: Exception | None = None
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._check(self._driver.cuStreamBeginCapture_v2(self._stream, _RELAXED), "capture a graph")
            try:
                run()
            except Exception as failed:
                error = failed
            graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
            status = self._driver.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        finally:
            if collecting:
                gc.enable()
        if error is None and not status:
            flags = ctypes.c_ulonglong(0)
            status = self._driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, flags)
        if graph.value:
            self._driver.cuGraphDestroy(graph)
        if error is not None or status:
            return None, " ".join(str(error or self._name(status)).split())[:200]
        return executable, ""

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
        binding.bind_input(name, "cuda", self.index, _ELEMENT_TYPES[dtype], shape, address)

    def bind_output(self, binding: Any, name: str, address: int, shape: tuple[int, ...], dtype: str) -> None:
        binding.bind_output(name, "cuda", self.index, _ELEMENT_TYPES[dtype], shape, address)

    def ort_value(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        return _ort_value(address, shape, dtype, _CUDA, self.index)

    def close(self) -> None:
        """Free every buffer; nothing may use them any more. The stream stays: sessions that are not collected yet know it."""
        if not self.stream:
            return
        self.activate()
        self._driver.cuStreamSynchronize(self._stream)
        for graph in self._graphs:
            self._driver.cuGraphExecDestroy(graph)
        for event in self._events:
            self._driver.cuEventDestroy_v2(event)
        for address in self._buffers:
            self._driver.cuMemFree_v2(ctypes.c_uint64(address))
        for pointer in self._pinned:
            self._driver.cuMemFreeHost(ctypes.c_void_p(pointer))
        self._buffers, self._pinned, self._graphs, self.stream = [], [], [], 0


class _Copy2D(ctypes.Structure):
    """The driver's CUDA_MEMCPY2D."""

    _fields_ = (
        ("srcXInBytes", ctypes.c_size_t), ("srcY", ctypes.c_size_t), ("srcMemoryType", ctypes.c_int),
        ("srcHost", ctypes.c_void_p), ("srcDevice", ctypes.c_uint64), ("srcArray", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t), ("dstY", ctypes.c_size_t), ("dstMemoryType", ctypes.c_int),
        ("dstHost", ctypes.c_void_p), ("dstDevice", ctypes.c_uint64), ("dstArray", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t),
    )  # fmt: skip


class _DLTensor(ctypes.Structure):
    """DLPack's DLManagedTensor, flat (dmlc.github.io/dlpack)."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


#: What describes the memory of each OrtValue: read when the last session that knows it goes, whenever that is.
_DESCRIPTIONS: list[Any] = []


def _ort_value(address: int, shape: tuple[int, ...], dtype: str, kind: int, index: int) -> Any:
    """An OrtValue that does not own its memory, which `SessionOptions.add_initializer` insists on: one made by DLPack."""
    name = dtype.rstrip("0123456789")
    bits = int(dtype[len(name) :] or 8)
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    # The description is ours to free, so its deleter does nothing: a C function that takes no argument and changes none.
    nothing = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p)
    tensor = _DLTensor(address, kind, index, len(shape), _DLPACK_CODES[name], bits, 1, sizes, None, 0, None, nothing)
    _DESCRIPTIONS.append((tensor, sizes))
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = make(ctypes.addressof(tensor), b"dltensor", None)
    return import_onnxruntime().OrtValue.from_dlpack(capsule)
