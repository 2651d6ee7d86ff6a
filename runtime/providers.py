"""Which execution provider a package runs on."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from llmx.runtime.errors import MissingDependencyError, ProviderError, RequestError


@dataclass(frozen=True)
class Device:
    """Where graphs run: "cpu", or "cuda" with the number of the device."""

    kind: str
    index: int = 0

    @property
    def providers(self) -> list[Any]:
        """onnxruntime's provider list, for graphs with weights of their own."""
        if self.kind == "cuda":
            return [("CUDAExecutionProvider", {"device_id": str(self.index)}), "CPUExecutionProvider"]
        return ["CPUExecutionProvider"]


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises MissingDependencyError where it is not installed, or does not load."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise MissingDependencyError(_why_not("onnxruntime", error)) from None
    if not hasattr(onnxruntime, "InferenceSession"):  # both wheels were installed, and one was removed
        raise MissingDependencyError(
            'onnxruntime is damaged: pip install --force-reinstall "llmx[cpu]" (or "llmx[gpu]").'
        )
    return onnxruntime


def _why_not(name: str, error: Exception) -> str:
    """One sentence on why the library `name` could not be imported, with the command that helps."""
    if not is_installed(name):
        return f'{name} is not installed: pip install "llmx[cpu]" (or "llmx[gpu]" for CUDA).'
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"{name} is installed but cannot be loaded: {reason}; "
        f'pip install --force-reinstall "llmx[cpu]" (or "llmx[gpu]" for CUDA).'
    )


def is_installed(name: str) -> bool:
    """Whether the module `name` can be found; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def resolve_device(device: str, runs_on_cuda: bool = True) -> Device:
    """The device for `device` ("auto", "cpu", "cuda", "cuda:1"). "auto" is CUDA where onnxruntime has it, a GPU is there
    and the package runs on it.

    Raises RequestError for another name, ProviderError where the provider or the device is missing.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None:
        raise RequestError(f'device must be "auto", "cpu", "cuda" or "cuda:N", and is {device!r}.')
    providers = import_onnxruntime().get_available_providers()
    if device == "cpu" or (device == "auto" and not (runs_on_cuda and "CUDAExecutionProvider" in providers)):
        return Device("cpu")
    if "CUDAExecutionProvider" not in providers:
        raise ProviderError(
            "This onnxruntime has no CUDA provider; install the GPU build: "
            'pip uninstall -y onnxruntime && pip install "llmx[gpu]" (`llmx doctor` shows what is there).'
        )
    from llmx.runtime.cuda_driver import check_cuda_device

    index = int(match.group(1) or 0)
    try:
        check_cuda_device(index)
    except ProviderError:
        if device != "auto":
            raise
        return Device("cpu")
    return Device("cuda", index)
