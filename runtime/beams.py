"""Beam search: which continuations live on (`BeamSearch`), and in which slots (`BeamGroup`).

The rules are those of transformers' `_beam_search` (5.x), in float32: of `num_beams` running beams, the best
`max(2, 1 + end tokens) * num_beams` continuations by summed log-probability are looked at; those among the first
`num_beams` of them that end become hypotheses, scored sum / length ** length_penalty; the best that do not end run on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llmx.runtime.scheduler import Sequence

_NEVER = -1e9  # transformers' score of what cannot be chosen


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that ended. `total`: its summed log-probability; `score`: with the length penalty."""

    tokens: list[int]
    total: float
    score: float
    history: list[Any]  # what the caller attached to each token


@dataclass(frozen=True)
class Continued:
    """A beam of the next step: beam `parent` of this one and `token` after it."""

    parent: int
    token: int


class BeamSearch:
    """The search of one prompt: scores and tokens, no state.

    Args:
        num_beams: beams that run at the same time, and hypotheses that are kept.
        length_penalty: exponent of the length that a sum is divided by; above 0 it favours longer outputs.
        early_stopping: True ends the search once `num_beams` hypotheses exist; False where the best running beam at its
            present length would not beat the worst of them; "never" where it could not at the longest length either.
        max_tokens: longest output.
        ends: tokens that end an output.
        forced: tokens of the decoder's prompt that count as output (a forced first token).
        stopped: whether an output (a list of tokens) ends for another reason.
    """

    def __init__(
        self,
        num_beams: int,
        length_penalty: float,
        early_stopping: bool | str,
        max_tokens: int,
        ends: set[int],
        forced: int = 0,
        stopped: Callable[[list[int]], bool] | None = None,
    ) -> None:
        self.num_beams, self.max_tokens, self.ends = num_beams, max_tokens, ends
        self._penalty, self._early, self._forced, self._stopped = length_penalty, early_stopping, forced, stopped
        self.running: list[list[int]] = [[] for _ in range(num_beams)]
        self._histories: list[list[Any]] = [[] for _ in range(num_beams)]
        self._scores = np.full(num_beams, _NEVER, np.float32)
        self._scores[0] = 0.0  # the beams begin alike, so that only the first one's continuations count
        self._finished: list[Hypothesis | None] = [None] * num_beams
        self._finished_scores = np.full(num_beams, _NEVER, np.float32)
        self._improvable = True
        self._length = 0
        self.done = False

    def step(self, log_probs: np.ndarray, note: Callable[[int, int], Any] | None = None) -> list[Continued]:
        """Go one token on, by float32 [num_beams, vocab] log-probabilities (the first step: [1, vocab], the prompt's).

        Returns the `num_beams` beams of the next step; meaningless once `done`. `note(parent, token)` is kept beside each
        token that a beam or a hypothesis takes.
        """
        vocab = log_probs.shape[-1]
        totals = (log_probs + self._scores[:, None]).reshape(-1)
        width = min(max(2, 1 + len(self.ends)) * self.num_beams, len(totals))
        best = _largest(totals, width)
        values, self._length = totals[best], self._length + 1
        beams = [Continued(int(place) // vocab, int(place) % vocab) for place in best]
        outputs = [[*self.running[beam.parent], beam.token] for beam in beams]
        ended = np.array([self._ends(output) for output in outputs])
        notes: dict[int, list[Any]] = {}

        def history(index: int) -> list[Any]:
            if index not in notes:
                beam = beams[index]
                notes[index] = [*self._histories[beam.parent], note(beam.parent, beam.token) if note else None]
            return notes[index]

        going = _largest(values + ended * np.float32(_NEVER), self.num_beams)
        self._finish(values, ended, outputs, history)
        self._histories = [history(int(i)) for i in going]
        self.running = [outputs[int(i)] for i in going]
        self._scores = (values + ended * np.float32(_NEVER))[going]
        self._check_done(bool(ended.all()))
        return [beams[int(i)] for i in going]

    def _ends(self, output: list[int]) -> bool:
        if output[-1] in self.ends or self._length >= self.max_tokens:
            return True
        return self._stopped is not None and self._stopped(output)

    def _finish(
        self, values: np.ndarray, ended: np.ndarray, outputs: list[list[int]], history: Callable[[int], list[Any]]
    ) -> None:
        """Keep the best `num_beams` of the hypotheses and of those that ended now."""
        first = np.arange(len(values)) < self.num_beams  # the rest is there to have enough beams that run on
        closed = all(self._finished) and self._early is True
        scores = values / np.float32((self._length + self._forced) ** self._penalty)
        closed = closed or not self._improvable
        scores = scores + np.float32(_NEVER) * (~(ended & first) | closed)
        merged = np.concatenate((self._finished_scores, scores))
        kept: list[Hypothesis | None] = []
        order = _largest(merged, self.num_beams)
        for place in order:
            index = int(place) - self.num_beams
            if index < 0:
                kept.append(self._finished[int(place)])
            elif ended[index] and first[index]:
                kept.append(Hypothesis(outputs[index], float(values[index]), float(scores[index]), history(index)))
            else:
                kept.append(None)
        self._finished, self._finished_scores = kept, merged[order]

    def _check_done(self, all_ended: bool) -> None:
        longest = self._early == "never" and self._penalty > 0.0
        length = (self.max_tokens if longest else self._length) + self._forced
        possible = self._scores[0] / np.float32(length**self._penalty)
        full = all(self._finished)
        worst = self._finished_scores.min() if full else np.float32(_NEVER)
        self._improvable = self._improvable and bool(possible > worst)
        self.done = all_ended or not self._improvable or (full and self._early is True)

    def best(self, count: int) -> list[Hypothesis]:
        """The best hypotheses, at most `count`, fewer only where what was forced left no more possible."""
        return [h for h in self._finished if h is not None and h.total > _NEVER / 2][:count]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values, the largest first, lower places first among equals."""
    if count < len(values) // 4:
        floor = np.partition(values, -count)[-count]
        places = np.flatnonzero(values >= floor)
        return places[np.argsort(-values[places], kind="stable")][:count]
    return np.argsort(-values, kind="stable")[:count]


class BeamGroup:
    """A search and the sequences that hold its slots: beam i's state is in the slot of `beams[i]`.

    Invariant between steps: `beams[i].tokens` are the prompt and `search.running[i]`, all but the last of them cached.
    Until the prompt is computed the first sequence has a slot that fills and the others wait in theirs (`parked`).
    """

    def __init__(self, search: BeamSearch, beams: list[Sequence]) -> None:
        self.search, self.beams = search, beams
        for beam in beams[1:]:
            beam.parked = True

    def step(
        self,
        log_probs: np.ndarray,
        copy: Callable[[int, int, int, int], None],
        note: Callable[[int, int], Any] | None = None,
    ) -> None:
        """As `BeamSearch.step`; then give each beam of the next step a slot.

        A beam's first continuation stays in its slot. Others take the slots of beams that were dropped, and
        `copy(source, target, length, start)` brings over the positions from the one on where the two differ.
        """
        continued = self.search.step(log_probs, note)
        if self.search.done:
            return
        kept: dict[int, int] = {}
        for index, beam in enumerate(continued):
            kept.setdefault(beam.parent, index)
        free = iter([self.beams[i] for i in range(len(self.beams)) if i not in kept])
        placed: list[Sequence] = []
        for index, beam in enumerate(continued):
            parent = self.beams[beam.parent]
            placed.append(parent if kept[beam.parent] == index else _fork(parent, next(free), copy))
        for target, beam in zip(placed, continued, strict=True):
            target.history.append(beam.token)
        self.beams = placed


def _fork(parent: Sequence, target: Sequence, copy: Callable[[int, int, int, int], None]) -> Sequence:
    """Make `target` hold what `parent` holds; `target`'s tokens and `parent`'s are those of their slots' states."""
    assert parent.slot is not None and target.slot is not None
    same = 0
    for same in range(min(target.num_cached, parent.num_cached) + 1):
        if same >= min(target.num_cached, parent.num_cached) or target.tokens[same] != parent.tokens[same]:
            break
    if same < parent.num_cached:
        copy(parent.slot, target.slot, parent.num_cached, same)
    target.history, target.num_cached, target.parked = parent.history.fork(), parent.num_cached, False
    return target
