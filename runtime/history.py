"""What the next token depends on besides the logits: the tokens so far, counted as penalties need them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llmx.runtime.grammar import Grammar
from llmx.runtime.rules import NO_RULES, Rules


class History:
    """A sequence's tokens, prompt and output, and what the request says about the next one: `rules` and a grammar.

    `tokens` grows at its end and shrinks by `truncate` alone. Counts and n-grams are made when first asked for and
    follow the list from then on, each token once: a request without penalties pays nothing for them.
    """

    def __init__(self, prompt: Sequence[int] = (), rules: Rules = NO_RULES, grammar: Grammar | None = None) -> None:
        self.tokens = list(prompt)
        self.num_prompt = len(self.tokens)
        self.rules = rules
        self._grammar = grammar
        self._counts: _Counts | None = None
        self._ngrams: _NGrams | None = None

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def append(self, token: int) -> None:
        """`token` was chosen."""
        self.tokens.append(token)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`, which hold the prompt."""
        assert self.num_prompt <= length <= len(self.tokens), f"{length} of {len(self.tokens)} tokens"
        if self._counts is not None:
            self._counts.undo(self.tokens, length)
        if self._ngrams is not None:
            self._ngrams.undo(self.tokens, length)
        if self._grammar is not None:
            self._grammar.undo(length - self.num_prompt)
        del self.tokens[length:]

    def fork(self) -> History:
        """A copy that goes on by itself."""
        twin = History((), self.rules, None if self._grammar is None else self._grammar.fork())
        twin.tokens, twin.num_prompt = self.tokens.copy(), self.num_prompt
        twin._counts = None if self._counts is None else self._counts.copy()
        twin._ngrams = None if self._ngrams is None else self._ngrams.copy()
        return twin

    @property
    def has_grammar(self) -> bool:
        return self._grammar is not None

    def grammar(self) -> Grammar | None:
        """Where the output stands in its grammar; None where it has none. Raises RequestError where that broke."""
        if self._grammar is not None:
            self._grammar.follow(self.tokens, self.num_prompt)
        return self._grammar

    def forced(self) -> list[int]:
        """Tokens that the grammar has come next, whatever the model says: nothing is drawn for them."""
        grammar = self.grammar()
        return [] if grammar is None else grammar.forced()

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [k] of all tokens so far, each once; how often each is in the output, float32 [k])."""
        if self._counts is None:
            self._counts = _Counts(self.tokens[: self.num_prompt])
        return self._counts.upto(self.tokens)

    def completions(self, size: int) -> list[int]:
        """Tokens that would complete an n-gram of `size` tokens that was there before, prompt included."""
        if size == 1:
            return [int(token) for token in self.counts()[0]]
        if self._ngrams is None or self._ngrams.size != size:
            self._ngrams = _NGrams(size)
        return self._ngrams.following(self.tokens)


class _Counts:
    """How often each token is in the output. Places are given in order of first appearance, so the last one given is
    the first to go when tokens are taken back.
    """

    def __init__(self, prompt: list[int]) -> None:
        ids = np.unique(np.array(prompt, np.int64))
        self._size = len(ids)
        self._done = len(prompt)
        self._places = {int(token): place for place, token in enumerate(ids)}
        self._ids = np.concatenate((ids, np.zeros(64, np.int64)))
        self._counts = np.zeros(len(self._ids), np.float32)
        self._fixed = len(ids)  # the prompt's, which stay

    def upto(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        for token in tokens[self._done :]:
            place = self._places.get(token)
            if place is None:
                place = self._add(token)
            self._counts[place] += 1
        self._done = len(tokens)
        return self._ids[: self._size], self._counts[: self._size]

    def _add(self, token: int) -> int:
        place = self._places[token] = self._size
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[place], self._counts[place] = token, 0
        self._size += 1
        return place

    def undo(self, tokens: list[int], length: int) -> None:
        for token in reversed(tokens[length : self._done]):
            place = self._places[token]
            self._counts[place] -= 1
            if place >= self._fixed and self._counts[place] == 0:
                del self._places[token]
                self._size -= 1
        self._done = min(self._done, length)

    def copy(self) -> _Counts:
        twin = _Counts([])
        twin._size, twin._done, twin._fixed = self._size, self._done, self._fixed
        twin._places = self._places.copy()
        twin._ids, twin._counts = self._ids.copy(), self._counts.copy()
        return twin


class _NGrams:
    """What followed each run of size - 1 tokens, in order; size >= 2."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._done = 0
        self._followers: dict[tuple[int, ...], list[int]] = {}

    def following(self, tokens: list[int]) -> list[int]:
        before = self.size - 1
        for end in range(max(self._done, before), len(tokens)):
            self._followers.setdefault(tuple(tokens[end - before : end]), []).append(tokens[end])
        self._done = len(tokens)
        return self._followers.get(tuple(tokens[-before:]), [])

    def undo(self, tokens: list[int], length: int) -> None:
        before = self.size - 1
        for end in range(self._done - 1, max(length, before) - 1, -1):
            self._followers[tuple(tokens[end - before : end])].pop()
        self._done = min(self._done, length)

    def copy(self) -> _NGrams:
        twin = _NGrams(self.size)
        twin._done = self._done
        twin._followers = {run: tokens.copy() for run, tokens in self._followers.items()}
        return twin
