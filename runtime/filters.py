"""From processed logits to candidates: temperature, and the filters that narrow what may be drawn. Pure functions.

Order and semantics are vLLM's for the parameters that it has (temperature, min-p, top-k, top-p), then transformers'
(typical-p, epsilon and eta cut-off, after these). transformers applies min-p after top-p. Top-n-sigma, which neither
has, comes first: it does not depend on the temperature.

Rows are narrowed early: `Candidates` holds token ids and logits of what is still possible, so that a top-k of 50 never
sorts a vocabulary of 128k.

Sources: top-k, Fan et al. 2018 (arXiv:1805.04833); top-p, Holtzman et al. 2019 (arXiv:1904.09751); min-p, Nguyen et
al. 2024 (arXiv:2407.01082); typical-p, Meister et al. 2022 (arXiv:2202.00666); epsilon and eta, Hewitt et al. 2022
(arXiv:2210.15191); top-n-sigma, Tang et al. 2024 (arXiv:2411.07641).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from llmx.runtime.params import SamplingParams

_FIRST_CUT = 512  # candidates that top-p sorts before it pays for sorting them all
_BINS = 2048  # parts of a large row that typical-p looks at before it sorts one of them


@dataclass(frozen=True)
class Candidates:
    """What is still possible: `ids` int64 [k], ascending, and `logits` float32 [k], at least one of them finite."""

    ids: np.ndarray
    logits: np.ndarray

    def take(self, kept: np.ndarray) -> Candidates:
        """Those at the places `kept`, int64 [m], ascending."""
        return Candidates(self.ids[kept], self.logits[kept])


@lru_cache(maxsize=8)
def _all_ids(count: int) -> np.ndarray:
    ids = np.arange(count)
    ids.flags.writeable = False
    return ids


def all_of(row: np.ndarray) -> Candidates:
    """Every token of float32 [vocab] logits."""
    return Candidates(_all_ids(len(row)), row)


def apply_temperature(row: np.ndarray, temperature: float) -> np.ndarray:
    """float32 [k] / `temperature` > 0. transformers: TemperatureLogitsWarper.

    Where the quotient leaves float32 (a temperature close to 0), the maximum is moved to 0 first: same distribution.
    """
    if temperature == 1.0:
        return row
    scale = np.float32(temperature)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scaled = row / scale
        if not np.isfinite(scaled.max()):
            scaled = row - row.max()
            scaled[scaled < 0] /= scale  # 0 / 0 would be NaN where float32 rounds the temperature to 0
    return scaled


def probabilities(logits: np.ndarray) -> np.ndarray:
    """softmax of float32 [k]."""
    weights = np.exp(logits - logits.max())
    weights /= np.float32(weights.sum(dtype=np.float64))
    return weights


def keep_top_n_sigma(c: Candidates, n: float) -> Candidates:
    """Logits at most `n` standard deviations (of the possible tokens' logits) below the largest; all where `n` is 0."""
    if n <= 0.0:
        return c
    possible = c.logits[np.isfinite(c.logits)].astype(np.float64)
    return c.take(np.flatnonzero(c.logits >= possible.max() - n * possible.std()))


def keep_top_k(c: Candidates, k: int) -> Candidates:
    """The k largest and all ties with the k-th; all where `k` <= 0. transformers: TopKLogitsWarper."""
    if k <= 0 or k >= len(c.logits):
        return c
    threshold = np.partition(c.logits, -k)[-k]
    return c.take(np.flatnonzero(c.logits >= threshold))


def keep_top_p(c: Candidates, p: float) -> Candidates:
    """The most likely tokens up to and with the one whose probability brings their sum to `p`; all where `p` >= 1.

    transformers: TopPLogitsWarper, which drops a token where its probability and that of all less likely ones add up to
    at most 1 - p, compared in float32, and always keeps one. Of equal logits it drops any; here the higher ids.
    """
    if p >= 1.0:
        return c
    probs = probabilities(c.logits)
    total = float(probs.sum(dtype=np.float64))
    if len(probs) > 4 * _FIRST_CUT:
        floor = np.partition(c.logits, -_FIRST_CUT)[-_FIRST_CUT]
        head = np.flatnonzero(c.logits >= floor)  # ties included: the rest is less likely than all of these
        kept = _top_p_places(c.logits[head], probs[head], total, p)
        if len(kept) < len(head):
            return c.take(head[kept])
    return c.take(_top_p_places(c.logits, probs, total, p))


def _top_p_places(logits: np.ndarray, probs: np.ndarray, total: float, p: float) -> np.ndarray:
    """Places, ascending, that top-p keeps of `logits` [k], the likeliest tokens of a row whose `probs` sum to `total`.

    Where fewer than k are kept the answer is that for the whole row: the first token dropped has nothing but less
    likely ones below it. `total` is 1 but for rounding, which decides where equal tokens reach p exactly.
    """
    above = np.concatenate(([0.0], np.cumsum(np.sort(probs)[:0:-1], dtype=np.float64)))
    count = max(int(np.count_nonzero((total - above).astype(np.float32) > np.float32(1.0 - p))), 1)
    last = np.partition(logits, -count)[-count]
    equal = np.flatnonzero(logits == last)
    more = np.flatnonzero(logits > last)
    return np.sort(np.concatenate((more, equal[: count - len(more)])))


def keep_min_p(c: Candidates, min_p: float) -> Candidates:
    """Tokens at least `min_p` times as likely as the most likely one. transformers: MinPLogitsWarper."""
    if min_p <= 0.0:
        return c
    weights = np.exp(c.logits - c.logits.max())
    return c.take(np.flatnonzero(weights >= np.float32(min_p)))


def keep_typical(c: Candidates, mass: float) -> Candidates:
    """Tokens whose surprise lies closest to the entropy, until their probability reaches `mass`; all where it is 1.

    transformers: TypicalLogitsWarper, which keeps all ties with the last.
    """
    if mass >= 1.0:
        return c
    c = _possible(c)
    probs = probabilities(c.logits)
    surprise, entropy = _surprise(c.logits, probs)
    distance = np.abs(surprise - np.float32(entropy))
    return c.take(np.flatnonzero(distance <= _reaching(distance, probs, mass)))


def _reaching(distance: np.ndarray, probs: np.ndarray, mass: float) -> np.float32:
    """Of float32 [k] distances the one at which, from the smallest on, the probabilities add up to `mass` (compared in
    float32); the largest where they never do. Only the part of a large row where that happens is sorted.
    """
    before, places = 0.0, np.arange(len(distance))
    largest = distance.max()
    if len(distance) > 4 * _FIRST_CUT and largest > 0:
        bins = np.minimum((distance * (np.float32(_BINS) / largest)).astype(np.intp), _BINS - 1)
        ends = np.cumsum(np.bincount(bins, probs, _BINS))
        reached = np.flatnonzero(ends.astype(np.float32) >= np.float32(mass))
        if not len(reached):
            return np.float32(largest)
        here = int(reached[0])
        before, places = float(ends[here - 1]) if here else 0.0, np.flatnonzero(bins == here)
    order = places[np.argsort(distance[places], kind="stable")]
    sums = (before + np.cumsum(probs[order], dtype=np.float64)).astype(np.float32)
    below = int(np.count_nonzero(sums < np.float32(mass)))
    return np.float32(distance[order[min(below, len(order) - 1)]])


def keep_epsilon(c: Candidates, epsilon: float) -> Candidates:
    """Tokens at least `epsilon` likely, and the most likely one; all where it is 0. transformers: EpsilonLogitsWarper."""
    return _likelier_than(c, probabilities(c.logits), epsilon) if epsilon > 0.0 else c


def keep_eta(c: Candidates, epsilon: float) -> Candidates:
    """As `keep_epsilon` with the smaller of `epsilon` and √epsilon · exp(-entropy). transformers: EtaLogitsWarper."""
    if epsilon <= 0.0:
        return c
    c = _possible(c)
    probs = probabilities(c.logits)
    _, entropy = _surprise(c.logits, probs)
    return _likelier_than(c, probs, min(epsilon, np.sqrt(epsilon) * np.exp(-entropy)))


def _possible(c: Candidates) -> Candidates:
    finite = np.isfinite(c.logits)
    return c if finite.all() else c.take(np.flatnonzero(finite))


def _surprise(logits: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, float]:
    """(-log probability float32 [k], entropy in nats) of finite logits."""
    shifted = logits - logits.max()
    surprise = np.float32(np.log(np.exp(shifted).sum(dtype=np.float64))) - shifted
    return surprise, float((surprise * probs).sum(dtype=np.float64))


def _likelier_than(c: Candidates, probs: np.ndarray, least: float) -> Candidates:
    return c.take(np.flatnonzero((probs >= np.float32(least)) | (c.logits == c.logits.max())))


def filtered(c: Candidates, params: SamplingParams) -> Candidates:
    """The candidates that `params` (resolved, temperature > 0) leave of processed logits, scaled by the temperature."""
    c = Candidates(c.ids, apply_temperature(c.logits, params.temperature or 1.0))
    c = keep_top_n_sigma(c, params.top_n_sigma or 0.0)
    c = keep_min_p(c, params.min_p or 0.0)
    c = keep_top_k(c, params.top_k or 0)
    c = keep_top_p(c, 1.0 if params.top_p is None else params.top_p)
    c = keep_typical(c, 1.0 if params.typical_p is None else params.typical_p)
    c = keep_epsilon(c, params.epsilon_cutoff or 0.0)
    return keep_eta(c, params.eta_cutoff or 0.0)
