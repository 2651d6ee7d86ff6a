"""Logits before temperature: what may not come, biases, penalties. Pure functions of one row.

Order and semantics are vLLM's: bans, logit bias, repetition penalty, frequency penalty, presence penalty. It is
transformers' order as well, for what both have.

Sources: repetition penalty, Keskar et al. 2019 (arXiv:1909.05858); frequency and presence penalties, OpenAI's API
reference; no-repeat n-grams, Paulus et al. 2017 (arXiv:1705.04304).
"""

from __future__ import annotations

import numpy as np
from llmx.runtime.history import History
from llmx.runtime.params import SamplingParams


def banned(params: SamplingParams, history: History) -> list[int]:
    """Ids that may not come next; some perhaps twice."""
    rules = history.rules
    ids = list(rules.suppressed)
    if rules.suppressed_first and history.num_output == 0:
        ids += rules.suppressed_first
    if history.num_output < (params.min_tokens or 0):
        ids += rules.ends
    for word in rules.bad_words:
        start = len(history.tokens) - len(word.ids) + 1
        if start >= (0 if word.in_prompt else history.num_prompt) and _begins(history.tokens, start, word.ids):
            ids.append(word.ids[-1])
    if params.no_repeat_ngram_size:
        ids += history.completions(params.no_repeat_ngram_size)
    return ids


def _begins(tokens: list[int], start: int, word: tuple[int, ...]) -> bool:
    return tuple(tokens[start:]) == word[:-1]


def has_penalties(params: SamplingParams) -> bool:
    """Whether logits depend on the tokens so far."""
    return (params.repetition_penalty or 1.0) != 1.0 or bool(params.frequency_penalty or params.presence_penalty)


def penalize(row: np.ndarray, params: SamplingParams, history: History) -> None:
    """Lower, in place, the float32 [vocab] logits of tokens that were there before.

    `repetition_penalty` counts prompt and output: it divides positive logits and multiplies negative ones. The
    frequency penalty, times how often a token is in the output, and the presence penalty are subtracted.
    """
    ids, counts = history.counts()
    values = row[ids]
    repetition = np.float32(params.repetition_penalty or 1.0)
    if repetition != 1.0:
        values = np.where(values > 0, values / repetition, values * repetition)
    if params.frequency_penalty:
        values = values - np.float32(params.frequency_penalty) * counts
    if params.presence_penalty:
        values = values - np.float32(params.presence_penalty) * (counts > 0)
    row[ids] = values


def processed(row: np.ndarray, params: SamplingParams, history: History) -> np.ndarray:
    """float32 [vocab] logits with bans (-inf), bias and penalties; `row` itself where nothing changes it."""
    ids, bias, penalties = banned(params, history), history.rules.bias, has_penalties(params)
    if not ids and bias is None and not penalties:
        return row
    row = row.copy()
    if bias is not None:
        row[bias[0]] += bias[1]
    if penalties:
        penalize(row, params, history)
    if ids:
        row[ids] = -np.inf
    return row
