"""The engine: schedule, run, postprocess. The stages of a step are in `step_prefill`, `step_decode` and `step_output`."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from llmx.runtime.backend import Backend
from llmx.runtime.beam_requests import check_room, check_slots, make_group
from llmx.runtime.best_of import scored
from llmx.runtime.candidates import WHOLE_ROW, asked
from llmx.runtime.detokenizer import IncrementalDetokenizer
from llmx.runtime.errors import LlmxError, RequestError
from llmx.runtime.grammar import GrammarCompiler
from llmx.runtime.history import History
from llmx.runtime.kv_budget import KVRoom
from llmx.runtime.manifest import Seq2SeqInfo
from llmx.runtime.masks_ahead import MasksAhead
from llmx.runtime.outputs import StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.preemption import give_up, take_back
from llmx.runtime.prefix_cache import PrefixCache
from llmx.runtime.prompts import check_fits
from llmx.runtime.rules import make_rules
from llmx.runtime.sampling import make_generator, restricted_until
from llmx.runtime.scheduler import Plan, Request, Scheduler, Sequence
from llmx.runtime.step_decode import DecodeStage
from llmx.runtime.step_logits import HostLogits
from llmx.runtime.step_output import OutputStage
from llmx.runtime.step_prefill import PrefillStage
from llmx.runtime.stopping import StopChecker
from llmx.runtime.structured import StructuredOutputsParams
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import span

if TYPE_CHECKING:
    from llmx.runtime.session import Session
    from llmx.runtime.speculator import Speculator


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
        self.speculator = speculator
        self.seq2seq = seq2seq
        self.tokenizer = tokenizer
        self.grammars = GrammarCompiler(tokenizer, backend.vocab_size)
        self.masks = MasksAhead()
        room = None
        if backend.kv_budget is not None:
            room = KVRoom(backend.kv_budget, backend.slots, 1 if speculator is None else speculator.most + 2)
        chunk = prefill_chunk if backend.chunked else backend.max_length
        self.scheduler = Scheduler(backend.slots, chunk, backend.rewinds, room)
        self.prefix_cache: PrefixCache | None = None
        if prefix_cache_bytes > 0 and backend.stores_state:
            self.prefix_cache = PrefixCache(backend, self.scheduler.prefill_chunk, prefix_cache_bytes)
        self.output = OutputStage(backend, tokenizer, self.scheduler)
        self._prefill = PrefillStage(backend, self.scheduler, self.prefix_cache, self.masks, self.output)
        self._decode = DecodeStage(backend, self.scheduler, speculator, self.masks, self._prefill)
        self._arrivals: list[Request] = []
        self._live: list[Request] = []
        self._dropped = 0  # sequences that had ended when `_live` was last looked through
        self._lock = threading.Lock()
        self._ids = itertools.count()
        self._ended: Callable[[], LlmxError] | None = None
        self._wakers: tuple[Callable[[], None], ...] = ()

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
            check_room(params, self.scheduler.room, min(longest, len(prompt_ids) + (params.max_tokens or longest)))
        count = params.num_sequences
        form = None if wanted is None else StructuredOutputsParams.of(wanted)
        grammars = [None if form is None else self.grammars.compile(form) for _ in range(count)]
        check_fits(len(prompt_ids), longest)
        request = Request(
            f"req-{next(self._ids)}", prompt, list(prompt_ids), params, emit, source=source, session=session
        )
        request.undecided = params.num_samples > params.n
        drawn = scored(params) if request.undecided else params
        ends = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(self.tokenizer.info.eos_token_ids)
        )
        plain = (
            not (searches or request.undecided or params.stop_strings or form is not None) and params.logprobs is None
        )
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
                    whole_until=restricted_until(drawn, rules),
                    ends=ends,
                    longest=min(longest, len(prompt_ids) + (params.max_tokens or 0)),
                    plain=plain,
                )
            )
        if searches:
            request.beams = make_group(self.output, request)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        request.metrics.arrival = time.perf_counter()
        if params.max_time is not None:
            request.deadline = request.metrics.arrival + params.max_time
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

    def add_waker(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, by the thread that steps, whenever pieces may have been handed over. One that raises is dropped."""
        with self._lock:
            self._wakers = (*self._wakers, wake)

    def remove_waker(self, wake: Callable[[], None]) -> None:
        with self._lock:
            self._wakers = tuple(known for known in self._wakers if known != wake)

    def hand_over(self) -> None:
        """Tell the wakers."""
        for wake in self._wakers:
            try:
                wake()
            except Exception:  # its event loop is closed
                self.remove_waker(wake)

    @property
    def backend(self) -> Backend:
        """What runs the model; another may take its place between two steps."""
        return self.output.backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        for stage in (self.output, self._prefill, self._decode):
            stage.backend = backend

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those of running requests included."""
        return self.output.num_tokens

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
        finally:
            self.hand_over()
        self._forget_ended()

    def end_all(self, kind: type[LlmxError], reason: str) -> None:
        """End every request, running or queued, with `kind(reason)`, and refuse later ones. No step may be in progress, and
        what the requests get is only there once `hand_over` was called, by who holds no lock that who submits may take.
        """
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
                self.output.fail(request, error)

    def _execute(self, plan: Plan) -> None:
        if self.scheduler.room is not None:
            for sequence, slot in plan.preempted:
                give_up(sequence, slot, self.prefix_cache)
            self._free_slots()
        forked = [sequence for _, sequence in plan.forks]
        for sequence, slot in plan.moves:
            assert sequence.slot is not None
            if sequence.num_cached and sequence not in forked:  # else its slot holds nothing of its own yet
                self.backend.copy_slot(sequence.slot, slot, sequence.num_cached)
            self.scheduler.pool.move(sequence, slot)
            self._free_slots()
        for twin, sequence in plan.forks:
            if sequence.slot is None:  # a sibling's failure has just ended its request
                continue
            assert twin.slot is not None
            self.backend.copy_slot(twin.slot, sequence.slot, sequence.num_prompt)
            if sequence.num_output:  # it was preempted, and goes on from its own tokens
                take_back(sequence, self.prefix_cache)
            else:
                self.output.advance(sequence, HostLogits(sequence.request.prompt_logits[None]), 0)
        for prefill in plan.prefills:
            if prefill.sequence.slot is not None:  # its request may have failed in this very step
                self._prefill.run(prefill)
                self.hand_over()
        decoding = plan.decode
        if plan.prefills or plan.forks:
            decoding = [s for s in decoding if s.slot is not None]
        if decoding:
            self._decode.run(decoding)

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
                        self.output.finish(sequence, "abort", None, "", new=False)
            elif now >= request.deadline and request.beams is None:
                for sequence in request.sequences:
                    if sequence.finish_reason is None:
                        self.output.finish(sequence, "length", "max_time", "", new=False)
        self._forget_ended()

    def _forget_ended(self) -> None:
        if self.scheduler.num_dropped != self._dropped:  # else all go on that did
            self._dropped = self.scheduler.num_dropped
            self._live = [request for request in self._live if not request.finished]
            self._decode.forget()
            if self.prefix_cache is not None:
                self.prefix_cache.forget_ended()
            self._free_slots()

    def leave_rest(self) -> None:
        """No slot is held, and slot 0 was used by others than requests: its memory goes back where it is counted."""
        if self.scheduler.room is not None:
            self.backend.free(0)

    def _free_slots(self) -> None:
        """Give back the memory of slots that were left. Where they are allocated whole there is none to give back."""
        if self.scheduler.room is not None:
            for slot in self.scheduler.pool.take_left():
                self.backend.free(slot)
