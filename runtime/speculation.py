"""Speculative decoding: guess several tokens cheaply, have the model judge them all in one pass, keep what stands.

Lossless. A guess x of the drafter's distribution q is accepted with probability min(1, p(x) / q(x)), p being what the
model would draw from; the first that is not accepted is replaced by a draw from max(0, p - q), normalised, and where
all stand one more token is drawn from p. The tokens are distributed exactly as p (Leviathan et al. 2022,
arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). p and q are `sampling.distribution`: every filter, penalty and
rule is inside, at each position given the tokens before it.

Where q is one token (temperature 0, prompt lookup) the same law has a simpler form, which is used: draw from p as plain
decoding would, and stop at the first draw that differs from the guess. Tokens are then those of plain decoding, seed by
seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from llmx.runtime.errors import RequestError
from llmx.runtime.filters import Candidates, probabilities
from llmx.runtime.sampling import Choice, choose, distribution, draw, with_logprobs
from llmx.runtime.scheduler import Sequence

MAX_GUESSES = 64


@dataclass(frozen=True)
class Speculation:
    """Who guesses: a `draft` package (folder or hub id) with the model's vocabulary, or `prompt_lookup`: what followed
    the last tokens where they occurred before, in the prompt or the output.

    Args:
        num_tokens: guesses a pass; None: 0 to `max_tokens`, chosen by how many of a request's guesses stood and what passes
            cost.
        max_tokens: most guesses a pass.
        max_ngram: longest run of tokens that prompt lookup looks for; it tries shorter ones down to `min_ngram`.
    """

    draft: str | Path | None = None
    prompt_lookup: bool = False
    num_tokens: int | None = None
    max_tokens: int = 8
    max_ngram: int = 4
    min_ngram: int = 2

    def __post_init__(self) -> None:
        if (self.draft is None) == (not self.prompt_lookup):
            raise RequestError("Speculation needs a draft package or prompt_lookup=True, one of the two.")
        for name in ("num_tokens", "max_tokens"):
            value = getattr(self, name)
            if not (value is None and name == "num_tokens") and not _whole(value, 1, MAX_GUESSES):
                raise RequestError(f"{name} must be a whole number from 1 to {MAX_GUESSES}, and is {value!r}.")
        if not (_whole(self.min_ngram, 1, 64) and _whole(self.max_ngram, self.min_ngram, 64)):
            raise RequestError(
                f"min_ngram and max_ngram must be whole numbers, 1 <= min_ngram <= max_ngram <= 64, and are "
                f"{self.min_ngram!r} and {self.max_ngram!r}."
            )


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Guess:
    """A token and what it was drawn from; None: from nothing else."""

    token: int
    drawn_from: Candidates | None = None


class Drafter(Protocol):
    """Guesses for sequences. What it keeps of one it forgets by itself once the sequence has ended."""

    steady: bool  # whether the last guesses cost what guesses cost, and no prompt had to be read first

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[Guess]]:
        """At most so many guesses of what follows each sequence's tokens."""
        ...

    def close(self) -> None: ...


class PromptLookup:
    """Guesses what followed the last tokens where they occurred before, the longest run and the latest place first.

    Source: Saxena 2023, "Prompt Lookup Decoding"; transformers' `prompt_lookup_num_tokens`.
    """

    steady = True

    def __init__(self, max_ngram: int, min_ngram: int) -> None:
        self._sizes = range(max_ngram, min_ngram - 1, -1)

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[Guess]]:
        return [[Guess(token) for token in self._follow(sequence, most)] for sequence, most in wanted]

    def _follow(self, sequence: Sequence, most: int) -> list[int]:
        tokens, found = sequence.tokens, sequence.speculation
        for size in self._sizes if most > 0 else ():
            end = found.ngrams(size, tokens).get(tuple(tokens[-size:]))
            if end is not None:
                return tokens[end : end + most]
        return []

    def close(self) -> None:
        pass


def judge(row: np.ndarray, guess: Guess, sequence: Sequence) -> tuple[Choice, bool]:
    """The token that comes where `guess` was made, from the model's logits `row` [vocab], and whether it is the guess."""
    params, generator = sequence.params, sequence.generator
    q = guess.drawn_from
    if q is None or params.temperature == 0.0:
        choice = choose(row, params, generator, sequence.history)
        return choice, choice.token == guess.token
    p = distribution(row, params, sequence.history)
    weights, others = probabilities(p.logits), probabilities(q.logits)
    if generator.random() * _of(q, others, guess.token) < _of(p, weights, guess.token):
        token = guess.token
    else:
        token = draw(_residual(p, weights, q, others), generator)
    choice = Choice(token)
    if params.logprobs is not None:
        choice = with_logprobs(np.ascontiguousarray(row, np.float32), token, params.logprobs)
    return choice, token == guess.token


def _of(c: Candidates, weights: np.ndarray, token: int) -> float:
    place = int(np.searchsorted(c.ids, token))
    return float(weights[place]) if place < len(c.ids) and c.ids[place] == token else 0.0


def _residual(p: Candidates, weights: np.ndarray, q: Candidates, others: np.ndarray) -> Candidates:
    """max(0, p - q) as candidates; p where rounding leaves nothing of it."""
    places = np.minimum(np.searchsorted(q.ids, p.ids), len(q.ids) - 1)
    left = weights - np.where(q.ids[places] == p.ids, others[places], 0)
    kept = np.flatnonzero(left > 0)
    return Candidates(p.ids[kept], np.log(left[kept])) if len(kept) else p


def check_backend(layouts: set[str]) -> None:
    """Raises RequestError where a package's state cannot be taken back after a guess that did not stand."""
    if "replace" in layouts:
        raise RequestError(
            "This package keeps a recurrence, which cannot go back to before a guess that did not stand; "
            "use it without speculative decoding."
        )
    if layouts != {"in_place"}:
        raise RequestError(
            "This package runs token by token (its state is carried from step to step), so that checking guesses "
            "would save nothing; use it without speculative decoding."
        )


def check_vocabularies(model: Any, draft: Any) -> None:
    """Raises RequestError unless two tokenizers give every token the same id."""
    own, other = model.vocabulary(), draft.vocabulary()
    if own != other or set(model.info.eos_token_ids) != set(draft.info.eos_token_ids):
        different = next((t for t in sorted({*own, *other}) if own.get(t) != other.get(t)), None)
        where = f"token {different!r} is {own.get(different)} and {other.get(different)}" if different else "end tokens"
        raise RequestError(
            f"The draft has another vocabulary than the model ({where}); use a draft trained with its tokenizer."
        )
