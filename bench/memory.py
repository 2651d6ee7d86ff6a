"""What this process holds of the machine's memory."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil


def private_bytes() -> int:
    """Bytes that this process alone holds and the system cannot drop (Linux: Private_Dirty; elsewhere psutil's USS).

    Weights mapped from a file are not among them: they are the page cache's.
    """
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))
    except (OSError, ValueError, IndexError):
        return int(psutil.Process().memory_full_info().uss)


def resident_peak() -> int:
    """The most bytes that were resident at once, mapped weights included."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
