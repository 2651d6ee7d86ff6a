"""Bytes that a decode step must read, and how fast this machine copies: what decoding is measured against."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from llmx.runtime.dtypes import itemsize
from llmx.runtime.manifest import Manifest
from llmx.runtime.protobuf import stored_reads

_LOOKUPS = {"Gather", "GatherBlockQuantized", "GroupQueryAttention"}  # read a few rows of their table (rotary factors)


def weight_bytes(folder: Path, manifest: Manifest) -> int:
    """Bytes of weights that one decode step reads: all of the decode graph's but tables that are only looked up in.

    A mixture of experts reads fewer: only the experts that its tokens are sent to.
    """
    graph = (folder / manifest.graphs["decode"].file).read_bytes()
    return sum(size for size, readers in stored_reads(graph).values() if not readers <= _LOOKUPS)


def state_bytes(manifest: Manifest, length: int, source: int = 0) -> int:
    """Bytes of one slot's state that a step reads at `length` positions (and `source` ones of an encoder's output)."""
    total = 0
    for tensor in manifest.state:
        size = itemsize(tensor.dtype)
        for dim in tensor.shape:
            if isinstance(dim, int):
                size *= dim
            elif dim == "max_length":
                size *= min(length, tensor.window or length)
            elif dim == "source_length":
                size *= source
        total += size
    return total


def copy_bandwidth(threads: int, size: int = 256 << 20, rounds: int = 7) -> float:
    """Bytes a second that `threads` threads copy, reads and writes together (STREAM's counting), the best of the rounds.

    Each thread copies a part of its own, `size` bytes in all: far more than the CPU's caches hold.
    """
    parts = [(np.ones(size // threads, np.uint8), np.zeros(size // threads, np.uint8)) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            best = min(best, time.perf_counter() - start)
    return 2.0 * (size // threads) * threads / best
