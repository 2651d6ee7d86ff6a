"""Numbers of many runs as a few: percentiles, medians with their range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


def percentiles(values: Sequence[float], which: Sequence[int] = PERCENTILES) -> dict[str, float]:
    """`{"mean": …, "p50": …, …}` (linear interpolation), or {} where there are none."""
    if not values:
        return {}
    found = np.percentile(values, which)
    return {"mean": float(np.mean(values))} | {f"p{p}": float(v) for p, v in zip(which, found, strict=True)}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and the values themselves, or {} where there are none."""
    if not values:
        return {}
    return {
        "median": float(np.median(values)),
        "min": float(min(values)),
        "max": float(max(values)),
        "values": [float(value) for value in values],
    }
