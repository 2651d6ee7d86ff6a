"""`candidates.choose_from_step` for the rows of a batch at once: a few operations on [rows, k] instead of many on each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from llmx.runtime.candidates import draw_from_rest, keeps_all
from llmx.runtime.params import SamplingParams
from llmx.runtime.sampling import Choice
from llmx.runtime.step_logits import StepLogits, TopRows

#: A row's next token; what finds it, where its random number is drawn and the whole row must be read; None: not decided.
Chosen = int | Callable[[], Choice] | None


class Rows:
    """Rows of a batch with what is wanted of each; made once for as many steps as they stay the same.

    `rows` are their places in the step, `asks` what the step was told of them (`candidates.asked`); the other lists have
    an entry for each of them.
    """

    def __init__(
        self,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        generators: Sequence[np.random.Generator],
        asks: Sequence[float],
    ) -> None:
        self._count = len(rows)
        self._rows = np.array(rows, np.int64)
        asked = np.array(asks, np.float32)
        self._greedy = np.flatnonzero(asked == 0)
        self._generators = generators
        unfiltered = np.array([keeps_all(p) for p in params], bool)
        self._filtering = _Filters(np.flatnonzero((asked > 0) & ~unfiltered), params)
        self._free = np.flatnonzero((asked > 0) & unfiltered)

    def choose(self, logits: StepLogits) -> list[Chosen]:
        """The next tokens of greedy rows, and of those whose likeliest tokens are known. Nothing is drawn for a row that is
        left undecided: one that is needed whole, one that is not finite, one whose filters may leave more than its top.
        """
        chosen = self._choose_greedy(logits)
        tops = logits.tops() if len(self._filtering.places) + len(self._free) > 1 else None
        if tops is not None:
            finite = np.isfinite(tops.logits[:, 0]) & np.isfinite(tops.log_sums)
            if len(self._filtering.places):
                self._draw_filtered(tops, finite, chosen)
            if len(self._free):
                self._draw_free(logits, tops, finite, chosen)
        return chosen

    def _choose_greedy(self, logits: StepLogits) -> list[Chosen]:
        best = logits.best() if len(self._greedy) else None
        if best is not None and len(self._greedy) == self._count and best[1][self._rows].all():
            tokens: list[Chosen] = best[0][self._rows].tolist()
            return tokens
        chosen: list[Chosen] = [None] * self._count
        for place in self._greedy.tolist():
            chosen[place] = logits.greedy(int(self._rows[place]))
        return chosen

    def _targets(self, places: list[int], totals: np.ndarray) -> np.ndarray:
        """One number of each row's own stream, times its total."""
        targets: np.ndarray = np.array([self._generators[place].random() for place in places]) * totals
        return targets

    def _draw_filtered(self, tops: TopRows, finite: np.ndarray, chosen: list[Chosen]) -> None:
        rows = self._rows[self._filtering.places]
        scaled, weights = _scaled(tops, rows)
        counts = self._filtering.counts(scaled, weights, tops.log_sums[rows])
        good = (counts <= np.count_nonzero(scaled > scaled[:, -1:], axis=1)) & finite[rows]
        if not good.all():
            rows, weights, counts = rows[good], weights[good], counts[good]
        if not len(rows):
            return
        width = int(counts.max())
        weights = np.where(np.arange(width) < counts[:, None], weights[:, :width], np.float32(0))
        order = np.argsort(tops.ids[rows, :width], axis=1)  # drawn in the order of ids, as from a whole row
        sums = np.cumsum(np.take_along_axis(weights, order, 1), axis=1, dtype=np.float64)
        places = self._filtering.places[good].tolist()
        targets = self._targets(places, sums[:, -1])
        found = np.minimum(np.count_nonzero(sums <= targets[:, None], axis=1), width - 1)
        tokens = tops.ids[rows, np.take_along_axis(order, found[:, None], 1)[:, 0]].tolist()
        for place, token in zip(places, tokens, strict=True):
            chosen[place] = token

    def _draw_free(self, logits: StepLogits, tops: TopRows, finite: np.ndarray, chosen: list[Chosen]) -> None:
        """As `candidates.draw_from_all` for each row."""
        free = self._free[finite[self._rows[self._free]]]
        rows, places = self._rows[free], free.tolist()
        scaled, _ = _scaled(tops, rows)
        sums = np.cumsum(np.exp(scaled, dtype=np.float64), axis=1)
        targets = self._targets(places, np.exp(tops.log_sums[rows], dtype=np.float64))
        found = np.count_nonzero(sums <= targets[:, None], axis=1)
        outside = found == sums.shape[1]
        tokens = tops.ids[rows, np.where(outside, 0, found)].tolist()
        for number, place in enumerate(places):
            chosen[place] = tokens[number]
        for number in np.flatnonzero(outside).tolist():
            chosen[places[number]] = partial(_draw_outside, logits, int(rows[number]), float(targets[number]))


def _draw_outside(logits: StepLogits, row: int, target: float) -> Choice:
    top = logits.top(row)
    assert top is not None
    return Choice(draw_from_rest(top, logits.row(row), target))


def _scaled(tops: TopRows, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, k]: logits over temperature, the largest at 0, and their exponentials. Rows may be rubbish."""
    values = tops.logits[rows]
    with np.errstate(invalid="ignore"):
        scaled = (values - values[:, :1]) / tops.temperatures[rows, None].astype(np.float32)
    return scaled, np.exp(scaled)


class _Filters:
    """min-p, top-k and top-p of some rows; `places`: which of the batch's they are."""

    def __init__(self, places: np.ndarray, params: Sequence[SamplingParams]) -> None:
        self.places = places
        some = [params[place] for place in places.tolist()]
        self._min_p = np.array([p.min_p or 0.0 for p in some], np.float32)
        self._top_k = np.array([max(p.top_k or 0, 0) for p in some], np.int64)
        self._top_p = np.array([1.0 if p.top_p is None else p.top_p for p in some])
        self._narrow = (self._min_p > 0) | (self._top_k > 0)
        self._any_min_p, self._any_top_k = bool(self._min_p.any()), bool(self._top_k.any())
        self._any_top_p = bool((self._top_p < 1.0).any())

    def counts(self, scaled: np.ndarray, weights: np.ndarray, log_sums: np.ndarray) -> np.ndarray:
        """How many of float32 [n, k] scaled logits each row's filters leave, k where it may be more: as
        `candidates.narrowed` for each row. `weights` are their exponentials, `log_sums` [n] those of whole rows.
        """
        size = scaled.shape[1]
        counts = np.full(len(scaled), size)
        if self._any_min_p:
            counts = np.where(self._min_p > 0, np.count_nonzero(weights >= self._min_p[:, None], axis=1), size)
        if self._any_top_k:
            edge = scaled[np.arange(len(scaled)), np.clip(self._top_k - 1, 0, size - 1)]
            inside = np.count_nonzero(scaled >= edge[:, None], axis=1)
            counts = np.where((self._top_k > 0) & (self._top_k <= counts), inside, counts)
        unsure = self._narrow & (counts > np.count_nonzero(scaled > scaled[:, -1:], axis=1))
        if self._any_top_p:
            counts = self._nucleus(scaled, weights, counts, log_sums)
        return np.where(unsure, size, counts)

    def _nucleus(self, scaled: np.ndarray, weights: np.ndarray, counts: np.ndarray, log_sums: np.ndarray) -> np.ndarray:
        inside = np.arange(scaled.shape[1]) < counts[:, None]
        with np.errstate(invalid="ignore"):
            own = np.log(np.sum(np.where(inside, weights, 0), axis=1, dtype=np.float64))
            sums = np.where(self._narrow, own, log_sums)
            probs = np.where(inside, np.exp(scaled.astype(np.float64) - sums[:, None]), 0.0)
        above = np.cumsum(probs, axis=1) - probs
        wanted = ((1.0 - above).astype(np.float32) > (1.0 - self._top_p).astype(np.float32)[:, None]) & inside
        kept: np.ndarray = np.where(self._top_p < 1.0, np.maximum(np.count_nonzero(wanted, axis=1), 1), counts)
        return kept
