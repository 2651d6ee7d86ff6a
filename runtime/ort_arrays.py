"""What every call of onnxruntime on the host needs: OrtValues over arrays, and what its failures mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from llmx.runtime.errors import LlmxError, OutOfMemoryError


def ort_value(ort: Any, array: np.ndarray) -> Any:
    """An OrtValue over `array`'s memory (no copy). The array must outlive it."""
    if array.dtype in (np.float32, np.float16, np.int64, np.int32):
        return ort.OrtValue.ortvalue_from_numpy(array)
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValue as CValue  # bfloat16: numpy does not know it

    return ort.OrtValue(CValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), 16))


def run_error(error: Exception) -> LlmxError:
    """What a failed run of onnxruntime means, in one sentence."""
    reason = " ".join(str(error).split())[:300]
    if "llocat" in reason or "memory" in reason.lower():
        return OutOfMemoryError(f"onnxruntime ran out of memory ({reason}); lower slots, max_length or prefill_chunk.")
    return LlmxError(f"onnxruntime failed to run the graph: {reason}")
