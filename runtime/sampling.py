"""From logits to tokens: pure functions of one row, and a sampler over a batch's rows.

Semantics and order are those of transformers' warpers (temperature, top-k, top-p, min-p), which vLLM shares. Each row
is computed alone and draws from its own generator, so a request gets the same tokens whatever shares its batch.

Rows are narrowed to candidates early: `Candidates` holds token ids and logits of what is still possible, so that a
top-k of 50 never sorts a vocabulary of 128k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmx.runtime.errors import LlmxError
from llmx.runtime.params import SamplingParams

_FIRST_CUT = 256  # candidates looked at before a full sort is paid for


@dataclass(frozen=True)
class Candidates:
    """What is still possible: `ids` int64 [k], ascending, and `logits` float32 [k]."""

    ids: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Choice:
    """A row's token and, where asked for, log-probabilities under the model's own distribution (before any filter)."""

    token: int
    logprob: float | None = None
    rank: int | None = None
    top: list[tuple[int, float]] | None = None


def make_generator(seed: int | None) -> np.random.Generator:
    """A request's own random stream; unpredictable where `seed` is None."""
    return np.random.Generator(np.random.Philox(seed))


def apply_temperature(row: np.ndarray, temperature: float) -> np.ndarray:
    """float32 [vocab] / temperature. transformers: TemperatureLogitsWarper."""
    return row if temperature == 1.0 else row / np.float32(temperature)


def keep_top_k(c: Candidates, k: int) -> Candidates:
    """The k largest and all ties with the k-th. transformers: TopKLogitsWarper."""
    if k <= 0 or k >= len(c.logits):
        return c
    threshold = np.partition(c.logits, -k)[-k]
    kept = np.flatnonzero(c.logits >= threshold)
    return Candidates(c.ids[kept], c.logits[kept])


def keep_top_p(c: Candidates, p: float) -> Candidates:
    """The most likely tokens up to and with the one that makes their probability reach p. transformers: TopPLogitsWarper.

    That drops ascending-sorted tokens while their cumulative probability is at most 1 - p, ties included in its order.
    """
    if p >= 1.0:
        return c
    weights = np.exp(c.logits - c.logits.max())
    total = weights.sum(dtype=np.float64)
    if len(weights) > 4 * _FIRST_CUT:
        head = np.argpartition(weights, -_FIRST_CUT)[-_FIRST_CUT:]
        if weights[head].sum(dtype=np.float64) >= p * total * (1 + 1e-6):
            # The kept set lies within the head: everything below it is dropped together.
            floor = weights[head].min()
            head = np.flatnonzero(weights >= floor)
            return _top_p_of(Candidates(c.ids[head], c.logits[head]), weights[head], total, p)
    return _top_p_of(c, weights, total, p)


def _top_p_of(c: Candidates, weights: np.ndarray, total: float, p: float) -> Candidates:
    order = np.argsort(weights, kind="stable")  # ascending, as the warper sorts
    below = total - weights.sum(dtype=np.float64) if len(weights) else 0.0
    cumulative = (below + np.cumsum(weights[order], dtype=np.float64)) / total
    keep = cumulative > 1.0 - p
    keep[-1] = True
    kept = np.sort(order[keep])
    return Candidates(c.ids[kept], c.logits[kept])


def keep_min_p(c: Candidates, min_p: float) -> Candidates:
    """Tokens at least `min_p` times as likely as the most likely one. transformers: MinPLogitsWarper."""
    if min_p <= 0.0:
        return c
    weights = np.exp(c.logits - c.logits.max())
    kept = np.flatnonzero(weights >= np.float32(min_p))
    return Candidates(c.ids[kept], c.logits[kept])


def filtered(row: np.ndarray, params: SamplingParams) -> Candidates:
    """The candidates that `params` (resolved, temperature > 0) leaves of float32 [vocab] logits."""
    row = apply_temperature(row, params.temperature or 1.0)
    candidates = keep_top_k(Candidates(np.arange(len(row)), row), params.top_k or 0)
    candidates = keep_top_p(candidates, 1.0 if params.top_p is None else params.top_p)
    return keep_min_p(candidates, params.min_p or 0.0)


def draw(c: Candidates, generator: np.random.Generator) -> int:
    """One token, by inverting the cumulative distribution at one uniform draw."""
    weights = np.exp((c.logits - c.logits.max()).astype(np.float64))
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
    return int(c.ids[min(index, len(c.ids) - 1)])


def choose(
    row: np.ndarray, params: SamplingParams, generator: np.random.Generator, masked: list[int] | None = None
) -> Choice:
    """The next token of one row of logits [vocab]; `masked` tokens are impossible (end tokens before min_tokens).

    Raises LlmxError where the logits are NaN or leave no token possible.
    """
    original = row if row.dtype == np.float32 else row.astype(np.float32)
    row = original
    if masked:
        row = row.copy()
        row[masked] = -np.inf
    if params.temperature == 0.0:
        token = int(row.argmax())
    else:
        if not np.isfinite(row.max()):  # NaN propagates through max
            raise LlmxError(_BAD_LOGITS)
        token = draw(filtered(row, params), generator)
    if not np.isfinite(row[token]):
        raise LlmxError(_BAD_LOGITS)
    return Choice(token) if params.logprobs is None else with_logprobs(original, token, params.logprobs)


_BAD_LOGITS = "the model returned NaN or infinite logits; export it with a wider dtype (bf16 or fp32) and verify the package."


def with_logprobs(row: np.ndarray, token: int, top: int) -> Choice:
    """`token` with its log-probability and rank (1: the most likely), and the `top` most likely tokens."""
    shifted = row - row.max()
    logprobs = shifted - np.log(np.exp(shifted).sum(dtype=np.float64))
    rank = int((row > row[token]).sum()) + 1
    best: list[tuple[int, float]] = []
    if top:
        top = min(top, len(row))
        ids = np.argpartition(row, -top)[-top:]
        ids = ids[np.lexsort((ids, -row[ids]))]
        best = [(int(i), float(logprobs[i])) for i in ids]
    return Choice(token, float(logprobs[token]), rank, best)
