"""How far two sets of outputs lie apart, accumulated over many calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_BLOCK = 64  # positions whose probabilities are held in float64 at once


@dataclass(frozen=True)
class Spot:
    """The first place past the tolerance: position `position` of row `row`, computed in `phase` ("prefill" | "decode" |
    "text"), with the largest difference there and what was allowed.
    """

    row: int
    position: int
    phase: str
    difference: float
    allowed: float
    scale: float  # the largest reference value, at least 1

    @property
    def sentence(self) -> str:
        return (
            f"{self.phase} position {self.position} of row {self.row} differs by {self.difference:.3g} "
            f"(tolerance {self.allowed:.3g})"
        )


class Differences:
    """Accumulates differences of outputs [n, width] against a reference. `tolerance` is a part of the largest reference
    value of a call (or of 1, whichever is more). `logits`: rows are logits, so distributions and best tokens count too.
    """

    def __init__(self, tolerance: float, logits: bool = True) -> None:
        self.tolerance, self.logits = tolerance, logits
        self.positions = 0
        self.first: Spot | None = None
        self.failed = 0
        self._max, self._allowed, self._sum, self._count = 0.0, 0.0, 0.0, 0
        self._kl_sum, self._kl_max, self._agreed = 0.0, 0.0, 0
        self._cosine_sum, self._cosine_min = 0.0, 1.0

    def add(self, got: np.ndarray, want: np.ndarray, row: int, start: int, phase: str) -> None:
        """Compare `got` with `want` [n, width], which are positions `start` … of `row`. Padding columns of `got` are cut."""
        if not len(want):
            return
        got = got.astype(np.float32)[:, : want.shape[1]]
        scale = max(1.0, float(np.abs(want).max()))
        allowed = self.tolerance * scale
        each = np.empty(len(want))
        for at in range(0, len(want), _BLOCK):
            part = slice(at, at + _BLOCK)
            difference = np.abs(got[part] - want[part])
            each[part] = difference.max(axis=1)
            self._sum += float(difference.sum(dtype=np.float64))
            self._distributions(got[part], want[part])
        self._count += want.size
        self.positions += len(want)
        if not each.max() <= self._max:
            self._max, self._allowed = float(each.max()), allowed
        wrong = ~(each <= allowed)  # `not <=` so that NaN is wrong
        self.failed += int(wrong.sum())
        if wrong.any() and self.first is None:
            at = int(np.argmax(wrong))
            self.first = Spot(row, start + at, phase, float(each[at]), allowed, scale)

    def _distributions(self, got: np.ndarray, want: np.ndarray) -> None:
        if self.logits:
            reference, other = log_softmax(want), log_softmax(got)
            chance = np.exp(reference)
            terms = np.where(chance > 0, chance * (reference - other), 0.0)
            kl = np.maximum(terms.sum(axis=1), 0.0)  # rounding may take it below
            self._kl_sum += float(kl.sum())
            self._kl_max = max(self._kl_max, float(kl.max()))
            self._agreed += int((got.argmax(axis=1) == want.argmax(axis=1)).sum())
        else:
            norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
            cosine = (got * want).sum(axis=1) / np.maximum(norms, 1e-12)
            self._cosine_sum += float(cosine.sum())
            self._cosine_min = min(self._cosine_min, float(cosine.min()))

    def summary(self) -> dict[str, Any]:
        """The numbers: differences in the outputs' own unit, KL(reference ‖ other) in nats per position, agreement and
        cosine as parts of 1.
        """
        count = max(1, self.positions)
        facts: dict[str, Any] = {
            "positions": self.positions,
            "positions_past_tolerance": self.failed,
            "max_abs_diff": self._max,
            "mean_abs_diff": self._sum / max(1, self._count),
            "allowed": self._allowed,
        }
        if self.logits:
            facts |= {
                "mean_kl": self._kl_sum / count,
                "max_kl": self._kl_max,
                "argmax_agreement": self._agreed / count,
            }
        else:
            facts |= {"mean_cosine": self._cosine_sum / count, "min_cosine": self._cosine_min}
        return facts


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities of logits [n, vocab]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide
