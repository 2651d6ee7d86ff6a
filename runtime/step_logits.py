"""What a decode step returns: logits that are copied to the host only as far as someone asks for them.

On a GPU a step's logits stay on the device, and the most likely tokens come with the step; on a CPU there is nothing to
copy and the rows are all there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TopLogits:
    """The likeliest tokens of a row: `ids` int64 [k] and their `logits` float32 [k], largest first, lower ids first among
    equals; every other token's logit is at most the last one's. `log_sum` is log(sum(exp((logit - largest) /
    temperature))) over the whole vocabulary.
    """

    ids: np.ndarray
    logits: np.ndarray
    log_sum: float
    temperature: float


@dataclass(frozen=True)
class TopRows:
    """`TopLogits` of all rows: `ids` int64 [n, k], `logits` float32 [n, k], `log_sums` and `temperatures` [n]. A row that no
    temperature was given for means nothing.
    """

    ids: np.ndarray
    logits: np.ndarray
    log_sums: np.ndarray
    temperatures: np.ndarray


class StepLogits(Protocol):
    """The rows of one `Backend.decode` call, valid until the backend's next call."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> np.ndarray:
        """Logits [vocab] of a row. It may be overwritten by the backend's next call."""
        ...

    def rows(self) -> np.ndarray:
        """Logits [n, vocab] of all rows."""
        ...

    def greedy(self, index: int) -> int | None:
        """A row's most likely token, the lowest id among equals, where it is known without the row, and the row is
        finite; None: read the row.
        """
        ...

    def best(self) -> tuple[np.ndarray, np.ndarray] | None:
        """`greedy` of every row, where they are known: tokens int64 [n], and whether each row is finite, bool [n]."""
        ...

    def top(self, index: int) -> TopLogits | None:
        """A row's likeliest tokens at the temperature that the step was given, where they are known; None: read the row."""
        ...

    def tops(self) -> TopRows | None:
        """`top` of every row, where they are known."""
        ...


class HostLogits:
    """Logits [n, vocab] that are on the host anyway."""

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits

    def __len__(self) -> int:
        return len(self._logits)

    def row(self, index: int) -> np.ndarray:
        logits: np.ndarray = self._logits[index]
        return logits

    def rows(self) -> np.ndarray:
        return self._logits

    def greedy(self, index: int) -> int | None:
        row = self._logits[index]
        if row.dtype != np.float32:
            return None
        best = int(row.argmax())  # NaN counts as the largest
        return best if math.isfinite(row[best]) else None

    def best(self) -> tuple[np.ndarray, np.ndarray] | None:
        return None

    def top(self, index: int) -> TopLogits | None:
        return None

    def tops(self) -> TopRows | None:
        return None


class DeviceLogits:
    """Rows whose most likely tokens are on the host, and whose logits are on a device."""

    def __init__(
        self,
        read: Callable[[int, int], np.ndarray],
        best: np.ndarray,
        scores: np.ndarray,
        tops: Callable[[], TopRows] | None = None,
    ) -> None:
        """`best` int64 [n] tokens with the logits `scores`; `read(first, count)` fetches rows; `tops()` lists the likeliest
        of each, largest first, equals in any order.
        """
        self._read, self._best, self._tops = read, best, tops
        self._finite = np.isfinite(scores.astype(np.float32))
        self._rows: TopRows | None = None

    def __len__(self) -> int:
        return len(self._best)

    def row(self, index: int) -> np.ndarray:
        row: np.ndarray = self._read(index, 1)[0]
        return row

    def rows(self) -> np.ndarray:
        return self._read(0, len(self._best))

    def greedy(self, index: int) -> int | None:
        return int(self._best[index]) if self._finite[index] else None

    def best(self) -> tuple[np.ndarray, np.ndarray] | None:
        return self._best, self._finite

    def top(self, index: int) -> TopLogits | None:
        rows = self.tops()
        if rows is None or rows.temperatures[index] <= 0:
            return None
        log_sum, temperature = float(rows.log_sums[index]), float(rows.temperatures[index])
        return TopLogits(rows.ids[index], rows.logits[index], log_sum, temperature)

    def tops(self) -> TopRows | None:
        if self._rows is None and self._tops is not None:
            self._rows = _ordered(self._tops())
        return self._rows


def _ordered(rows: TopRows) -> TopRows:
    """`rows` with lower ids first among equals. Few rows have equals in another order, and only those are sorted."""
    ids, logits = rows.ids, rows.logits
    wrong = ((logits[:, :-1] < logits[:, 1:]) | ((logits[:, :-1] == logits[:, 1:]) & (ids[:, :-1] > ids[:, 1:]))).any(1)
    if not wrong.any():
        return rows
    ids, logits = ids.copy(), logits.copy()
    order = np.lexsort((ids[wrong], -logits[wrong]), axis=-1)
    ids[wrong] = np.take_along_axis(ids[wrong], order, 1)
    logits[wrong] = np.take_along_axis(logits[wrong], order, 1)
    return TopRows(ids, logits, rows.log_sums, rows.temperatures)


class HostPrefill:
    """A backend whose `prefill` returns rows on the host: `prefill_last` is no other call."""

    def prefill(
        self, slot: int, token_ids: np.ndarray, start: int, positions: np.ndarray, prompt_length: int | None = None
    ) -> np.ndarray:
        """`Backend.prefill`."""
        raise NotImplementedError

    def prefill_last(
        self,
        slot: int,
        token_ids: np.ndarray,
        start: int,
        prompt_length: int | None = None,
        temperature: float = -1.0,
    ) -> StepLogits:
        """`Backend.prefill_last`."""
        return HostLogits(self.prefill(slot, token_ids, start, np.array([len(token_ids) - 1]), prompt_length))

    def prefill_each(self, slot: int, token_ids: np.ndarray, start: int, temperature: float = -1.0) -> StepLogits:
        """`Backend.prefill_each`."""
        return HostLogits(self.prefill(slot, token_ids, start, np.arange(len(token_ids)), start + 1))
