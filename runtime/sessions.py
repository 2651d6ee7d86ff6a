"""onnxruntime sessions of a package's graphs, with the weights in memory once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
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


#: Graphs that not every process runs: opened when they are first asked for.
_LATE = ("append",)


class Sessions(dict[str, Any]):
    """Sessions by their graph's name; `open_late` opens what is first asked for later, and raises KeyError where there is no such
    graph.
    """

    def __init__(self, opened: dict[str, Any], open_late: Callable[[str], Any]) -> None:
        super().__init__(opened)
        self._open_late, self._lock = open_late, threading.Lock()

    def __missing__(self, name: str) -> Any:
        with self._lock:
            if not dict.__contains__(self, name):
                self[name] = self._open_late(name)
        return dict.__getitem__(self, name)


def open_sessions(folder: Path, manifest: Manifest, device: Device, settings: SessionSettings) -> dict[str, Any]:
    """A session for each graph of the manifest, but for those that are opened late.

    Large packages are opened from the mapped cache (llmx.runtime.mapped_cache), so that both graphs read one copy of the
    weights. Raises PackageError.
    """
    check_version(manifest)
    own = {name: folder / graph.file for name, graph in manifest.graphs.items() if name != "candidates"}
    late = [name for name in _LATE if name in own]
    sources = [folder / "weights.data", *(own[name] for name in late)] if late else []
    identities = [_identity(path) for path in sources]
    files = own
    if device.kind == "cpu" and settings.mapped_cache:
        cache = MappedCache(settings.cache_dir)
        cached = cache.get(folder, manifest, lambda: session_options(settings))
        files = cached or files
    trace = active()

    def options_of(name: str, path: Path) -> Any:
        options = session_options(settings)
        if path != own[name]:  # cached, and optimised already: looking for more takes time and finds nothing
            options.graph_optimization_level = import_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
        watching = active()
        if watching is not None:
            watching.prepare(options)
        return options

    def opened(name: str, path: Path, options: Any) -> Any:
        session = open_session(path, options, device.providers)
        check_session(session, manifest.graphs[name], path)
        return session

    def open_late(name: str) -> Any:
        path, watching = files[name], active()
        # a cached file is found by what it was made of, and may be given up
        if path == own[name] or not path.is_file():
            if [_identity(source) for source in sources] != identities:
                raise PackageError(f"{folder} was replaced or removed while it was open; load it again.")
            path = own[name]
        session = opened(name, path, options_of(name, path))
        return session if watching is None else watching.watch(name, session)

    first, *rest = [(name, path, options_of(name, path)) for name, path in files.items() if name not in late]
    if device.kind == "cpu" and trace is None:
        # Graphs share nothing while they open, and opening releases the interpreter's lock. (On a device the thread that opens
        # a session gets the device's context; profiles are named by the time at which their session opens.)
        others = {each[0]: Ahead(partial(opened, *each)) for each in rest}
        try:
            session = opened(*first)
        finally:
            for other in others.values():
                other.join()
        return Sessions({first[0]: session, **{name: other.result() for name, other in others.items()}}, open_late)
    sessions = {each[0]: opened(*each) for each in (first, *rest)}
    if trace is not None:
        sessions = {name: trace.watch(name, session) for name, session in sessions.items()}
    return Sessions(sessions, open_late)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from another one that takes its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


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
