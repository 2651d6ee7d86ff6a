"""Sessions of a package on a CUDA device, over one copy of its weights."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from llmx.runtime.cuda_memory import CudaMemory
from llmx.runtime.device_backend import DeviceBackend
from llmx.runtime.device_memory import DeviceMemory
from llmx.runtime.device_steps import SPARE_POSITIONS
from llmx.runtime.dtypes import itemsize
from llmx.runtime.errors import PackageError, ProviderError
from llmx.runtime.kv_budget import whole_slots
from llmx.runtime.manifest import Manifest
from llmx.runtime.manifest_check import check_session, why_not_on_device
from llmx.runtime.providers import Device, import_onnxruntime
from llmx.runtime.sessions import check_version, open_session
from llmx.runtime.state import DEFAULT_MAX_LENGTH, plan_state

#: What onnxruntime takes besides weights and state: its libraries' code, cuBLAS workspaces, a prompt's activations.
OVERHEAD = 1 << 30
_HOPPER = 90  # compute capability, 10 times
_PIECE = 64 << 20  # bytes of weights copied at once


def open_on_device(
    folder: Path,
    manifest: Manifest,
    device: Device,
    max_length: int | None,
    slots: int,
    ahead: bool = True,
    bound: int | None = None,
) -> DeviceBackend:
    """A backend on CUDA device `device.index`. `bound`: bytes of state, all slots together.

    Raises ProviderError (no driver, device or provider), PackageError, OutOfMemoryError, RequestError.
    """
    reason = why_not_on_device(manifest)
    if reason is not None:
        raise PackageError(f"{folder} does not run on CUDA: {reason}.")
    check_version(manifest)
    memory = CudaMemory(device.index)
    try:
        logits = (slots + 1) * manifest.model.vocab_size * itemsize(manifest.graphs["decode"].outputs[0].dtype)
        spare = manifest.state_bytes_per_token() * slots * SPARE_POSITIONS
        free = memory.free_bytes() - OVERHEAD - logits - spare
        weights = manifest.files["weights.data"].size if "weights.data" in manifest.files else 0
        if bound is not None:
            longest = min(manifest.model.context_length, DEFAULT_MAX_LENGTH)
            max_length = whole_slots(manifest, bound - spare, slots, longest, max_length)
        plan = plan_state(manifest, max_length, slots, free, weights, "on the GPU")
        with environment(kernel_settings(manifest, memory.capability)):
            sessions = open_device_sessions(folder, manifest, memory, cuda_options(device, memory.stream))
        return DeviceBackend(manifest, sessions, memory, plan, ahead)
    except BaseException:
        memory.close()
        raise


def kernel_settings(manifest: Manifest, capability: int) -> dict[str, str]:
    """What onnxruntime and cuBLAS take from their environment alone, measured on an H200 with onnxruntime 1.31.1.

    onnxruntime prefers XQA for a step's attention. From Hopper on cuDNN's is faster (8 % of a step at 32 rows of 512
    positions), and next in line where no layer has a window. cuBLAS takes 64 MiB of workspace for each session, and uses
    it to split products along K and add the parts up: an 8B step is 2.5 % slower for that, a 1B step as fast.
    """
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    if capability >= _HOPPER and all(tensor.window is None for tensor in manifest.state):
        settings["ORT_ENABLE_XQA"] = "0"
    return settings


@contextlib.contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """While sessions are opened: these variables. What is set already is not overruled."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def cuda_options(device: Device, stream: int) -> list[Any]:
    """onnxruntime's providers for a device, on the backend's own stream."""
    options = {
        "device_id": str(device.index),
        "user_compute_stream": str(stream),
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",  # keeps the memory that captured kernels read; the backend captures them itself
        "use_tf32": "0",
    }
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def open_device_sessions(
    folder: Path, manifest: Manifest, memory: DeviceMemory, providers: list[Any]
) -> dict[str, Any]:
    """One session for each graph; their large initializers are `upload_weights`'. Raises ProviderError, PackageError."""
    ort = import_onnxruntime()
    on_cuda = providers[0] != "CPUExecutionProvider"
    if on_cuda and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN as wheels, where they came that way
    values = upload_weights(folder, manifest, memory)
    sessions = {}
    for name, graph in manifest.graphs.items():
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1  # what stays on the CPU is shape arithmetic
        chosen = providers
        if name == "prefill" and on_cuda:
            chosen = [(providers[0][0], {**providers[0][1], "enable_cuda_graph": "0"}), *providers[1:]]
        for weight, value in values.items():
            options.add_initializer(weight, value)
        try:
            sessions[name] = open_session(folder / graph.file, options, chosen)
        except PackageError as error:
            if not on_cuda or "graph capture" not in str(error):
                raise
            warnings.warn(f"{graph.file} has operators without a CUDA kernel; it runs slower for that", stacklevel=2)
            chosen = [(providers[0][0], {**providers[0][1], "enable_cuda_graph": "0"}), *providers[1:]]
            sessions[name] = open_session(folder / graph.file, options, chosen)
        check_session(sessions[name], graph, folder / graph.file)
        if on_cuda and sessions[name].get_providers()[0] != "CUDAExecutionProvider":
            raise ProviderError(
                "onnxruntime could not load its CUDA provider; it needs CUDA and cuDNN of the versions that it was built "
                'for: pip install "llmx[gpu]" brings them (`llmx doctor` shows what is missing).'
            )
    return sessions


def upload_weights(folder: Path, manifest: Manifest, memory: DeviceMemory) -> dict[str, Any]:
    """`weights.data` on the device, once, and an OrtValue over each of its tensors by name.

    The file goes there as it is, so tensors that share bytes (packed ones) do so there too.
    """
    if not manifest.weights:
        return {}
    size = manifest.files["weights.data"].size
    memory.activate()
    buffer = memory.allocate(size)
    pieces = [memory.host_array((min(_PIECE, size),), np.dtype(np.uint8)) for _ in range(2)]
    with (folder / "weights.data").open("rb", buffering=0) as file:
        done, turn = 0, 0
        while done < size:
            piece = pieces[turn][: min(_PIECE, size - done)]
            memory.wait(turn)
            read = file.readinto(piece.data) or 0
            if not read:
                raise PackageError(
                    f"{folder / 'weights.data'} is shorter than its manifest says; copy or export it again."
                )
            memory.upload(buffer.address + done, piece[:read])
            memory.mark(turn)
            done, turn = done + read, turn ^ 1
    memory.synchronize()
    for piece in pieces:
        memory.unpin(piece)
    return {w.name: memory.ort_value(buffer.address + w.offset, tuple(w.shape), w.dtype) for w in manifest.weights}
