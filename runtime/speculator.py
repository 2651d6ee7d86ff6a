"""Speculative decoding inside the engine's step: guesses, one pass that judges them, and the tokens that stand."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from llmx.runtime.backend import Backend, open_backend
from llmx.runtime.candidates import WHOLE_ROW, choose_from_step
from llmx.runtime.draft import DraftModel
from llmx.runtime.errors import FamilyError, RequestError
from llmx.runtime.hub import resolve_package
from llmx.runtime.manifest import Manifest, load_manifest
from llmx.runtime.masks_ahead import MasksAhead
from llmx.runtime.pace import Budget, Costs, Pace, Probe, Progress
from llmx.runtime.params import SamplingParams
from llmx.runtime.sampling import Choice, choose
from llmx.runtime.scheduler import Sequence
from llmx.runtime.speculation import (
    Drafter,
    Guess,
    PromptLookup,
    Speculation,
    check_backend,
    check_vocabularies,
    judge,
)
from llmx.runtime.step_logits import HostLogits, StepLogits
from llmx.runtime.step_output import asked_now
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import span

if TYPE_CHECKING:
    from llmx.runtime.engine import Engine

#: Bytes of weights up to which a draft runs on one thread: waking others costs more than they save.
_SMALL = 8 << 20
_MEASURED = 4  # guesses of the largest pass that `calibrate` times
_TIMED = 16  # of so many steps without a guess in sight one is timed

#: Appends the token that a function chooses and says whether the sequence goes on.
Take = Callable[[Sequence, Callable[[], Choice]], bool]


class _Echo:
    """Guesses the last token again: as cheap as looking one up, and always there."""

    steady = True

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[Guess]]:
        return [[Guess(sequence.tokens[-1])] * most for sequence, most in wanted]

    def close(self) -> None:
        pass


class Speculator:
    """Guesses and judges for the sequences of a step. The engine gives it those that decode and gets the rest back.

    How many guesses pay depends on measured times. The tokens of a request do not: where guesses are drawn, and so their
    number changes which random numbers are, a request with a seed goes by the times measured at load (`costs`), others
    by the latest (`pace`).
    """

    def __init__(self, settings: Speculation, backend: Backend, drafter: Drafter, costs: Costs | None = None) -> None:
        self.settings, self.costs = settings, costs or Costs()
        self.pace = Pace(self.costs)
        self._backend, self._drafter = backend, drafter
        self._draws = not settings.prompt_lookup
        self._probe = Probe(longest=1024, passes=4)  # a draft has to read what it missed before it can guess
        self._all = Progress()  # of all sequences together: where a new one begins
        self._count = 0  # guesses for a row of the step in progress
        self._fixed = settings.num_tokens  # guesses that are made in any case
        self._drafting = 0.0  # seconds that the step in progress has spent on guesses
        self._budget = Budget()
        self._probing = False  # whether the step in progress looks again
        self._accepted = 0  # guesses that stood in the step in progress
        self._resting = 0  # steps since someone was asked for guesses
        #: Passes that judged guesses, guesses, and those that stood, so far.
        self.counts = [0, 0, 0]

    @property
    def most(self) -> int:
        """Guesses that a pass may hold."""
        return max(self._fixed or self.settings.max_tokens, _MEASURED)

    def guess(self, sequences: list[Sequence]) -> dict[Sequence, list[Guess]]:
        """Guesses for those of `sequences` that have any."""
        wanted = [(sequence, self._num_guesses(sequence, len(sequences))) for sequence in sequences]
        wanted = [(sequence, most) for sequence, most in wanted if most > 0]
        if not wanted:
            return {}
        start = time.perf_counter()
        with span("draft"):
            proposed = self._drafter.propose(wanted)
        self._drafting = time.perf_counter() - start
        return {sequence: guesses for (sequence, _), guesses in zip(wanted, proposed, strict=True) if guesses}

    def _num_guesses(self, sequence: Sequence, rows: int) -> int:
        known = sequence.speculation
        seeded = self._draws and sequence.params.temperature != 0.0 and sequence.params.seed is not None
        if known is not None and known.idle and self._fixed is None:
            shared = rows if known.probe is self._probe else 1
            if not known.due(len(sequence.history.tokens), shared, seeded or not self._budget.spent):
                return 0
        most = self._most(sequence)
        if most <= 0:
            return 0
        if known is None:
            known = sequence.speculation = Progress() if seeded else self._progress()
        if self._fixed is not None:
            return most
        if known.idle:  # a probe is due
            known.idle, self._probing = False, True
            return 1
        if seeded:
            return int(known.num_guesses(most, self.costs.line()))
        if self._budget.exhausted:
            known.idle = True
            return 0
        return 0 if self.pace.stale(rows) else int(known.num_guesses(most, self.pace.line(rows)))

    def _most(self, sequence: Sequence) -> int:
        """Guesses that there is room for."""
        room = self._backend.max_length - len(sequence.tokens)
        wanted = (sequence.params.max_tokens or 0) - sequence.num_output - 1
        most = min(self.settings.max_tokens if self._fixed is None else self._fixed, room, wanted)
        turn = self._backend.recompute_at
        if turn is not None and sequence.num_cached <= turn:  # its state is computed anew at `turn`, by plain decoding
            most = min(most, turn - sequence.num_cached - 1)
        return 0 if sequence.request.beams is not None else most

    def _progress(self) -> Progress:
        """Of a new sequence, which begins with what is known of others. For a draft one of them looks again for all; lookup
        is free, and each looks for itself.
        """
        return Progress(self._all.rate, self._probe if self._draws else Probe(longest=16))

    def note_step(self, rows: int, seconds: float) -> None:
        """The step of `rows` sequences that `run` began took so long in all."""
        if self._resting % _TIMED:
            return
        if self._drafter.steady or not self._count:
            self.pace.note(rows, self._count, seconds)
        if self._count and (
            self._drafter.steady or self._probing
        ):  # a prompt is read for what is to come, unless by a probe
            self._budget.spend(self.pace.lost(rows, seconds, self._accepted))

    def run(
        self, sequences: list[Sequence], lengths: Callable[[], np.ndarray], take: Take, masks: MasksAhead
    ) -> list[Sequence]:
        """Decode those of `sequences` that have guesses; the others, which are to decode plainly.

        `lengths`: makes int64 [n], the positions that each of the slots 0 … n - 1 holds.
        """
        self._budget.earn(len(sequences))
        if self._rest(sequences):
            self._resting, self._count = self._resting + 1, 0
            return sequences
        self._resting = self._accepted = 0
        self._probing = False
        guesses = self.guess(sequences)
        self._count = max((len(guessed) for guessed in guesses.values()), default=0)
        if not guesses:
            return sequences
        if len(guesses) > 1 and self._backend.verifies_batches:
            turn = self._backend.recompute_at
            together = [s for s in sequences if s.num_cached != turn and s.request.beams is None]
            self._judge_batch({s: guesses.get(s, []) for s in together}, lengths(), take, masks)
            return [s for s in sequences if s not in together]
        for sequence, guessed in guesses.items():
            if sequence.slot is None:  # a sibling's failure has just ended its request
                continue
            ids = np.array([sequence.tokens[-1], *(g.token for g in guessed)], np.int64)
            plain = all(_judged_plainly(guess, sequence.params) for guess in guessed)
            with span("verify"), _ahead({sequence: guessed}, masks):
                rows = self._backend.prefill_each(
                    sequence.slot, ids, sequence.num_cached, sequence.asks if plain else WHOLE_ROW
                )
            self._judge(sequence, guessed, rows, take)
        return [s for s in sequences if s not in guesses]

    @staticmethod
    def _rest(sequences: list[Sequence]) -> bool:
        """Whether it is known that no sequence wants guesses."""
        for sequence in sequences:
            known = sequence.speculation
            if known is None or len(sequence.history.tokens) >= known.wake:
                return False
        return True

    def _judge_batch(
        self,
        guesses: dict[Sequence, list[Guess]],
        lengths: np.ndarray,
        take: Take,
        masks: MasksAhead,
    ) -> None:
        """One padded pass over the slots; rows without guesses get their one token."""
        rows = len(lengths)
        width = 1 + max(len(guessed) for guessed in guesses.values())
        ids, counts = np.zeros((rows, width), np.int64), np.ones(rows, np.int64)
        for sequence, guessed in guesses.items():
            line = [sequence.tokens[-1], *(g.token for g in guessed)]
            ids[sequence.slot, : len(line)], counts[sequence.slot] = line, len(line)
        with span("verify"), _ahead(guesses, masks):
            logits = self._backend.verify(ids, lengths, counts)
        for sequence, guessed in guesses.items():
            if sequence.slot is None:  # a sibling's failure has just ended its request
                continue
            self._judge(sequence, guessed, HostLogits(logits[sequence.slot]), take)

    def _judge(self, sequence: Sequence, guesses: list[Guess], rows: StepLogits, take: Take) -> None:
        """Take the guesses that stand and the token after them, from the rows after the last token and each guess."""
        params = sequence.params
        accepted = judged = 0
        for index, guess in enumerate([*guesses, None]):
            stands = False

            def pick(index: int = index, guess: Guess | None = guess) -> Choice:
                nonlocal stands
                choice = None
                if guess is None or _judged_plainly(guess, params):
                    choice = choose_from_step(rows, index, params, sequence.generator, asked_now(sequence))
                if choice is not None:
                    stands = guess is not None and choice.token == guess.token
                elif guess is None:
                    choice = choose(rows.row(index), params, sequence.generator, sequence.history)
                else:
                    choice, stands = judge(rows.row(index), guess, sequence)
                return choice

            sequence.num_cached += 1
            length = len(sequence.tokens)
            going = take(sequence, pick) and len(sequence.tokens) == length + 1  # else a grammar has gone further
            judged += guess is not None
            accepted += stands
            if not (stands and going):
                break
        if guesses:
            metrics = sequence.request.metrics
            metrics.num_drafted += len(guesses)
            metrics.num_accepted += accepted
            metrics.num_verifications += 1
            self._accepted += accepted
            self.counts = [a + b for a, b in zip(self.counts, (1, len(guesses), accepted), strict=True)]
            sequence.speculation.note(accepted, judged)
            self._all.note(accepted, judged)

    def calibrate(self, engine: Engine, repeats: int = 6, most: float = 0.5) -> None:
        """Measure what passes cost, by steps of a request of its own; before any other runs. At least two of each kind,
        no more after `most` seconds.
        """
        if self._fixed is not None or self._backend.max_length < 64 + 10 * repeats:
            return
        drafter, self._drafter = self._drafter, self._drafter if self._draws else _Echo()
        params = SamplingParams(temperature=0.0, max_tokens=8 * repeats + 8, ignore_eos=True).resolved({})
        request = engine.add(None, [0] * 16, params)
        engine.step()  # its prompt
        times: dict[int, list[float]] = {0: [], 1: [], _MEASURED: []}
        drafting: list[float] = []
        begin = time.perf_counter()
        for repeat in range(repeats):
            for count, found in times.items():
                self._fixed = count
                start = time.perf_counter()
                engine.step()
                found.append(time.perf_counter() - start)
            drafting.append(self._drafting)
            if repeat >= 2 and time.perf_counter() - begin > most:
                break
        self._fixed, self._drafter = None, drafter
        engine.cancel(request)
        engine.step()
        engine.output.num_tokens = 0
        if request.error is None:
            self._learn({count: min(found[1:]) for count, found in times.items()}, min(drafting[1:]))
        self.counts, self._all, self._budget = [0, 0, 0], Progress(), Budget()

    def _learn(self, times: dict[int, float], drafting: float) -> None:
        """Costs from seconds of a step by its number of guesses, and of drafting the most of them."""
        plain, one, many = times[0], times[1] / times[0], times[_MEASURED] / times[0]
        slope = max(many - one, 0.0) / (_MEASURED - 1)
        guess = min(drafting / _MEASURED / plain, slope) if self._draws else 0.0
        self.costs = Costs(slope - guess, guess, max(one - 1 - slope, -0.5))
        self.pace = Pace(self.costs, plain)

    def close(self) -> None:
        self._drafter.close()


def _ahead(guesses: dict[Sequence, list[Guess]], masks: MasksAhead) -> AbstractContextManager[None]:
    """While a pass judges `guesses`, their grammars' masks are computed."""
    wanted = [(s.history, [g.token for g in guessed]) for s, guessed in guesses.items() if s.history.has_grammar]
    return masks.during([history for history, _ in wanted], [tokens for _, tokens in wanted])


def _judged_plainly(guess: Guess, params: SamplingParams) -> bool:
    """Whether a guess stands where plain decoding would draw it (`judge`)."""
    return guess.drawn_from is None or params.temperature == 0.0


def open_speculator(
    settings: Speculation | str | Path,
    manifest: Manifest,
    tokenizer: Tokenizer,
    backend: Backend,
    chunk: int,
    **options: Any,
) -> Speculator:
    """A Speculator for `backend`; `options` are `open_backend`'s, for the draft.

    Raises RequestError where the package cannot speculate or the draft does not fit it, and whatever opening the draft
    raises.
    """
    if not isinstance(settings, Speculation):
        settings = Speculation(draft=settings)
    check_backend({tensor.layout for tensor in manifest.state})
    if settings.prompt_lookup:
        drafter: Drafter = PromptLookup(settings.max_ngram, settings.min_ngram)
        return Speculator(settings, backend, drafter)
    assert settings.draft is not None
    folder = resolve_package(settings.draft, None)
    draft = load_manifest(folder)
    if draft.family != "decoder":
        raise FamilyError(f"{folder} is an {draft.family} model; a draft must be a decoder.")
    check_vocabularies(tokenizer, Tokenizer.load(folder, draft.tokenizer))
    length = min(backend.max_length, draft.model.context_length)
    if draft.files["weights.data"].size <= _SMALL:
        options["threads"] = 1
    model = open_backend(folder, draft, max_length=length, slots=backend.slots, **options)
    if not model.rewinds:
        model.close()
        raise RequestError(f"{folder} keeps a recurrence, which cannot take guesses back; choose another draft.")
    return Speculator(settings, backend, DraftModel(model, backend.vocab_size, chunk))
