"""Perplexity of a text longer than the context, with a sliding window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability, `mean_nll` in nats, of `num_tokens` scored tokens."""

    perplexity: float
    mean_nll: float
    num_tokens: int
    max_length: int
    stride: int


def windows(count: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first scored, end) of the windows over `count` tokens, as transformers' "Perplexity of fixed-length
    models" has them: each begins `stride` after the one before and scores the tokens that none before it scored.

    A window's first token has nothing before it, so the text's first is not scored, nor, where windows do not overlap,
    any window's first.
    """
    scored = 0
    for begin in range(0, count, stride):
        end = min(begin + max_length, count)
        first = max(scored, begin + 1)
        if first < end:
            yield begin, first, end
        scored = end
        if end == count:
            return


def sliding(ids: list[int], max_length: int, stride: int, score: Callable[[list[int], int], list[float]]) -> Perplexity:
    """Over windows of `ids`; `score` gives the log-probabilities of a window's tokens from a place on.

    Every scored token counts once. (transformers' page weighs a window's mean by one token less than it scored, but for
    the first window; without overlap both are the same.)
    """
    total, count = 0.0, 0
    for begin, first, end in windows(len(ids), max_length, stride):
        scores = score(ids[begin:end], first - begin)
        total -= math.fsum(scores)
        count += len(scores)
    mean = total / count
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    return Perplexity(value, mean, count, max_length, stride)
