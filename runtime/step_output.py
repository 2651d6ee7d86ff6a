"""What comes of a step's logits: the next token of a sequence, its text, its end."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from llmx.runtime.backend import Backend
from llmx.runtime.best_of import decide
from llmx.runtime.candidate_rows import Chosen
from llmx.runtime.candidates import WHOLE_ROW, choose_from_step
from llmx.runtime.outputs import Logprob, StreamPiece
from llmx.runtime.sampling import Choice, choose, with_logprobs
from llmx.runtime.scheduler import Request, Scheduler, Sequence
from llmx.runtime.step_logits import StepLogits
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import span


def asked_now(sequence: Sequence) -> float:
    """What the next step's row will be asked for (`Backend.decode`'s temperatures)."""
    return WHOLE_ROW if sequence.num_output < sequence.whole_until else sequence.asks


class OutputStage:
    """Chooses tokens, turns them into text, hands pieces to the callers, and ends sequences."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, scheduler: Scheduler) -> None:
        self.backend, self.tokenizer, self.scheduler = backend, tokenizer, scheduler
        #: Tokens generated so far, those of running requests included.
        self.num_tokens = 0

    def advance(self, sequence: Sequence, logits: StepLogits, row: int, chosen: Chosen = None) -> None:
        """Choose the next token from row `row` of `logits` (unless it is `chosen`), and find out whether the sequence goes on."""
        if chosen is None:
            self.take(sequence, lambda: self._choose(sequence, logits, row))
        else:
            self.take(sequence, (lambda: Choice(chosen)) if isinstance(chosen, int) else chosen)

    def advance_rows(self, sequences: list[Sequence], logits: StepLogits, chosen: list[Chosen]) -> None:
        """`advance` for the sequences of a step, each by the row of its slot: the state has grown by the token before.

        Of searches only that is noted. The common case, a `plain` sequence that goes on, is written out here, as every
        microsecond counts as often as there are tokens.
        """
        others: list[tuple[Sequence, Chosen]] = []
        with span("detokenise"):
            self._extend(sequences, chosen, others)
        for sequence, token in others:
            if sequence.slot is not None:  # else a sibling's failure has just ended its request
                self.advance(sequence, logits, sequence.slot, token)

    def _extend(self, sequences: list[Sequence], chosen: list[Chosen], others: list[tuple[Sequence, Chosen]]) -> None:
        """Append the tokens of plain sequences that go on; `others` gets the rest but for searches."""
        now = time.perf_counter()
        for sequence, token in zip(sequences, chosen, strict=True):
            if sequence.slot is None:  # a sibling's failure has just ended its request
                continue
            sequence.num_cached += 1
            tokens, request = sequence.history.tokens, sequence.request
            if (
                not sequence.plain
                or not isinstance(token, int)
                or token in sequence.ends
                or len(tokens) + 1 >= sequence.longest
            ):
                if request.beams is None:
                    others.append((sequence, token))
                continue
            tokens.append(token)
            try:
                text = sequence.detokenizer.push(token)
            except Exception as error:
                self.fail(request, error)
                continue
            sequence.texts.append(text)
            metrics = request.metrics
            metrics.last_token = now
            metrics.num_output_tokens += 1
            self.num_tokens += 1
            if request.emit is not None:
                self._send(request, StreamPiece(text, [token], sequence.index))

    def take(self, sequence: Sequence, pick: Callable[[], Choice]) -> bool:
        """The next token is what `pick` chooses; whether the sequence goes on.

        Whatever fails here (NaN logits, a grammar, a detokenizer) is of this request alone, and ends it alone.
        """
        try:
            self._next_token(sequence, pick)
        except Exception as error:
            self.fail(sequence.request, error)
        return sequence.finish_reason is None

    def _choose(self, sequence: Sequence, logits: StepLogits, row: int) -> Choice:
        params = sequence.params
        choice = choose_from_step(logits, row, params, sequence.generator, asked_now(sequence))
        return choice or choose(logits.row(row), params, sequence.generator, sequence.history)

    def _next_token(self, sequence: Sequence, pick: Callable[[], Choice]) -> None:
        params, history = sequence.params, sequence.history
        with span("sample"):
            choice = pick()
        self._accept(sequence, choice.token, self._note_logprobs(sequence, choice))
        # Log-probabilities of forced tokens need a step for each; so do states that take no chunks.
        if params.logprobs is None and self.backend.chunked and self.backend.recompute_at is None:
            while sequence.finish_reason is None and (forced := list(history.forced())):
                for token in forced:
                    if sequence.finish_reason is None:
                        self._accept(sequence, token, None)

    def _accept(self, sequence: Sequence, token: int, logprobs: list[dict[int, Logprob]] | None) -> None:
        """`token` is the next of the output: show what it says, and find out whether the sequence goes on."""
        params = sequence.params
        early = sequence.num_output < (params.min_tokens or 0)
        self._count(sequence)
        sequence.history.append(token)
        if token in sequence.ends:
            reason = token if token in params.stop_token_ids else None
            self.finish(sequence, "stop", reason, sequence.stop.push(sequence.detokenizer.finish()), logprobs)
            return
        with span("detokenise"):
            text = sequence.detokenizer.push(token)
        shown = text if early else sequence.stop.push(text)
        grammar = sequence.history.grammar()
        if sequence.stop.matched is not None:
            self.finish(sequence, "stop", sequence.stop.matched, shown, logprobs)
        elif grammar is not None and grammar.finished:
            self.finish(sequence, "stop", None, shown, logprobs)
        elif len(sequence.tokens) >= sequence.longest:
            self.finish(sequence, "length", None, shown, logprobs)
        else:
            self.emit(sequence, shown, [token], logprobs)

    def _count(self, sequence: Sequence) -> None:
        metrics, now = sequence.request.metrics, time.perf_counter()
        metrics.first_token = metrics.first_token or now
        metrics.last_token = now
        metrics.num_output_tokens += 1
        self.num_tokens += 1

    def _note_logprobs(self, sequence: Sequence, choice: Choice) -> list[dict[int, Logprob]] | None:
        if choice.logprob is None:
            return None
        entry = self.entry(choice)
        sequence.logprobs.append(entry)
        sequence.cumulative_logprob += choice.logprob
        return [entry]

    def note_prompt_logprobs(self, sequence: Sequence, logits: np.ndarray, start: int) -> None:
        """Entries of the prompt's tokens start + 1 … from the logits [n, vocab] at start …; each position once."""
        known, prompt = sequence.request.prompt_logprobs, sequence.request.prompt_ids
        assert known is not None
        for row, position in zip(logits, range(start + 1, len(prompt)), strict=False):
            if position == len(known):  # a sibling that prefills again finds them there
                values = np.ascontiguousarray(row, dtype=np.float32)
                known.append(self.entry(with_logprobs(values, prompt[position], sequence.params.prompt_logprobs or 0)))

    def entry(self, choice: Choice) -> dict[int, Logprob]:
        """A position's log-probabilities by token, that of the one chosen included."""
        assert choice.logprob is not None
        entry = {t: Logprob(p, rank, self.tokenizer.token(t)) for rank, (t, p) in enumerate(choice.top or [], 1)}
        entry[choice.token] = Logprob(choice.logprob, choice.rank, self.tokenizer.token(choice.token))
        return entry

    def finish(
        self,
        sequence: Sequence,
        reason: str,
        stop_reason: int | str | None,
        text: str,
        logprobs: list[dict[int, Logprob]] | None = None,
        new: bool = True,
    ) -> None:
        """End `sequence` and show its last `text`; `new`: with a token that was not shown yet."""
        if sequence.stop.matched is None and reason != "abort":
            text += sequence.stop.push(sequence.detokenizer.finish())  # a late flush may still complete a stop string
            if sequence.stop.matched is None:
                text += sequence.stop.finish()
            else:
                reason, stop_reason = "stop", sequence.stop.matched
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence.request.session is not None:
            sequence.request.session.keep(self.backend, sequence)
        self.scheduler.drop(sequence)
        request = sequence.request
        if request.ended:
            request.prompt_logits = None
            request.metrics.finished = time.perf_counter()
        self.emit(sequence, text, sequence.output_ids[-1:] if new else [], logprobs)
        if request.undecided and request.ended:
            for piece in decide(request):
                self._send(request, piece)

    def emit(self, sequence: Sequence, text: str, ids: list[int], logprobs: list[dict[int, Logprob]] | None) -> None:
        """Show new text and tokens."""
        sequence.texts.append(text)
        request = sequence.request
        if request.emit is not None and not request.undecided:
            metrics = request.metrics if sequence.finish_reason is not None and request.finished else None
            piece = StreamPiece(
                text, ids, sequence.index, sequence.finish_reason, sequence.stop_reason, logprobs, metrics
            )
            self._send(request, piece)

    @staticmethod
    def _send(request: Request, piece: StreamPiece) -> None:
        """Hand `piece` over. A receiver that fails (its event loop is closed) ends its own request alone."""
        if request.emit is None:
            return
        try:
            request.emit(piece)
        except Exception:
            request.emit, request.cancelled = None, True

    def fail(self, request: Request, error: BaseException) -> None:
        """End `request` with `error`, which its caller gets."""
        request.error = error
        request.prompt_logits = None
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                self.scheduler.drop(sequence)
        request.metrics.finished = time.perf_counter()
        if request.emit is not None:
            self._send(request, StreamPiece("", [], 0, "abort"))
