"""What this machine lets the process use: CPUs, memory, and which CPU it is."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = _CGROUP) -> int:
    """Physical CPUs that this process may keep busy: its affinity mask, its cgroup's quota, at least 1.

    Hyper-threads of one core count once, where the machine says which they are.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    logical, physical = psutil.cpu_count(logical=True) or 1, psutil.cpu_count(logical=False) or 1
    cores = max(1, math.ceil(allowed * physical / logical))
    quota = cpu_quota(cgroup)
    return max(1, min(cores, math.floor(quota))) if quota is not None else cores


def cpu_quota(cgroup: Path = _CGROUP) -> float | None:
    """CPUs' worth of time that the cgroup (v2 or v1) grants, or None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 and period_us > 0 else None
    except (OSError, ValueError):
        return None


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes that can still be allocated without swapping, within the cgroup's limit (v2 or v1).

    A cgroup counts the page cache as used, and gives its inactive part back when it needs memory.
    """
    free = int(psutil.virtual_memory().available)
    v1 = cgroup / "memory"
    for limit_file, used_file, stat_file, reclaimable in (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat", "inactive_file"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes", v1 / "memory.stat", "total_inactive_file"),
    ):
        try:
            limit, used = int(limit_file.read_text()), int(used_file.read_text())
        except (OSError, ValueError):
            continue
        free = min(free, max(0, limit - used + _field(stat_file, reclaimable)))
    return free


def _field(file: Path, name: str) -> int:
    """The number on the line `name N` of a cgroup's file; 0 where there is none."""
    try:
        return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [name])
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def cpu_fingerprint() -> str:
    """A short hash of what decides the layout of prepacked weights: the CPU's model and instruction sets."""
    facts = [platform.machine(), platform.system()]
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part"):
                facts.append(line)
            if not line.strip() and len(facts) > 2:
                break
    except OSError:
        facts.append(platform.processor())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
