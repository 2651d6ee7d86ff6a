"""onnxruntime sessions of a package's graphs, with the weights in memory once."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmx.runtime.ahead import Ahead
from llmx.runtime.errors import PackageError
from llmx.runtime.machine import usable_cpus
from llmx.runtime.manifest import Manifest
from llmx.runtime.manifest_check import check_session
from llmx.runtime.mapped_cache import MappedCache
from llmx.runtime.providers import Device, import_onnxruntime
from llmx.runtime.tracing import active


@dataclass(frozen=True)
class SessionSettings:
    """`threads` None: the CPUs the process may use. `spin`: busy-wait between operators (faster, burns idle CPU)."""

    threads: int | None = None
    spin: bool = True
    mapped_cache: bool = True
    cache_dir: Path | None = None


def session_options(settings: SessionSettings) -> Any:
    """Options that every session shares."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads or usable_cpus()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spin else "0")
    # A run's threads stop spinning when it returns: other work of the process gets the CPUs between steps.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_sessions(folder: Path, manifest: Manifest, device: Device, settings: SessionSettings) -> dict[str, Any]:
    """One session for each graph of the manifest.

    Large packages are opened from the mapped cache (llmx.runtime.mapped_cache), so that both graphs read one copy of the
    weights. Raises PackageError.
    """
    check_version(manifest)
    files = {name: folder / graph.file for name, graph in manifest.graphs.items() if name != "candidates"}
    if device.kind == "cpu" and settings.mapped_cache:
        cache = MappedCache(settings.cache_dir)
        cached = cache.get(folder, manifest, lambda: session_options(settings))
        files = cached or files
    trace, options = active(), {name: session_options(settings) for name in files}
    if trace is not None:
        for each in options.values():
            trace.prepare(each)

    def opened(name: str) -> Any:
        session = open_session(files[name], options[name], device.providers)
        check_session(session, manifest.graphs[name], files[name])
        return session

    if device.kind == "cpu" and trace is None:
        # Graphs share nothing while they open, and opening releases the interpreter's lock. (On a device the thread that opens
        # a session gets the device's context; profiles are named by the time at which their session opens.)
        first, *rest = files
        others = {name: Ahead(partial(opened, name)) for name in rest}
        try:
            session = opened(first)
        finally:
            for other in others.values():
                other.join()
        return {first: session, **{name: other.result() for name, other in others.items()}}
    sessions = {name: opened(name) for name in files}
    if trace is not None:
        sessions = {name: trace.watch(name, session) for name, session in sessions.items()}
    return sessions


def open_session(path: Path, options: Any, providers: list[Any]) -> Any:
    """An InferenceSession, its failures in one sentence."""
    ort = import_onnxruntime()
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        reason = " ".join(str(error).split())[:240]
        raise PackageError(f"onnxruntime {ort.__version__} cannot open {path}: {reason}") from None
    return session


def check_version(manifest: Manifest) -> None:
    """Raises PackageError where the installed onnxruntime is older than the package needs."""
    ort = import_onnxruntime()

    def numbers(version: str) -> list[int]:
        parts = []
        for part in version.split(".")[:2]:
            with contextlib.suppress(ValueError):
                parts.append(int(part))
        return parts

    if numbers(ort.__version__) < numbers(manifest.min_onnxruntime):
        raise PackageError(
            f"The package needs onnxruntime {manifest.min_onnxruntime} or newer and {ort.__version__} is installed: "
            'pip install -U "llmx[cpu]" (or "llmx[gpu]").'
        )
