"""From logits to tokens: what one row may draw from, the draw, and `sample` over the rows of a batch.

Pure functions, composed from `processors` (bans, bias, penalties) and `filters` (temperature, top-k …). Each row is
computed alone and draws from its own generator, so a request gets the same tokens, bit for bit, whatever shares its
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llmx.runtime.errors import LlmxError, RequestError
from llmx.runtime.filters import Candidates, all_of, filtered
from llmx.runtime.history import History
from llmx.runtime.params import SamplingParams
from llmx.runtime.processors import has_penalties, processed
from llmx.runtime.rules import Rules

_BLOCK = 1024  # probabilities summed at a time when drawing
_FEW = 8  # a part of the vocabulary smaller than 1 / this is picked out, a larger one masked
_NO_HISTORY = History()


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


def distribution(row: np.ndarray, params: SamplingParams, history: History | None = None) -> Candidates:
    """What the next token is drawn from: the softmax of the candidates' logits. Temperature 0 leaves one candidate.

    `row` is one row of logits [vocab] (float32, or float16 and bfloat16, which are widened) and stays as it is; `params`
    are resolved; `history` holds the tokens so far and the request's rules. At temperature 0 the most likely token is
    taken, the lowest id among equals as torch.argmax on a CPU. Raises LlmxError where the logits are NaN or infinite,
    RequestError where the rules leave no token.
    """
    history = _NO_HISTORY if history is None else history
    row = np.ascontiguousarray(row, dtype=np.float32)
    best = int(row.argmax())  # NaN counts as the largest
    if not np.isfinite(row[best]):
        raise LlmxError(_BAD_LOGITS)
    rules = history.rules
    if rules.forced_last is not None and history.num_output + 1 >= (params.max_tokens or 0):
        return Candidates(np.array([rules.forced_last]), np.zeros(1, np.float32))
    forced = history.forced()
    if forced:
        return Candidates(np.array(forced[:1]), np.zeros(1, np.float32))
    c = allowed(processed(row, params, history), history)
    if c.logits is not row:
        best = int(c.logits.argmax()) if len(c.ids) else -1
        if best < 0 or not np.isfinite(c.logits[best]):
            raise RequestError(_NOTHING_LEFT)
    if params.temperature == 0.0:
        return Candidates(c.ids[best : best + 1], c.logits[best : best + 1])
    return filtered(c, params)


def allowed(row: np.ndarray, history: History) -> Candidates:
    """The tokens of float32 [vocab] logits that `allowed_token_ids` and the grammar let come."""
    ids, grammar = history.rules.allowed, history.grammar()
    if grammar is None:
        return all_of(row) if ids is None else Candidates(ids, row[ids])
    mask = grammar.mask()
    if ids is not None:
        ids = ids[mask[ids]]
    elif _FEW * np.count_nonzero(mask) < len(row):
        ids = np.flatnonzero(mask)
    return all_of(np.where(mask, row, np.float32(-np.inf))) if ids is None else Candidates(ids, row[ids])


_BAD_LOGITS = (
    "The model returned NaN or infinite logits; export it with a wider dtype (bf16 or fp32) and verify the package."
)
_NOTHING_LEFT = (
    "No token is left to choose: all are masked by allowed_token_ids, bad_words, no_repeat_ngram_size, min_tokens or "
    "structured_outputs together; loosen one of them."
)


def needs_full_row(params: SamplingParams, history: History | None = None) -> bool:
    """Whether `distribution` must see every logit, rather than the largest and their log-sum-exp.

    False leaves temperature, top-k, top-p and min-p. Without `history` the question is about `params` alone, once
    min_tokens are there; with it, about its next token and its rules.
    """
    if (
        has_penalties(params)
        or params.no_repeat_ngram_size
        or params.epsilon_cutoff
        or params.eta_cutoff
        or params.top_n_sigma
        or (params.typical_p or 1.0) < 1.0
        or params.logit_bias
        or params.bad_words
        or params.bad_words_ids
        or params.suppress_tokens
        or params.allowed_token_ids is not None
        or params.structured_outputs is not None
    ):
        return True
    return history is not None and is_restricted(params, history)


def is_restricted(params: SamplingParams, history: History) -> bool:
    """Whether the rules of the next token need the whole row, whatever the other parameters do."""
    return history.num_output < restricted_until(params, history.rules)


def restricted_until(params: SamplingParams, rules: Rules) -> float:
    """The length of an output from which on `is_restricted` is False."""
    if rules.suppressed or rules.forced_last is not None:
        return math.inf
    return max(params.min_tokens or 0, 1 if rules.suppressed_first else 0)


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
    row: np.ndarray, params: SamplingParams, generator: np.random.Generator, history: History | None = None
) -> Choice:
    """The next token of one row of logits [vocab]: a draw from `distribution`, which see.

    At temperature 0, and for a token that a grammar forces, nothing is drawn; else exactly one number is drawn from
    `generator`.
    """
    row = np.ascontiguousarray(row, dtype=np.float32)
    c = distribution(row, params, history)
    certain = params.temperature == 0.0 or (history is not None and bool(history.forced()))
    token = int(c.ids[0]) if certain else draw(c, generator)
    return Choice(token) if params.logprobs is None else with_logprobs(row, token, params.logprobs)


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
    histories: Sequence[History | None] | None = None,
) -> tuple[np.ndarray, list[Choice]]:
    """The next token of each row of logits [batch, vocab], with one entry of `params`, `generators`, `histories` a row.

    Returns token ids int64 [batch] and the rows' `Choice`s: exactly what `choose` gives for each row alone. Raises
    LlmxError naming the row where one has NaN or infinite logits, or no token possible.
    """
    choices: list[Choice] = []
    for row, (values, wanted, generator) in enumerate(zip(logits, params, generators, strict=True)):
        try:
            choices.append(choose(values, wanted, generator, histories[row] if histories is not None else None))
        except LlmxError as error:
            raise type(error)(f"Row {row} of the batch: {error}") from None
    return np.array([choice.token for choice in choices], np.int64), choices
