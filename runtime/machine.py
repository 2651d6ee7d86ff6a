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
    """Bytes that can still be allocated without swapping, within the cgroup's limit."""
    free = int(psutil.virtual_memory().available)
    for limit_file, used_file in (
        (cgroup / "memory.max", cgroup / "memory.current"),
        (cgroup / "memory" / "memory.limit_in_bytes", cgroup / "memory" / "memory.usage_in_bytes"),
    ):
        try:
            free = min(free, max(0, int(limit_file.read_text()) - int(used_file.read_text())))
        except (OSError, ValueError):
            continue
    return free


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
