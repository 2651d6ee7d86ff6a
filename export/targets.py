"""Targets: what a package is built for, one row of data each."""

from __future__ import annotations

from dataclasses import dataclass

from llmx.runtime.manifest import Manifest


@dataclass(frozen=True)
class Target:
    """`query_seqlens`: whether the provider's GroupQueryAttention takes that input. `default_dtype` None: the checkpoint's.
    `accuracy_level`: of products with quantized weights (MatMulNBits; 4 rounds activations to int8, 0 leaves them).
    `on_device`: graphs run on a device with memory of its own, where a step feeds the next one.
    """

    name: str
    provider: str
    query_seqlens: bool
    default_dtype: str | None
    min_onnxruntime: str
    on_device: bool
    accuracy_level: int = 0


TARGETS = {
    "cpu": Target("cpu", "CPUExecutionProvider", True, "float32", "1.32", on_device=False, accuracy_level=4),
    # onnxruntime-gpu is one release behind: no query_seqlens before 1.32
    "cuda": Target("cuda", "CUDAExecutionProvider", False, None, "1.31", on_device=True),
}


def cannot_verify(manifest: Manifest) -> str | None:
    """Why this machine cannot run the package beside PyTorch, or None where it can (a CUDA graph runs on the CPU too)."""
    from llmx.runtime.machine import available_memory

    if manifest.dtype == "bfloat16":
        return "the CPU provider has no bfloat16 kernels; an fp32 or fp16 export of the checkpoint can be compared"
    weights = manifest.files["weights.data"].size
    needed = 4 * manifest.model.parameters + 2 * weights
    free = available_memory()
    if needed > free:
        return f"it would take about {needed / 1e9:.0f} GB beside PyTorch and {free / 1e9:.0f} GB are free"
    return None
