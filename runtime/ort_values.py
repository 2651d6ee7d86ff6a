"""OrtValues over memory that is someone else's, made by DLPack."""

from __future__ import annotations

import ctypes
from typing import Any

from llmx.runtime.providers import import_onnxruntime

CPU, CUDA = 1, 2  # DLPack's device types
_DLPACK_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}

#: ONNX element types of the manifest's dtype names.
ELEMENT_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16,
}  # fmt: skip


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


def ort_value(address: int, shape: tuple[int, ...], dtype: str, kind: int, index: int) -> Any:
    """An OrtValue that does not own its memory, which `SessionOptions.add_initializer` insists on."""
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
