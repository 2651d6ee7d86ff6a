"""The NVIDIA driver (libcuda) through ctypes: it is there wherever a GPU is, whatever CUDA version onnxruntime needs."""

from __future__ import annotations

import ctypes
from typing import Any

from llmx.runtime.errors import LlmxError, OutOfMemoryError, ProviderError

_OUT_OF_MEMORY = 2


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


def check(driver: Any, status: int, what: str) -> None:
    """Raises OutOfMemoryError or LlmxError where a call to do `what` returned an error."""
    if status:
        short = status == _OUT_OF_MEMORY
        raise (OutOfMemoryError if short else LlmxError)(
            f"The CUDA driver could not {what}: {error_name(driver, status)}"
            + ("; lower max_length or slots, or use a smaller model." if short else ".")
        )


def error_name(driver: Any, status: int) -> str:
    text = ctypes.c_char_p()
    if driver.cuGetErrorName(status, ctypes.byref(text)) or not text.value:
        return f"error {status}"
    return text.value.decode()


class Copy3D(ctypes.Structure):
    """The driver's CUDA_MEMCPY3D."""

    _fields_ = (
        ("srcXInBytes", ctypes.c_size_t), ("srcY", ctypes.c_size_t), ("srcZ", ctypes.c_size_t),
        ("srcLOD", ctypes.c_size_t), ("srcMemoryType", ctypes.c_int), ("srcHost", ctypes.c_void_p),
        ("srcDevice", ctypes.c_uint64), ("srcArray", ctypes.c_void_p), ("reserved0", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t), ("srcHeight", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t), ("dstY", ctypes.c_size_t), ("dstZ", ctypes.c_size_t),
        ("dstLOD", ctypes.c_size_t), ("dstMemoryType", ctypes.c_int), ("dstHost", ctypes.c_void_p),
        ("dstDevice", ctypes.c_uint64), ("dstArray", ctypes.c_void_p), ("reserved1", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t), ("dstHeight", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t), ("Depth", ctypes.c_size_t),
    )  # fmt: skip
