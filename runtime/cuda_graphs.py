"""CUDA graphs, captured from a stream through the driver."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

from llmx.runtime.cuda_driver import check, error_name

_RELAXED = 2  # the driver's capture mode that other work of the thread does not disturb


class CudaGraphs:
    """Graphs captured on one stream; owns their executables."""

    def __init__(self, driver: Any, stream: ctypes.c_void_p) -> None:
        self._driver, self._stream = driver, stream
        self._executables: list[ctypes.c_void_p] = []

    def capture(self, run: Callable[[], None]) -> tuple[ctypes.c_void_p | None, str]:
        """A graph of what `run` queues, or None and why not."""
        error: Exception | None = None
        collecting = gc.isenabled()
        gc.disable()
        try:
            check(self._driver, self._driver.cuStreamBeginCapture_v2(self._stream, _RELAXED), "capture a graph")
            try:
                run()
            except Exception as failed:
                error = failed
            graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
            status = self._driver.cuStreamEndCapture(self._stream, ctypes.byref(graph))
        finally:
            if collecting:
                gc.enable()
        if error is None and not status:
            flags = ctypes.c_ulonglong(0)
            status = self._driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, flags)
        if graph.value:
            self._driver.cuGraphDestroy(graph)
        if error is not None or status:
            return None, " ".join(str(error or error_name(self._driver, status)).split())[:200]
        self._executables.append(executable)
        return executable, ""

    def forget(self, executable: ctypes.c_void_p) -> None:
        """Destroy an executable; the stream must be idle."""
        self._executables.remove(executable)
        self._driver.cuGraphExecDestroy(executable)

    def close(self) -> None:
        for executable in self._executables:
            self._driver.cuGraphExecDestroy(executable)
        self._executables = []
