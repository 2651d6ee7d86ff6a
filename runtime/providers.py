"""Which execution provider a package runs on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llmx.runtime.errors import MissingDependencyError, ProviderError, RequestError


@dataclass(frozen=True)
class Device:
    """Where graphs run: "cpu", or "cuda" with the card's index."""

    kind: str
    index: int = 0

    @property
    def providers(self) -> list[Any]:
        """onnxruntime's provider list."""
        if self.kind == "cuda":
            return [("CUDAExecutionProvider", {"device_id": str(self.index)}), "CPUExecutionProvider"]
        return ["CPUExecutionProvider"]


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises MissingDependencyError where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            'onnxruntime is not installed: pip install "llmx[cpu]" (or "llmx[gpu]" for CUDA).'
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):  # both wheels were installed, and one was removed
        raise MissingDependencyError(
            'onnxruntime is damaged: pip install --force-reinstall "llmx[cpu]" (or "llmx[gpu]").'
        )
    return onnxruntime


def resolve_device(device: str, target: str) -> Device:
    """The device for `device` ("auto", "cpu", "cuda", "cuda:1") and a package built for `target`.

    Raises RequestError for another name, ProviderError where the provider is missing.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None:
        raise RequestError(f'device must be "auto", "cpu", "cuda" or "cuda:N", and is {device!r}.')
    has_cuda = "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
    if device == "auto":
        return Device("cuda") if has_cuda and target == "cuda" else Device("cpu")
    if device == "cpu":
        return Device("cpu")
    if not has_cuda:
        raise ProviderError(
            "This onnxruntime has no CUDA provider; install the GPU build: "
            'pip uninstall -y onnxruntime && pip install "llmx[gpu]" (`llmx doctor` shows what is there).'
        )
    return Device("cuda", int(match.group(1) or 0))
