"""Which request runs when. Plain data: touches no arrays, no onnxruntime."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmx.runtime.history import History
from llmx.runtime.kv_budget import KVRoom
from llmx.runtime.outputs import Logprob, RequestMetrics, StreamPiece
from llmx.runtime.params import SamplingParams
from llmx.runtime.stopping import StopChecker


@dataclass(eq=False)
class Sequence:
    """One continuation of a request's prompt, and where it stands.

    Invariant while it holds a slot: the slot's first `num_cached` positions hold the state of `tokens[:num_cached]`;
    a decoding sequence has exactly one token (the last) that is not cached yet.
    """

    request: Request
    index: int
    params: SamplingParams
    generator: Any
    detokenizer: Any
    stop: StopChecker
    history: History
    asks: float = -1.0  # what a decode step is told that this sequence needs of its row (`Backend.decode`)
    whole_until: float = 0  # outputs shorter than that need the whole row instead (`restricted_until`)
    ends: frozenset[int] = frozenset()  # tokens that end it
    longest: int = 0  # tokens, prompt and output, at which it ends
    plain: bool = False  # nothing but `ends` and `longest` ends it, and a piece is a token and its text
    slot: int | None = None
    num_cached: int = 0
    order: int = 0  # in which order sequences arrived
    turn: int = 0  # in which order they got their slots
    parked: bool = False  # holds a slot and runs nothing: a beam that waits for the prompt's state
    speculation: Any = None  # a Progress, where guesses are made
    replay_to: int = 0  # positions that had been computed when it was preempted: up to there its tokens are known
    passes: dict[int, int] = field(
        default_factory=dict
    )  # of the output's positions, those that one pass computed: start -> end
    recomputed: bool = False  # the slot's state is no longer what the prompt alone would make
    texts: list[str] = field(default_factory=list)  # the output's text, piece by piece
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    score: float | None = None  # a finished beam's
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        """The output's text so far."""
        return "".join(self.texts)

    @property
    def tokens(self) -> list[int]:
        """Prompt and output; changed through `history` alone."""
        return self.history.tokens

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        return self.history.num_output

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def prefilling(self) -> bool:
        return self.num_cached < self.num_prompt

    @property
    def replaying(self) -> bool:
        """Whether the state of tokens that are known already is computed again."""
        return self.num_cached < self.replay_to


@dataclass(eq=False)
class Request:
    """A prompt with its parameters. `emit` receives each piece of output, from the thread that steps the engine."""

    id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    emit: Callable[[StreamPiece], None] | None = None
    sequences: list[Sequence] = field(default_factory=list)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    source: Any = None  # what an encoder-decoder's encoder reads (an array); `prompt_ids` are its decoder's then
    cancelled: bool = False
    error: BaseException | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    block_keys: list[bytes] | None = None  # names of the prompt's blocks in the prefix cache, once asked for
    prompt_logits: Any = None  # float [vocab] after the prompt, while siblings still wait for it
    session: Any = None  # the Session that it continues
    beams: Any = None  # a BeamGroup: the sequences are its beams until it is done, then its best outputs
    undecided: bool = False  # `best_of`: the sequences are all that are drawn until it is known which are the best
    deadline: float = math.inf  # when its time is up, on the clock of its metrics

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def finished(self) -> bool:
        return self.error is not None or (not self.undecided and self.ended)

    @property
    def ended(self) -> bool:
        """Whether no sequence goes on."""
        return all(s.finish_reason is not None for s in self.sequences)


class SlotPool:
    """Owns the slots: each is free or held by one sequence."""

    def __init__(self, slots: int) -> None:
        self._slots: list[Sequence | None] = [None] * slots
        self._holders: list[Sequence] = []  # in slot order; a new list for each change, as other threads look at it
        #: Changes whenever a slot changes hands.
        self.version = 0
        self._left: set[int] = set()

    def _set(self, slot: int, holder: Sequence | None) -> None:
        self._slots[slot] = holder
        if holder is None:
            self._left.add(slot)
        self._holders = [holder for holder in self._slots if holder is not None]
        self.version += 1

    def acquire(self, sequence: Sequence) -> bool:
        """Give `sequence` the lowest free slot; False where none is free."""
        for slot, holder in enumerate(self._slots):
            if holder is None:
                self._set(slot, sequence)
                sequence.slot = slot
                return True
        return False

    def release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None and self._slots[sequence.slot] is sequence
        self._set(sequence.slot, None)
        sequence.slot = None

    def move(self, sequence: Sequence, slot: int) -> None:
        """`sequence` now lives in the free slot `slot` (its state has been copied there)."""
        assert sequence.slot is not None and self._slots[slot] is None
        self._set(sequence.slot, None)
        self._set(slot, sequence)
        sequence.slot = slot

    def take_left(self) -> set[int]:
        """Slots that a holder has left since this was last asked, whoever has them now."""
        left, self._left = self._left, set()
        return left

    def clear(self) -> None:
        """Free every slot."""
        for slot in range(len(self._slots)):
            self._set(slot, None)

    def held(self) -> list[Sequence]:
        """Holders in slot order. The list stays as it is: after a change there is another one."""
        return self._holders

    @property
    def num_free(self) -> int:
        return len(self._slots) - len(self.held())

    @property
    def num_rows(self) -> int:
        """One more than the highest slot held."""
        held = self.held()
        return 0 if not held or held[-1].slot is None else held[-1].slot + 1

    def check_integrity(self) -> None:
        """Raises AssertionError unless holders and slots name each other."""
        assert self._holders == [holder for holder in self._slots if holder is not None]
        for slot, holder in enumerate(self._slots):
            assert holder is None or holder.slot == slot, f"slot {slot}"
        holders = self.held()
        assert len({id(s) for s in holders}) == len(holders), "one sequence in two slots"


@dataclass(frozen=True)
class PrefillPlan:
    """Run `tokens[start:end]` of the sequence's prompt."""

    sequence: Sequence
    start: int
    end: int

    @property
    def last(self) -> bool:
        return self.end == self.sequence.num_prompt


@dataclass(frozen=True)
class Plan:
    """One step: sequences that gave their slots back, chunks of prompts within the budget, forks of finished prompts, slots to
    move, then one token for each row.
    """

    prefills: list[PrefillPlan]
    forks: list[tuple[Sequence, Sequence]]  # (holder of the prompt's state, its sibling in a new slot)
    moves: list[tuple[Sequence, int]]
    decode: list[Sequence]
    preempted: list[tuple[Sequence, int]] = field(default_factory=list)  # (it waits again, the slot that it had)


class Scheduler:
    """First come, first served: slots go to the oldest waiting sequence, and so do a step's prompt tokens.

    `prefill_chunk` is both a chunk's size and the budget of prompt tokens in a step, beside which all others decode: a
    step takes no longer than that however long the prompts are, so that streams go on. A chunk ends at a multiple of the
    size, wherever the budget would end, so that a prompt is always cut at the same places.

    With `room` sequences hold slots only while their state fits: when it no longer does, the youngest waits again, before all
    that came after it. `waiting` is in order of arrival, and nobody passes its first sequence unless that waits for a
    sibling's state. The oldest of those that run is never preempted, so it comes to its end, whatever else happens.
    """

    def __init__(self, slots: int, prefill_chunk: int, rewinds: bool = True, room: KVRoom | None = None) -> None:
        self.rewinds, self.room = rewinds, room
        self.pool = SlotPool(slots)
        self.waiting: deque[Sequence] = deque()
        self.prefill_chunk = prefill_chunk
        self._orders, self._turns = itertools.count(), itertools.count()
        self._steady: tuple[int, Plan] | None = None  # a plan in which all decode, and the pool's version then
        #: Sequences that have ended so far.
        self.num_dropped = 0
        #: Slots that sequences have given back before their end so far.
        self.num_preempted = 0

    def add(self, request: Request) -> None:
        for sequence in request.sequences:
            sequence.order = next(self._orders)
        self.waiting.extend(request.sequences)

    def drop(self, sequence: Sequence) -> None:
        """Forget a finished sequence wherever it is."""
        self.num_dropped += 1
        self._steady = None
        if sequence.slot is not None:
            self.pool.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def clear(self) -> None:
        """Forget everything, even where a slot and its holder no longer name each other; all requests end with it."""
        for sequence in [*self.waiting, *self.pool.held()]:
            sequence.slot = None
        self.waiting.clear()
        self.pool.clear()

    def check_integrity(self) -> None:
        """Raises AssertionError unless each sequence either waits or holds a slot, and holds no more state than tokens."""
        self.pool.check_integrity()
        assert len({id(s) for s in self.waiting}) == len(self.waiting), "a sequence waits twice"
        assert all(s.slot is None and s.finish_reason is None for s in self.waiting)
        for s in self.pool.held():
            assert s.finish_reason is None and 0 <= s.num_cached <= len(s.tokens), f"slot {s.slot}"
        orders = [s.order for s in self.waiting]
        assert orders == sorted(orders), "not first come, first served"

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.pool.held())

    def plan(self, admit: bool = True) -> Plan:
        """Decide the next step. Slots change hands here (with `admit=False` none is given); state moves when the engine
        executes the plan.
        """
        forks: list[tuple[Sequence, Sequence]] = []
        preempted: list[tuple[Sequence, int]] = []
        if self.room is not None and self.room.left(self.pool.held()) < 0:
            preempted = self._preempt()
        for sequence in list(self.waiting) if admit and self.pool.num_free and not preempted else []:
            if any(s.slot is not None and s.prefilling for s in sequence.request.sequences):
                continue  # its sibling is computing the state that this one will copy
            if sequence.request.beams is not None:
                if not self._seat(sequence.request):
                    break
                continue
            if not (self._admits([sequence]) and self.pool.acquire(sequence)):
                break
            sequence.turn = next(self._turns)
            self.waiting.remove(sequence)
            twin = self._twin(sequence)
            if twin is not None:
                sequence.num_cached = sequence.num_prompt
                forks.append((twin, sequence))
        if self._steady is not None and self._steady[0] == self.pool.version:
            return self._steady[1]  # who decodes goes on decoding for as long as it holds its slot
        moves = self._compaction()
        forked = {id(s) for _, s in forks}
        held = self.pool.held()
        # A sequence without output waits for its twin's prompt logits, which the engine hands it with the fork.
        decoding = [s for s in held if not s.prefilling and s.num_output > 0 and id(s) not in forked]
        plan = Plan(self._prefills(held), forks, moves, decoding, preempted)
        steady = len(decoding) == len(held) and not moves and not preempted
        self._steady = (self.pool.version, plan) if steady else None
        return plan

    def _prefills(self, held: list[Sequence]) -> list[PrefillPlan]:
        """The next chunks of the oldest prompts: one in any case, more while they fit the budget."""
        plans: list[PrefillPlan] = []
        left = self.prefill_chunk
        for sequence in sorted((s for s in held if s.prefilling and not s.parked), key=lambda s: s.turn):
            plan = self.next_chunk(sequence)
            left -= plan.end - plan.start
            if plans and left < 0:
                break
            plans.append(plan)
        return plans

    def next_chunk(self, sequence: Sequence) -> PrefillPlan:
        """What of the sequence's prompt is to be run next."""
        start = sequence.num_cached
        end = (start // self.prefill_chunk + 1) * self.prefill_chunk
        return PrefillPlan(sequence, start, min(sequence.num_prompt, end))

    def _preempt(self) -> list[tuple[Sequence, int]]:
        """Have the youngest wait again until the others have room; a search's beams go together. (Sequence, its slot) of each."""
        assert self.room is not None
        left: list[tuple[Sequence, int]] = []
        while self.room.left(self.pool.held()) < 0:
            youngest = max(self.pool.held(), key=lambda s: s.order)
            request = youngest.request
            for sequence in [youngest] if request.beams is None else request.sequences:
                assert sequence.slot is not None
                left.append((sequence, sequence.slot))
                self.pool.release(sequence)
                self.waiting.insert(sum(s.order < sequence.order for s in self.waiting), sequence)
        self.num_preempted += len(left)
        return left

    def _admits(self, more: list[Sequence]) -> bool:
        return self.room is None or self.room.admits(self.pool.held(), more)

    def _seat(self, request: Request) -> bool:
        """Give all beams of a request slots at once, or none: two half-seated searches would wait for each other."""
        waiting = [s for s in request.sequences if s in self.waiting]
        if self.pool.num_free < len(waiting) or not self._admits(waiting):
            return False
        for sequence in waiting:
            self.pool.acquire(sequence)
            sequence.turn = next(self._turns)
            self.waiting.remove(sequence)
        return True

    def _twin(self, sequence: Sequence) -> Sequence | None:
        """A sibling whose slot already holds the whole prompt's state (and no more, where state cannot be cut back)."""
        if sequence.request.prompt_logits is None and not sequence.num_output:
            return None
        holders = (s for s in sequence.request.sequences if s is not sequence and s.slot is not None)
        whole = (s for s in holders if not s.prefilling and not s.recomputed)
        return next((s for s in whole if self.rewinds or s.num_cached == s.num_prompt), None)

    def _compaction(self) -> list[tuple[Sequence, int]]:
        """Move the highest slots down once half of the rows are idle: rows cost time, copies cost it once."""
        held = self.pool.held()
        if self.pool.num_rows < 2 * len(held) or not held:
            return []
        moves = []
        taken = {s.slot for s in held}
        holes = [slot for slot in range(len(held)) if slot not in taken]
        for sequence, slot in zip([s for s in held if s.slot is not None and s.slot >= len(held)], holes, strict=True):
            moves.append((sequence, slot))
        if self.room is not None and self.room.left(held) < max(self.room.of(s) for s, _ in moves):
            return []  # a copy is there twice while it is made
        return moves
