"""From logits to tokens: pure functions of one row, and `sample` over the rows of a batch.

Semantics and order are those of transformers' warpers as `generate` chains them: temperature, top-k, top-p, min-p.
(vLLM differs in one point: it applies min-p before top-k and top-p.) Each row is computed alone and draws from its own
generator, so a request gets the same tokens, bit for bit, whatever shares its batch.

Rows are narrowed to candidates early: `Candidates` holds token ids and logits of what is still possible, so that a
top-k of 50 never sorts a vocabulary of 128k.

Sources: top-k, Fan et al. 2018 (arXiv:1805.04833); top-p, Holtzman et al. 2019 (arXiv:1904.09751); min-p, Nguyen et
al. 2024 (arXiv:2407.01082).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llmx.runtime.errors import LlmxError
from llmx.runtime.params import SamplingParams

_FIRST_CUT = 512  # candidates that top-p sorts before it pays for sorting them all
_BLOCK = 1024  # probabilities summed at a time when drawing


@dataclass(frozen=True)
class Candidates:
    """What is still possible: `ids` int64 [k], ascending, and `logits` float32 [k], at least one of them finite."""

    ids: np.ndarray
    logits: np.ndarray

    def take(self, kept: np.ndarray) -> Candidates:
        """Those at the places `kept`, int64 [m], ascending."""
        return Candidates(self.ids[kept], self.logits[kept])


@dataclass(frozen=True)
class Choice:
    """A row's token and, where asked for, log-probabilities under the model's own distribution (before any filter).

    `rank` is 1 + the number of more likely tokens. `top` is [(token, logprob), …], most likely first, lower ids first
    among equals.
    """

    token: int
    logprob: float | None = None
    rank: int | None = None
    top: list[tuple[int, float]] | None = None


def make_generator(seed: int | None) -> np.random.Generator:
    """A request's own random stream; unpredictable where `seed` is None.

    Philox is counter-based and specified, so a seed gives the same draws on every machine and numpy.
    """
    return np.random.Generator(np.random.Philox(seed))


def apply_temperature(row: np.ndarray, temperature: float) -> np.ndarray:
    """float32 [vocab] / `temperature` > 0. transformers: TemperatureLogitsWarper.

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
    weights = np.exp(c.logits - c.logits.max())
    probs = weights / np.float32(weights.sum(dtype=np.float64))
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


def filtered(row: np.ndarray, params: SamplingParams) -> Candidates:
    """The candidates that `params` (resolved, temperature > 0) leaves of float32 [vocab] logits, scaled."""
    row = apply_temperature(row, params.temperature or 1.0)
    candidates = keep_top_k(Candidates(np.arange(len(row)), row), params.top_k or 0)
    candidates = keep_top_p(candidates, 1.0 if params.top_p is None else params.top_p)
    return keep_min_p(candidates, params.min_p or 0.0)


def draw(c: Candidates, generator: np.random.Generator) -> int:
    """One token, by inverting the cumulative distribution at one uniform draw.

    The sum is taken block by block: a running sum over a whole vocabulary costs ten times as much.
    """
    weights = np.exp(c.logits - c.logits.max())
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    ends = np.cumsum(sums)
    target = generator.random() * ends[-1]
    block = int(np.searchsorted(ends, target, side="right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    before = ends[block - 1] if block else 0.0  # not above target, so a token of weight 0 is never the answer
    place = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), target - before, side="right"))
    if place == len(inside):  # the two sums of a block may round differently: its last possible token
        place = int(np.flatnonzero(inside)[-1])
    return int(c.ids[block * _BLOCK + place])


def choose(
    row: np.ndarray, params: SamplingParams, generator: np.random.Generator, masked: Sequence[int] | None = None
) -> Choice:
    """The next token of one row of logits [vocab] (float32, or float16 and bfloat16, which are widened).

    `params` is resolved. `masked` tokens are impossible (end tokens before min_tokens). At temperature 0 the most
    likely token is taken, the lowest id among equals as torch.argmax on a CPU, and nothing is drawn; else exactly one
    number is drawn from `generator`. Raises LlmxError where the logits are NaN or infinite, or leave no token possible.
    """
    original = np.ascontiguousarray(row, dtype=np.float32)
    row = original
    if masked:
        row = row.copy()
        row[list(masked)] = -np.inf
    best = int(row.argmax())  # NaN counts as the largest
    if not np.isfinite(row[best]):
        raise LlmxError(_BAD_LOGITS)
    token = best if params.temperature == 0.0 else draw(filtered(row, params), generator)
    return Choice(token) if params.logprobs is None else with_logprobs(original, token, params.logprobs)


_BAD_LOGITS = (
    "The model returned NaN or infinite logits, or all its tokens are masked; export it with a wider dtype "
    "(bf16 or fp32) and verify the package."
)


def with_logprobs(row: np.ndarray, token: int, top: int) -> Choice:
    """`token` with its log-probability and rank under float32 [vocab] logits, and the `top` most likely tokens."""
    shifted = row - row.max()
    log_sum = float(np.log(np.exp(shifted).sum(dtype=np.float64)))
    rank = int(np.count_nonzero(row > row[token])) + 1
    best: list[tuple[int, float]] = []
    if top:
        top = min(top, len(row))
        ids = np.flatnonzero(row >= np.partition(row, -top)[-top])
        ids = ids[np.argsort(-row[ids], kind="stable")][:top]
        best = [(int(i), float(shifted[i]) - log_sum) for i in ids]
    return Choice(token, float(shifted[token]) - log_sum, rank, best)


def sample(
    logits: np.ndarray,
    params: Sequence[SamplingParams],
    generators: Sequence[np.random.Generator],
    masked: Sequence[Sequence[int] | None] | None = None,
) -> tuple[np.ndarray, list[Choice]]:
    """The next token of each row of logits [batch, vocab], with one entry of `params`, `generators`, `masked` a row.

    Returns token ids int64 [batch] and the rows' `Choice`s: exactly what `choose` gives for each row alone. Raises
    LlmxError naming the row where one has NaN or infinite logits, or no token possible.
    """
    choices: list[Choice] = []
    for row, (values, wanted, generator) in enumerate(zip(logits, params, generators, strict=True)):
        try:
            choices.append(choose(values, wanted, generator, masked[row] if masked is not None else None))
        except LlmxError as error:
            raise LlmxError(f"Row {row} of the batch: {error}") from None
    return np.array([choice.token for choice in choices], np.int64), choices
