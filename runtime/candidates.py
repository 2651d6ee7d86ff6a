"""The next token from the likeliest tokens of a row, so that a vocabulary of logits seldom leaves the device.

A step returns the `TopLogits` of its rows. Whatever the filters leave lies among them, or their share of the probability
is known: a draw that falls on the rest reads the whole row. The result is distributed exactly as a draw from the whole
row (`llmx.runtime.sampling.choose`), one random number a token either way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llmx.runtime.errors import LlmxError
from llmx.runtime.filters import Candidates
from llmx.runtime.params import SamplingParams
from llmx.runtime.sampling import Choice, draw, needs_full_row
from llmx.runtime.step_logits import StepLogits, TopLogits

NUM_TOP = 64
WHOLE_ROW = -1.0


def asked(params: SamplingParams) -> float:
    """What `Backend.decode` is told of a row with (resolved) `params`: 0 for its greedy token, its temperature for its
    top, or WHOLE_ROW.
    """
    if needs_full_row(params) or params.logprobs is not None:
        return WHOLE_ROW
    if params.temperature == 0.0:
        return 0.0
    if (params.top_k or 0) > NUM_TOP:
        return WHOLE_ROW
    return max(float(params.temperature or 1.0), float(np.finfo(np.float32).tiny))


def choose_from_step(
    logits: StepLogits, index: int, params: SamplingParams, generator: np.random.Generator, ask: float
) -> Choice | None:
    """The next token of row `index`, with `ask` of `asked`; None where the whole row is needed (nothing was drawn).

    Raises LlmxError where the row is NaN or infinite.
    """
    if ask < 0:
        return None
    if ask == 0:
        token = logits.greedy(index)
        return None if token is None else Choice(token)
    top = logits.top(index)
    if top is None:
        return None
    if keeps_all(params):
        return Choice(draw_from_all(top, lambda: logits.row(index), generator))
    kept = narrowed(top, params)
    return None if kept is None else Choice(draw(kept, generator))


def keeps_all(params: SamplingParams) -> bool:
    """Whether no filter takes a token away, of those that know what they leave by a row's top."""
    return (params.top_k or 0) <= 0 and (1.0 if params.top_p is None else params.top_p) >= 1.0 and not params.min_p


def narrowed(top: TopLogits, params: SamplingParams) -> Candidates | None:
    """What `llmx.runtime.filters.filtered` leaves of the whole row, or None where that is not all in `top`.

    A token as likely as the last of `top` may have equals outside, so whatever keeps one of those is not in `top`.
    """
    logits = _scaled(top)
    log_sum = top.log_sum
    count = len(logits)
    sure = int(np.count_nonzero(logits > logits[-1]))  # tokens that are certain to have all their equals in `top`
    if params.min_p:
        count = int(np.count_nonzero(np.exp(logits) >= np.float32(params.min_p)))
    if 0 < (params.top_k or 0) <= count:
        assert params.top_k is not None
        count = int(np.count_nonzero(logits >= logits[params.top_k - 1]))
    if params.min_p or (params.top_k or 0) > 0:
        if count > sure:
            return None
        log_sum = float(np.log(np.exp(logits[:count]).sum(dtype=np.float64)))
    p = 1.0 if params.top_p is None else params.top_p
    if p < 1.0:
        probs = np.exp(logits[:count].astype(np.float64) - log_sum)
        above = np.concatenate(([0.0], np.cumsum(probs)[:-1]))
        count = max(int(np.count_nonzero((1.0 - above).astype(np.float32) > np.float32(1.0 - p))), 1)
    if count > sure:
        return None
    order = np.argsort(top.ids[:count])
    return Candidates(top.ids[:count][order], logits[:count][order])


def draw_from_all(top: TopLogits, row: Callable[[], np.ndarray], generator: np.random.Generator) -> int:
    """One token of the whole vocabulary at `top.temperature`: the likeliest first, then, from `row()`, all others."""
    weights = np.exp(_scaled(top), dtype=np.float64)
    target = generator.random() * np.exp(top.log_sum)
    sums = np.cumsum(weights)
    if target < sums[-1]:
        return int(top.ids[np.searchsorted(sums, target, side="right")])
    return draw_from_rest(top, row(), target)


def draw_from_rest(top: TopLogits, row: np.ndarray, target: float) -> int:
    """The token of `row` at which the sum of exp(logit over temperature), the largest logit at 0, passes `target`, where
    `top` comes first and all others after it, and `top` does not reach it.
    """
    inside = np.cumsum(np.exp(_scaled(top), dtype=np.float64))[-1]
    logits = np.ascontiguousarray(row, dtype=np.float32)
    rest = np.exp((logits - top.logits[0]) / np.float32(top.temperature))
    rest[top.ids] = 0.0
    ends = np.cumsum(rest, dtype=np.float64)
    if ends[-1] <= 0.0:  # nothing is left of the rest but rounding
        return int(top.ids[-1])
    part = (target - inside) / max(np.exp(top.log_sum) - inside, np.finfo(np.float64).tiny)
    place = int(np.searchsorted(ends, min(part, 1.0) * ends[-1], side="right"))
    return place if place < len(rest) else int(np.flatnonzero(rest)[-1])


def _scaled(top: TopLogits) -> np.ndarray:
    """float32 [k]: logits over temperature, the largest at 0. Raises LlmxError where the row is not finite."""
    if not (np.isfinite(top.logits[0]) and np.isfinite(top.log_sum)):
        raise LlmxError(
            "The model returned NaN or infinite logits; export it with a wider dtype (bf16 or fp32) and verify the package."
        )
    scaled: np.ndarray = (top.logits - top.logits[0]) / np.float32(top.temperature)
    return scaled
