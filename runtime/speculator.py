"""Speculative decoding inside the engine's step: guesses, one pass that judges them, and the tokens that stand."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llmx.runtime.backend import Backend, open_backend
from llmx.runtime.candidates import WHOLE_ROW, choose_from_step
from llmx.runtime.draft import DraftModel
from llmx.runtime.errors import FamilyError, RequestError
from llmx.runtime.hub import resolve_package
from llmx.runtime.manifest import Manifest, load_manifest
from llmx.runtime.params import SamplingParams
from llmx.runtime.sampling import Choice, choose, distribution, needs_full_row
from llmx.runtime.scheduler import Sequence
from llmx.runtime.speculation import (
    Costs,
    Drafter,
    Guess,
    Progress,
    PromptLookup,
    Speculation,
    check_backend,
    check_vocabularies,
    judge,
)
from llmx.runtime.step_logits import HostLogits, StepLogits
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import span

#: Bytes of weights up to which a draft runs on one thread: waking others costs more than they save.
_SMALL = 8 << 20

#: Appends the token that a function chooses and says whether the sequence goes on.
Take = Callable[[Sequence, Callable[[], Choice]], bool]


class Speculator:
    """Guesses and judges for the sequences of a step. The engine gives it those that decode and gets the rest back."""

    def __init__(self, settings: Speculation, backend: Backend, drafter: Drafter, costs: Costs | None = None) -> None:
        self.settings, self.costs = settings, costs or Costs()
        self._backend, self._drafter = backend, drafter

    def guess(self, sequences: list[Sequence]) -> dict[Sequence, list[Guess]]:
        """Guesses for those of `sequences` that have any."""
        wanted = [(sequence, self._num_guesses(sequence, len(sequences))) for sequence in sequences]
        wanted = [(sequence, most) for sequence, most in wanted if most > 0]
        if not wanted:
            return {}
        with span("draft"):
            proposed = self._drafter.propose(wanted)
        return {sequence: guesses for (sequence, _), guesses in zip(wanted, proposed, strict=True) if guesses}

    def _num_guesses(self, sequence: Sequence, rows: int) -> int:
        room = self._backend.max_length - len(sequence.tokens)
        wanted = (sequence.params.max_tokens or 0) - sequence.num_output - 1
        most = min(self.settings.num_tokens or self.settings.max_tokens, room, wanted)
        turn = self._backend.recompute_at
        if turn is not None and sequence.num_cached <= turn:  # its state is computed anew at `turn`, by plain decoding
            most = min(most, turn - sequence.num_cached - 1)
        if most <= 0 or sequence.request.beams is not None:
            return 0
        if sequence.speculation is None:
            sequence.speculation = Progress()
        if self.settings.num_tokens is not None:
            return most
        # where guesses are drawn their number changes what is drawn, so it must not depend on the rest of the batch
        alone = not self.settings.prompt_lookup and sequence.params.temperature != 0.0
        return sequence.speculation.num_guesses(most, self.costs, 1 if alone else rows)

    def run(self, sequences: list[Sequence], lengths: np.ndarray, take: Take) -> list[Sequence]:
        """Decode those of `sequences` that have guesses; the others, which are to decode plainly.

        `lengths`, int64 [n]: positions that each of the slots 0 … n - 1 holds.
        """
        guesses = self.guess(sequences)
        if not guesses:
            return sequences
        if len(guesses) > 1 and self._backend.verifies_batches:
            turn = self._backend.recompute_at
            together = [s for s in sequences if s.num_cached != turn and s.request.beams is None]
            self._judge_batch({s: guesses.get(s, []) for s in together}, lengths, take)
            return [s for s in sequences if s not in together]
        for sequence, guessed in guesses.items():
            assert sequence.slot is not None
            ids = np.array([sequence.tokens[-1], *(g.token for g in guessed)], np.int64)
            plain = all(_judged_plainly(guess, sequence.params) for guess in guessed)
            with span("verify"):
                rows = self._backend.prefill_each(
                    sequence.slot, ids, sequence.num_cached, sequence.asks if plain else WHOLE_ROW
                )
            self._judge(sequence, guessed, rows, take)
        return [s for s in sequences if s not in guesses]

    def _judge_batch(
        self,
        guesses: dict[Sequence, list[Guess]],
        lengths: np.ndarray,
        take: Take,
    ) -> None:
        """One padded pass over the slots; rows without guesses get their one token."""
        rows = len(lengths)
        width = 1 + max(len(guessed) for guessed in guesses.values())
        ids, counts = np.zeros((rows, width), np.int64), np.ones(rows, np.int64)
        for sequence, guessed in guesses.items():
            line = [sequence.tokens[-1], *(g.token for g in guessed)]
            ids[sequence.slot, : len(line)], counts[sequence.slot] = line, len(line)
        with span("verify"):
            logits = self._backend.verify(ids, lengths, counts)
        for sequence, guessed in guesses.items():
            assert sequence.slot is not None
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
                    ask = WHOLE_ROW if needs_full_row(params, sequence.history) else sequence.asks
                    choice = choose_from_step(rows, index, params, sequence.generator, ask)
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
            sequence.speculation.note(accepted, judged)

    def close(self) -> None:
        self._drafter.close()


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
        return Speculator(settings, backend, drafter, measure(backend, None))
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
    return Speculator(settings, backend, DraftModel(model, backend.vocab_size, chunk), measure(backend, model))


def measure(backend: Backend, draft: Backend | None, guesses: int = 4, repeats: int = 5) -> Costs:
    """What a pass costs here, in the order in which a pass runs and with the choice of its tokens: some steps of each model
    on slots that hold nothing yet.
    """
    if guesses + 2 > backend.max_length:
        return Costs()
    greedy, ask = SamplingParams().resolved({}), np.zeros(1, np.float32)

    def choices(rows: StepLogits) -> None:
        for index in range(len(rows)):
            if rows.greedy(index) is None:
                distribution(rows.row(index), greedy)

    def judging() -> None:
        choices(backend.prefill_each(0, many, 1, 0.0))

    def guessing() -> None:
        for _ in range(guesses if draft is not None else 0):
            assert draft is not None
            choices(HostLogits(draft.decode(one, one).rows()))
        judging()

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    one, many = np.zeros(1, np.int64), np.zeros(guesses + 1, np.int64)
    step = seconds(lambda: choices(backend.decode(one, one, None, ask)))
    judged = seconds(judging)
    position = max(judged / step - 1, 0.0) / guesses
    return Costs(position, max(seconds(guessing) - judged, 0.0) / guesses / step if draft is not None else 0.0)
