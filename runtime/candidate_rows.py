"""`candidates.choose_from_step` for the rows of a batch at once: a few operations on [rows, k] instead of many on each row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llmx.runtime.params import SamplingParams
from llmx.runtime.sampling import Choice
from llmx.runtime.step_logits import StepLogits, TopRows

Wanted = tuple[int, SamplingParams, np.random.Generator, float]  # row, parameters, generator, what was asked


def choose_rows(logits: StepLogits, wanted: Sequence[Wanted]) -> dict[int, Choice]:
    """The next tokens of greedy rows, and of those whose filters leave nothing outside their top. The others are left to
    `choose_from_step`, nothing drawn for them: unfiltered rows, rows that are needed whole, bad rows.
    """
    greedy = {row: Choice(token) for row, *_, ask in wanted if ask == 0 and (token := logits.greedy(row)) is not None}
    filtering = [w for w in wanted if w[3] > 0 and _filters(w[1])]
    tops = logits.tops() if len(filtering) > 1 else None
    if tops is None:
        return greedy
    rows = np.array([row for row, *_ in filtering])
    scaled, counts = _kept(tops, rows, [params for _, params, *_ in filtering])
    sure = np.count_nonzero(scaled > scaled[:, -1:], axis=1)
    good = (counts <= sure) & np.isfinite(tops.logits[rows, 0]) & np.isfinite(tops.log_sums[rows])
    if not good.any():
        return greedy
    chosen, rows, scaled, counts = (
        [w for w, g in zip(filtering, good, strict=True) if g],
        rows[good],
        scaled[good],
        counts[good],
    )
    weights = np.exp(scaled)
    weights[np.arange(weights.shape[1]) >= counts[:, None]] = 0.0
    order = np.argsort(tops.ids[rows], axis=1)  # drawn in the order of ids, as from a whole row
    sums = np.cumsum(np.take_along_axis(weights, order, 1), axis=1, dtype=np.float64)
    targets = np.array([generator.random() for _, _, generator, _ in chosen]) * sums[:, -1]
    places = np.minimum(np.count_nonzero(sums <= targets[:, None], axis=1), sums.shape[1] - 1)
    tokens = tops.ids[rows, np.take_along_axis(order, places[:, None], 1)[:, 0]].tolist()
    return greedy | {row: Choice(token) for (row, *_), token in zip(chosen, tokens, strict=True)}


def _filters(params: SamplingParams) -> bool:
    return bool((params.top_k or 0) > 0 or params.min_p or (1.0 if params.top_p is None else params.top_p) < 1.0)


def _kept(tops: TopRows, rows: np.ndarray, params: Sequence[SamplingParams]) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, k] scaled logits, the largest at 0, and how many of them the filters leave, k where it may be more: as
    `candidates.narrowed` for each row.
    """
    values = tops.logits[rows]
    with np.errstate(invalid="ignore"):
        scaled = (values - values[:, :1]) / tops.temperatures[rows, None].astype(np.float32)
    places = np.arange(scaled.shape[1])
    size = scaled.shape[1]
    min_p = np.array([p.min_p or 0.0 for p in params], np.float32)
    top_k = np.array([max(p.top_k or 0, 0) for p in params])
    top_p = np.array([1.0 if p.top_p is None else p.top_p for p in params])
    weights = np.exp(scaled)
    counts = np.where(min_p > 0, np.count_nonzero(weights >= min_p[:, None], axis=1), size)
    limited = (top_k > 0) & (top_k <= counts)
    edge = scaled[np.arange(len(rows)), np.clip(top_k - 1, 0, size - 1)]
    counts = np.where(limited, np.count_nonzero(scaled >= edge[:, None], axis=1), counts)
    narrow = (min_p > 0) | (top_k > 0)
    unsure = narrow & (counts > np.count_nonzero(scaled > scaled[:, -1:], axis=1))
    inside = places < counts[:, None]
    own = np.log(np.sum(np.where(inside, weights, 0), axis=1, dtype=np.float64))
    log_sums = np.where(narrow, own, tops.log_sums[rows])
    probs = np.where(inside, np.exp(scaled.astype(np.float64) - log_sums[:, None]), 0.0)
    above = np.cumsum(probs, axis=1) - probs
    wanted = ((1.0 - above).astype(np.float32) > (1.0 - top_p).astype(np.float32)[:, None]) & inside
    counts = np.where(top_p < 1.0, np.maximum(np.count_nonzero(wanted, axis=1), 1), counts)
    return scaled, np.where(unsure, size, counts)
