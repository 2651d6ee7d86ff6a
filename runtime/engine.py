"""The engine: schedule, run, postprocess."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from llmx.runtime.backend import Backend, recompute
from llmx.runtime.beam_requests import advance as advance_beams
from llmx.runtime.beam_requests import check_slots, make_group
from llmx.runtime.best_of import decide, scored
from llmx.runtime.candidate_rows import choose_rows
from llmx.runtime.candidates import WHOLE_ROW, asked, choose_from_step
from llmx.runtime.errors import ContextLengthError, LlmxError, RequestError
from llmx.runtime.grammar import GrammarCompiler
from llmx.runtime.history import History
from llmx.runtime.manifest import Seq2SeqInfo
from llmx.runtime.masks_ahead import MasksAhead
from llmx.runtime.outputs import Logprob, StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.prefix_cache import PrefixCache
from llmx.runtime.rules import make_rules
from llmx.runtime.sampling import Choice, choose, is_restricted, make_generator, with_logprobs
from llmx.runtime.scheduler import Plan, PrefillPlan, Request, Scheduler, Sequence
from llmx.runtime.speculator import Speculator
from llmx.runtime.step_logits import HostLogits, StepLogits
from llmx.runtime.stopping import StopChecker
from llmx.runtime.structured import StructuredOutputsParams
from llmx.runtime.tokenizer import IncrementalDetokenizer, Tokenizer
from llmx.runtime.tracing import span

if TYPE_CHECKING:
    from llmx.runtime.session import Session


class Engine:
    """Runs requests over a backend, one step at a time. `add` and `cancel` may be called from any thread at any time;
    `step` by one thread at a time.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        prefill_chunk: int = 192,
        seq2seq: Seq2SeqInfo | None = None,
        prefix_cache_bytes: int = 0,
        speculator: Speculator | None = None,
    ) -> None:
        self.backend, self.speculator = backend, speculator
        self.seq2seq = seq2seq
        self.tokenizer = tokenizer
        self.grammars = GrammarCompiler(tokenizer, backend.vocab_size)
        self.masks = MasksAhead()
        self.scheduler = Scheduler(
            backend.slots, prefill_chunk if backend.chunked else backend.max_length, backend.rewinds
        )
        self.prefix_cache: PrefixCache | None = None
        if prefix_cache_bytes > 0 and backend.stores_state:
            self.prefix_cache = PrefixCache(backend, self.scheduler.prefill_chunk, prefix_cache_bytes)
        self._arrivals: list[Request] = []
        self._live: list[Request] = []
        self._lock = threading.Lock()
        self._ids = itertools.count()
        #: Tokens generated so far, those of running requests included.
        self.num_output_tokens = 0
        self._ended: Callable[[], LlmxError] | None = None

    def add(
        self,
        prompt: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        emit: Callable[[StreamPiece], None] | None = None,
        source: np.ndarray | None = None,
        session: Session | None = None,
    ) -> Request:
        """Queue a request (`params` resolved); `source` (checked) goes to an encoder-decoder's encoder. Raises RequestError or ContextLengthError at once where it cannot run."""
        self.check_ids(prompt_ids)
        longest = self.backend.max_length
        rules = make_rules(params, self.tokenizer, self.backend.vocab_size, self.seq2seq)
        wanted = params.structured_outputs
        searches = (params.num_beams or 1) > 1
        if searches:
            check_slots(params, self.backend.slots)
        count = (params.num_beams or 1) if searches else params.num_samples
        form = None if wanted is None else StructuredOutputsParams.of(wanted)
        grammars = [None if form is None else self.grammars.compile(form) for _ in range(count)]
        if len(prompt_ids) >= longest:
            raise ContextLengthError(
                f"The prompt has {len(prompt_ids)} tokens and the context holds {longest}, one of them for the answer; "
                "shorten the prompt or raise max_length."
            )
        request = Request(
            f"req-{next(self._ids)}", prompt, list(prompt_ids), params, emit, source=source, session=session
        )
        request.undecided = params.num_samples > params.n
        drawn = scored(params) if request.undecided else params
        context = prompt_ids if source is None else []  # a decoder's prompt is no text that the output goes on from
        for index in range(count):
            seed = None if params.seed is None else (params.seed + index) % 2**64
            request.sequences.append(
                Sequence(
                    request,
                    index,
                    drawn,
                    make_generator(seed),
                    IncrementalDetokenizer(
                        self.tokenizer, context, params.skip_special_tokens, params.keep_special_tokens
                    ),
                    StopChecker(params.stop_strings, params.include_stop_str_in_output),
                    History(prompt_ids, rules, grammars[index]),
                    asks=WHOLE_ROW if searches else asked(drawn),
                )
            )
        if searches:
            request.beams = make_group(self, request)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        request.metrics.arrival = time.perf_counter()
        request.metrics.num_prompt_tokens = len(prompt_ids if source is None or source.ndim > 1 else source)
        with self._lock:
            if self._ended is not None:
                raise self._ended()
            self._arrivals.append(request)
        return request

    def check_ids(self, prompt_ids: list[int]) -> None:
        """Raises RequestError unless there is a token, and all are of the vocabulary."""
        if not prompt_ids:
            raise RequestError("The prompt is empty; give at least one token of text.")
        if min(prompt_ids) < 0 or max(prompt_ids) >= self.backend.vocab_size:
            raise RequestError(f"Prompt token ids must lie between 0 and {self.backend.vocab_size - 1}.")

    def cancel(self, request: Request) -> None:
        """End a request; its slots are free before the next step runs."""
        request.cancelled = True

    @property
    def has_work(self) -> bool:
        return bool(self._arrivals or self._live)

    def step(self, admit: bool = True) -> None:
        """One scheduling round; `admit=False` gives no slot to a request that waits for one.

        A failure ends the requests that it may have touched and is raised to their callers, not here: who steps may be
        another caller. An interrupt (KeyboardInterrupt) leaves the state half-changed, so it ends them too, and is raised.
        """
        try:
            with span("step"):
                self._admit(admit)
                self._execute(self.scheduler.plan(admit))
        except Exception as error:
            ran = [r for r in self._live if any(s.slot is not None for s in r.sequences)]
            self._end(error, ran or self._live)
        except BaseException as error:
            with self._lock:
                arrivals, self._arrivals = self._arrivals, []
            self.scheduler.clear()
            reason = LlmxError(
                f"The step that ran this request was interrupted ({type(error).__name__}); send it again."
            )
            self._end(reason, [*self._live, *arrivals])
            raise
        self._live = [request for request in self._live if not request.finished]

    def end_all(self, kind: type[LlmxError], reason: str) -> None:
        """End every request, running or queued, with `kind(reason)`, and refuse later ones. No step may be in progress."""
        with self._lock:
            self._ended = lambda: kind(reason)
            arrivals, self._arrivals = self._arrivals, []
        for request in [*self._live, *arrivals]:
            self._end(kind(reason), [request])
        self._live = []

    def check_integrity(self) -> None:
        """Raises AssertionError unless every resource has its owner; between steps."""
        self.scheduler.check_integrity()
        running = {id(s) for request in self._live for s in request.sequences if s.finish_reason is None}
        known = [*self.scheduler.pool.held(), *self.scheduler.waiting]
        assert {id(s) for s in known} == running, (
            "a slot or a place of a request that has ended, or none of one that runs"
        )
        if self.prefix_cache is not None:
            self.prefix_cache.check_integrity()

    def _end(self, error: BaseException, requests: list[Request]) -> None:
        for request in list(requests):
            if not request.finished:
                self._fail(request, error)

    def _execute(self, plan: Plan) -> None:
        forked = [sequence for _, sequence in plan.forks]
        for sequence, slot in plan.moves:
            assert sequence.slot is not None
            if sequence.num_cached and sequence not in forked:  # else its slot holds nothing of its own yet
                self.backend.copy_slot(sequence.slot, slot, sequence.num_cached)
            self.scheduler.pool.move(sequence, slot)
        for twin, sequence in plan.forks:
            assert twin.slot is not None and sequence.slot is not None
            self.backend.copy_slot(twin.slot, sequence.slot, sequence.num_prompt)
            self._advance(sequence, HostLogits(sequence.request.prompt_logits[None]), 0)
        for prefill in plan.prefills:
            if prefill.sequence.slot is not None:  # its request may have failed in this very step
                self._prefill(prefill)
        decoding = [s for s in plan.decode if s.slot is not None]
        if decoding:
            self._decode(decoding)

    def _admit(self, arrived: bool) -> None:
        """Take over what has arrived, and end what was cancelled or has used up its time."""
        while arrived and self._arrivals:
            with self._lock:
                request = self._arrivals.pop(0)
            self._live.append(request)
            self.scheduler.add(request)
        now = time.perf_counter()
        for request in self._live:
            if request.cancelled:
                for sequence in request.sequences:
                    if sequence.finish_reason is None:
                        self._finish(sequence, "abort", None, "", new=False)
            elif request.params.max_time is not None and request.beams is None and now >= request.deadline:
                for sequence in request.sequences:
                    if sequence.finish_reason is None:
                        self._finish(sequence, "length", "max_time", "", new=False)
        self._live = [request for request in self._live if not request.finished]

    def _prefill(self, plan: PrefillPlan) -> None:
        sequence, cache = plan.sequence, self.prefix_cache
        last: StepLogits
        assert sequence.slot is not None
        metrics = sequence.request.metrics
        metrics.scheduled = metrics.scheduled or time.perf_counter()
        if sequence.request.session is not None and sequence.num_cached == 0:
            metrics.num_cached_tokens = sequence.num_cached = sequence.request.session.restore(self.backend, sequence)
            plan = self.scheduler.next_chunk(sequence)
        if cache is not None:
            metrics.num_cached_tokens = max(metrics.num_cached_tokens, cache.restore(sequence))
            plan = self.scheduler.next_chunk(sequence)
        tokens = np.array(sequence.tokens[plan.start : plan.end], np.int64)
        scored = sequence.params.prompt_logprobs is not None and sequence.request.prompt_logprobs is not None
        if plan.start == 0 and sequence.request.source is not None:
            with span("encode"):
                self.backend.encode(sequence.slot, sequence.request.source)
        with span("prefill"):
            if plan.last and not scored:
                last = self.backend.prefill_last(
                    sequence.slot, tokens, plan.start, sequence.num_prompt, self._asks(sequence)
                )
            else:
                asked = np.arange(len(tokens) if scored else 0)
                logits = self.backend.prefill(sequence.slot, tokens, plan.start, asked, sequence.num_prompt)
                last = HostLogits(logits[-1:])
        sequence.num_cached = plan.end
        if cache is not None:
            cache.keep(sequence, plan.start, plan.end)
            if plan.last:
                cache.ended(sequence)
        if scored:
            self._note_prompt_logprobs(sequence, logits, plan.start)
        if plan.last and sequence.request.beams is not None:
            advance_beams(self, sequence.request, [last.row(0)])
        elif plan.last:
            if any(s is not sequence and s.finish_reason is None and s.prefilling for s in sequence.request.sequences):
                sequence.request.prompt_logits = last.row(0).copy()
            self._advance(sequence, last, 0)

    def _catch_up(self, sequence: Sequence) -> bool:
        """Run in one chunk the tokens that a grammar has forced; whether there were any."""
        tokens = sequence.tokens
        if sequence.slot is None or sequence.num_cached == len(tokens) - 1:
            return False
        while sequence.num_cached < len(tokens):
            start, end = sequence.num_cached, min(len(tokens), sequence.num_cached + self.scheduler.prefill_chunk)
            last = [end - start - 1] if end == len(tokens) else []
            # each is at its own position what a decode step would make of it, not part of a longer prompt
            with span("prefill"):
                logits = self.backend.prefill(
                    sequence.slot, np.array(tokens[start:end], np.int64), start, np.array(last, np.int64), start + 1
                )
            sequence.num_cached = end
        self._advance(sequence, HostLogits(logits), 0)
        return True

    def _decode(self, sequences: list[Sequence]) -> None:
        behind = [sequence for sequence in sequences if self._catch_up(sequence)]
        sequences = [s for s in sequences if s.slot is not None and s not in behind]
        if not sequences:
            return
        start = time.perf_counter()
        self._decode_rows(sequences)
        if self.speculator is not None and not behind:
            self.speculator.note_step(len(sequences), time.perf_counter() - start)

    def _decode_rows(self, sequences: list[Sequence]) -> None:
        """One token for each of the sequences, or several where guesses stand."""
        rows = self.scheduler.pool.num_rows
        tokens, lengths, active = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(rows, bool)
        temperatures = np.zeros(rows, np.float32)
        for idle in self.scheduler.pool.held():
            # a row in prefill keeps its length: what it writes there is overwritten
            lengths[idle.slot] = min(idle.num_cached, self.backend.max_length - 1)
        if self.speculator is not None:
            rest = self.speculator.run(sequences, lengths, self._take)
            if rest is not sequences:
                sequences = [s for s in rest if s.slot is not None]
                if not sequences:
                    return
                for sequence in self.scheduler.pool.held():
                    lengths[sequence.slot] = min(sequence.num_cached, self.backend.max_length - 1)
        for sequence in sequences:
            if sequence.num_cached == self.backend.recompute_at:
                assert sequence.slot is not None
                cached = np.array(sequence.tokens[: sequence.num_cached], np.int64)
                recompute(self.backend, sequence.slot, cached, self.scheduler.prefill_chunk)
                sequence.recomputed = True
            tokens[sequence.slot] = sequence.tokens[-1]
            lengths[sequence.slot] = sequence.num_cached
            active[sequence.slot] = True
            temperatures[sequence.slot] = self._asks(sequence)
        with span("decode"), self.masks.during([s.history for s in sequences]):
            logits = self.backend.decode(tokens, lengths, active, temperatures)
        with span("sample"):
            choices = choose_rows(
                logits,
                [
                    (s.slot, s.params, s.generator, float(temperatures[s.slot]))
                    for s in sequences
                    if s.slot is not None and s.request.beams is None
                ],
            )
        for sequence in sequences:
            slot = sequence.slot
            if slot is not None:  # else a sibling's failure has just ended its request
                sequence.num_cached += 1
                if sequence.request.beams is None:
                    self._advance(sequence, logits, slot, choices.get(slot))
        for request in {s.request.id: s.request for s in sequences if s.request.beams is not None}.values():
            advance_beams(self, request, [logits.row(beam.slot) for beam in request.beams.beams])

    def _asks(self, sequence: Sequence) -> float:
        """What the next step's row will be asked for (`Backend.decode`'s temperatures)."""
        return WHOLE_ROW if is_restricted(sequence.params, sequence.history) else sequence.asks

    def _advance(self, sequence: Sequence, logits: StepLogits, row: int, choice: Choice | None = None) -> None:
        """Choose the next token from row `row` of `logits` (`choice`, where it was), and find out whether the sequence goes on."""
        self._take(sequence, lambda: choice or self._choose(sequence, logits, row))

    def _take(self, sequence: Sequence, pick: Callable[[], Choice]) -> bool:
        """The next token is what `pick` chooses; whether the sequence goes on.

        Whatever fails here (NaN logits, a grammar, a detokenizer) is of this request alone, and ends it alone.
        """
        try:
            self._next_token(sequence, pick)
        except Exception as error:
            self._fail(sequence.request, error)
        return sequence.finish_reason is None

    def _choose(self, sequence: Sequence, logits: StepLogits, row: int) -> Choice:
        params = sequence.params
        choice = choose_from_step(logits, row, params, sequence.generator, self._asks(sequence))
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
        params, info = sequence.params, self.tokenizer.info
        early = sequence.num_output < (params.min_tokens or 0)
        self._count(sequence)
        sequence.history.append(token)
        if token in params.stop_token_ids or (token in info.eos_token_ids and not params.ignore_eos):
            reason = token if token in params.stop_token_ids else None
            self._finish(sequence, "stop", reason, sequence.stop.push(sequence.detokenizer.finish()), logprobs)
            return
        with span("detokenise"):
            text = sequence.detokenizer.push(token)
        shown = text if early else sequence.stop.push(text)
        full = len(sequence.tokens) >= self.backend.max_length
        grammar = sequence.history.grammar()
        if sequence.stop.matched is not None:
            self._finish(sequence, "stop", sequence.stop.matched, shown, logprobs)
        elif grammar is not None and grammar.finished:
            self._finish(sequence, "stop", None, shown, logprobs)
        elif full or sequence.num_output >= (params.max_tokens or 0):
            self._finish(sequence, "length", None, shown, logprobs)
        else:
            self._emit(sequence, shown, [token], logprobs)

    def _count(self, sequence: Sequence) -> None:
        metrics, now = sequence.request.metrics, time.perf_counter()
        metrics.first_token = metrics.first_token or now
        metrics.last_token = now
        metrics.num_output_tokens += 1
        self.num_output_tokens += 1

    def _note_logprobs(self, sequence: Sequence, choice: Choice) -> list[dict[int, Logprob]] | None:
        if choice.logprob is None:
            return None
        entry = self._entry(choice)
        sequence.logprobs.append(entry)
        sequence.cumulative_logprob += choice.logprob
        return [entry]

    def _note_prompt_logprobs(self, sequence: Sequence, logits: np.ndarray, start: int) -> None:
        """Entries of the prompt's tokens start + 1 … from the logits [n, vocab] at start …; each position once."""
        known, prompt = sequence.request.prompt_logprobs, sequence.request.prompt_ids
        assert known is not None
        for row, position in zip(logits, range(start + 1, len(prompt)), strict=False):
            if position == len(known):  # a sibling that prefills again finds them there
                values = np.ascontiguousarray(row, dtype=np.float32)
                known.append(self._entry(with_logprobs(values, prompt[position], sequence.params.prompt_logprobs or 0)))

    def _entry(self, choice: Choice) -> dict[int, Logprob]:
        assert choice.logprob is not None
        entry = {t: Logprob(p, rank, self.tokenizer.token(t)) for rank, (t, p) in enumerate(choice.top or [], 1)}
        entry[choice.token] = Logprob(choice.logprob, choice.rank, self.tokenizer.token(choice.token))
        return entry

    def _finish(
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
        if sequence.request.session is not None and sequence.slot is not None:
            sequence.request.session.keep(self.backend, sequence)
        self.scheduler.drop(sequence)
        request = sequence.request
        if request.ended:
            request.prompt_logits = None
            request.metrics.finished = time.perf_counter()
        self._emit(sequence, text, sequence.output_ids[-1:] if new else [], logprobs)
        if request.undecided and request.ended:
            for piece in decide(request):
                self._send(request, piece)

    def _emit(self, sequence: Sequence, text: str, ids: list[int], logprobs: list[dict[int, Logprob]] | None) -> None:
        sequence.text += text
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

    def _fail(self, request: Request, error: BaseException) -> None:
        request.error = error
        request.prompt_logits = None
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                self.scheduler.drop(sequence)
        request.metrics.finished = time.perf_counter()
        if request.emit is not None:
            self._send(request, StreamPiece("", [], 0, "abort"))
