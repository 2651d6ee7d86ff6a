"""The manifest's dtype names as numpy dtypes. numpy has no bfloat16: ml_dtypes brings it."""

from __future__ import annotations

import numpy as np
from llmx.runtime.errors import PackageError

_NAMES = ("float32", "float16", "int64", "int32", "uint8", "int8", "bool")


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a manifest dtype name. Raises PackageError for an unknown one."""
    if name in _NAMES:
        return np.dtype(name)
    if name == "bfloat16":
        import ml_dtypes  # on demand: only bf16 packages need it

        return np.dtype(ml_dtypes.bfloat16)
    raise PackageError(f"The package has tensors of dtype {name!r}, which this llmx does not know; upgrade llmx.")


def itemsize(name: str) -> int:
    """Bytes of one element. Raises PackageError for an unknown dtype."""
    return 2 if name == "bfloat16" else numpy_dtype(name).itemsize
