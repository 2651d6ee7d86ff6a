"""More requests than the state's memory holds: who waits, that all end, and that each says what it says alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from llmx.runtime import LLM, ContextLengthError, RequestError, SamplingParams, Speculation, load_manifest
from llmx.runtime.engine import Engine
from llmx.runtime.grammar import GrammarCompiler
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.outputs import StreamPiece
from llmx.runtime.scheduler import Request
from llmx.runtime.speculation import Guess
from llmx.runtime.speculator import Speculator
from llmx.runtime.state import StatePool, plan_state
from llmx.runtime.tokenizer import Tokenizer
from test_traffic import CHUNK, LENGTH, SLOTS, Model, Traffic, make_speculator
from zoo.models import VOCAB, write_tokenizer


class Crowd(Traffic):
    """`Traffic` in less memory than its slots could fill: bounds from one whole sequence on, in blocks of some positions."""

    @initialize(
        guesser=st.sampled_from([None, None, "lookup", "draft"]),
        spare=st.integers(0, LENGTH // 2),
        block=st.sampled_from([1, 3, 8]),
        cached=st.sampled_from([0, 5 * CHUNK * 8]),
        rewinds=st.booleans(),
    )
    def start(self, guesser: str | None, spare: int, block: int, cached: int, rewinds: bool) -> None:
        blocks = -(-LENGTH // block) + SLOTS - 1 + spare // block
        backend = Model(SLOTS, LENGTH, VOCAB, rewinds or guesser is not None, blocks * block, block)
        speculator = make_speculator(guesser, backend)
        self.draws = guesser != "draft"
        self.engine = Engine(backend, self.tokenizer, CHUNK, prefix_cache_bytes=cached, speculator=speculator)
        self.engine.grammars = self.grammars
        self.requests: list[tuple[Request, list[str]]] = []

    @rule(
        prompt=st.lists(st.integers(1, 30), min_size=1, max_size=20),
        length=st.integers(20, 44),
        n=st.sampled_from([1, 1, 1, 3]),
        seed=st.sampled_from([None, 0, 7]),
        form=st.sampled_from([None, None, {"regex": "((abcd|bcde)x){3,9}"}]),
    )
    def arrive_for_long(self, prompt: list[int], length: int, n: int, seed: int | None, form: Any) -> None:
        options = {} if form else {"ignore_eos": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
        self.arrive(prompt, [1], length, seed, n=n, form=form, logprobs=None, stop=None, **options)


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    Traffic.tokenizer = Tokenizer.load(folder, TokenizerInfo(eos_token_ids=[0]))
    Traffic.grammars = GrammarCompiler(Traffic.tokenizer, VOCAB)


def make_engine(positions: int, slots: int = 3, length: int = 24, cached: int = 0, block: int = 1) -> Engine:
    backend = Model(slots, length, VOCAB, kv_positions=positions, kv_block=block)
    return Engine(backend, Traffic.tokenizer, CHUNK, prefix_cache_bytes=cached)


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **options}).resolved({})


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.check_integrity()


def test_the_youngest_waits_and_goes_on_before_those_that_came_later() -> None:
    engine = make_engine(positions=30)
    shown: list[list[StreamPiece]] = [[] for _ in range(4)]
    requests = [engine.add(None, [1, 2, 3, 4, 5 + i], greedy(max_tokens=15), shown[i].append) for i in range(4)]
    ended: list[int] = []
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        ended += [i for i, r in enumerate(requests) if r.finished and i not in ended]
    assert ended == [0, 1, 2, 3]
    assert requests[0].metrics.num_preemptions == 0
    assert engine.scheduler.num_preempted == sum(r.metrics.num_preemptions for r in requests) > 1
    for request, pieces in zip(requests, shown, strict=True):
        assert [t for piece in pieces for t in piece.token_ids] == request.sequences[0].output_ids
        assert request.sequences[0].output_ids == Model(1, 24, VOCAB).greedy(request.prompt_ids, 15)


def test_what_was_computed_is_taken_back_from_the_memory_of_the_prefix_cache() -> None:
    steps = []
    for cached in (0, 100 * 8):
        engine = make_engine(positions=28, slots=2, cached=cached)
        requests = [engine.add(None, [1, 2, 3, 4, 5 + i], greedy(max_tokens=15)) for i in range(2)]
        run(engine)
        assert requests[1].metrics.num_preemptions == 1
        assert requests[1].metrics.num_cached_tokens == (
            4 if cached else 0
        )  # of the other's prompt, not of its own again
        if engine.prefix_cache is not None:
            assert (
                not engine.prefix_cache._parked
                and engine.prefix_cache.num_bytes == len(engine.prefix_cache) * CHUNK * 8
            )
        steps.append(engine.backend.num_decodes)  # type: ignore[attr-defined]
    assert steps[1] < steps[0]


def test_a_cancelled_request_leaves_the_queue_and_what_was_kept_for_it() -> None:
    engine = make_engine(positions=28, slots=2, cached=100 * 8)
    first, second = (engine.add(None, [1, 2, 3, 4, 5 + i], greedy(max_tokens=15)) for i in range(2))
    while not engine.scheduler.num_preempted:
        engine.step()
    assert engine.prefix_cache is not None and len(engine.prefix_cache._parked) == 1
    engine.cancel(second)
    engine.step()
    engine.check_integrity()
    assert second.finished and second.sequences[0].num_output > 1 and not engine.prefix_cache._parked
    run(engine)
    assert first.sequences[0].num_output == 15


def test_beams_go_together_and_come_back_together() -> None:
    def search(engine: Engine) -> list[list[int]]:
        other = engine.add(None, [9, 8, 7], greedy(max_tokens=18))
        request = engine.add(None, [1, 2, 3], greedy(max_tokens=12, num_beams=2))
        run(engine)
        assert request.error is None and other.error is None
        return [s.output_ids for s in [*request.sequences, *other.sequences]]

    small = make_engine(positions=36)
    assert search(small) == search(make_engine(positions=3 * 24))
    assert small.scheduler.num_preempted == 2


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("prompt", [6, 9])
@pytest.mark.parametrize("cached", [0, 14 * 8, 100 * 8])
def test_beams_that_come_back_at_different_steps_wait_for_each_other(beams: int, prompt: int, cached: int) -> None:
    """Each computes the prompt by itself, and some find their output kept and some not."""

    def search(engine: Engine) -> list[Any]:
        engine.add(None, [9, 8, 7], greedy(max_tokens=18))
        request = engine.add(None, list(range(1, prompt + 1)), greedy(max_tokens=10, num_beams=beams, n=beams))
        run(engine)
        assert request.error is None
        return [(s.output_ids, s.score) for s in request.sequences]

    positions = (prompt + 11) * beams + 5 - beams  # the search alone fits
    small = make_engine(positions, slots=5, cached=cached)
    assert search(small) == search(make_engine(5 * 24, slots=5))
    assert small.scheduler.num_preempted >= beams


class Guesses:
    """Guesses for the sequences of one request alone."""

    steady = True
    request: Any = None

    def propose(self, wanted: list[tuple[Any, int]]) -> list[list[Guess]]:
        return [[Guess(1)] if sequence.request is self.request else [] for sequence, _ in wanted]

    def close(self) -> None:
        pass


def breaks(token: int) -> str:
    raise ValueError("broken")


@pytest.mark.parametrize("where", ["a fork", "a pass over many", "a pass over one", "beside what comes back"])
def test_a_fault_ends_its_request_alone_siblings_in_the_same_step_included(where: str) -> None:
    backend = Model(5, 48, VOCAB, kv_positions=81)
    backend.verifies_batches = where == "a pass over many"
    guesses = Guesses()
    speculator = Speculator(Speculation(prompt_lookup=True, num_tokens=1), backend, guesses)
    engine = Engine(backend, Traffic.tokenizer, CHUNK, speculator=speculator)
    others = [engine.add(None, list(range(1, 21)), greedy(max_tokens=16))]
    request = guesses.request = engine.add(None, [1, 2, 3], greedy(max_tokens=40, n=3 if where == "a fork" else 2))
    one, two = request.sequences[:2]
    if where == "beside what comes back":
        while two.slot is None or not two.replaying:
            engine.step()
    others.append(engine.add(None, [4, 4, 5], greedy(max_tokens=20)))
    while where != "a fork" and not (two.num_output and others[-1].sequences[0].num_output):
        engine.step()
    assert two.replaying == (where == "beside what comes back") and one.finish_reason is None
    broken = two if where == "a fork" else one
    broken.detokenizer.push = breaks  # type: ignore[method-assign]
    run(engine)
    assert str(request.error) == "broken"
    for other in others:
        assert other.error is None
        output = other.sequences[0].output_ids
        assert output == Model(1, 48, VOCAB).greedy(other.prompt_ids, len(output)) and len(output) in (16, 20)


def test_an_output_too_large_to_keep_costs_no_prefix() -> None:
    kept = []
    for cached in (6 * 8, 8 * 8):
        engine = make_engine(positions=28, slots=2, cached=cached)
        for i in range(2):
            engine.add(None, [1, 2, 3, 4, 5 + i], greedy(max_tokens=15))
        while not engine.scheduler.num_preempted:
            engine.step()
        assert engine.prefix_cache is not None
        kept.append((len(engine.prefix_cache), len(engine.prefix_cache._parked)))
    assert kept == [(1, 0), (0, 1)]


def test_what_can_never_run_is_refused() -> None:
    engine = make_engine(positions=30)
    with pytest.raises(ContextLengthError, match="24 tokens and the context holds 24"):
        engine.add(None, [1] * 24, greedy(max_tokens=1))
    with pytest.raises(RequestError, match=r"3 beams of up to 20 tokens each do not fit into the 30 positions"):
        engine.add(None, [1] * 8, greedy(max_tokens=12, num_beams=3))
    engine.add(None, [1] * 7, greedy(max_tokens=2, num_beams=3))
    run(engine)


def test_plans(demo: Path) -> None:
    manifest = load_manifest(demo)
    per_token = manifest.state_bytes_per_token()
    budget = plan_state(manifest, 200, 4, free=10**9, bound=per_token * 500).budget
    assert budget is not None and budget.positions <= 500 < budget.positions + budget.block
    assert budget.block_bytes == budget.block * per_token and budget.of(1) == budget.of(budget.block) == 1
    assert plan_state(manifest, 200, 4, free=10**9, bound=per_token * 4096).budget is None  # enough for all
    assert (
        plan_state(manifest, None, 4, free=10**9, bound=per_token * 500).max_length
        == 500 // budget.block * budget.block - 3 * budget.block
    )
    with pytest.raises(RequestError, match="kv_cache_memory_bytes is .* must hold a sequence of max_length 600"):
        plan_state(manifest, 600, 4, free=10**9, bound=per_token * 500)


def resident(pool: StatePool) -> int:
    """Bytes of the pool's buffers that are in memory."""
    start, end = pool._buffers[0].ctypes.data, pool._buffers[-1].ctypes.data + pool._buffers[-1].nbytes
    total, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if ":" not in line.split()[0] and rest:
            low, high = int(first, 16), int(rest.split()[0], 16)
            within = low < end and start < high
        elif within and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_the_demo_model_says_the_same_in_half_the_memory(demo: Path) -> None:
    """Draws, penalties, forms, stop strings, continuations and log-probabilities, to the last bit; and what is resident."""
    generator = np.random.default_rng(4)
    forms: list[Any] = [None, None, None, {"regex": "( the (sea|sky|king)[.,]?){9}"}]
    wanted: list[tuple[list[int], SamplingParams]] = []
    for index in range(12):
        form = forms[index % len(forms)]
        options: dict[str, Any] = {} if form else {"ignore_eos": True, "logprobs": 3}
        options |= {"stop": [" not"]} if index % 4 == 2 else {}
        options |= {"n": 2} if index % 5 == 4 else {}
        options |= {"repetition_penalty": 1.2} if index % 4 == 1 else {}
        params = SamplingParams(
            max_tokens=int(generator.integers(90, 130)), temperature=0.9 if index % 3 else 0.0, seed=index,
            structured_outputs=form, **options,
        )  # fmt: skip
        wanted.append((generator.integers(3, 1000, int(generator.integers(4, 30))).tolist(), params.resolved({})))
    bound = load_manifest(demo).state_bytes_per_token() * 480  # 15 blocks of 32 positions
    with LLM(demo, slots=1, max_length=160) as alone:
        expected = [alone.generate([prompt], params)[0] for prompt, params in wanted]
    sizes: dict[str, Any] = {"slots": 6, "max_length": 160, "prefill_chunk": 16, "kv_cache_memory_bytes": bound}
    for cached in (0, 1 << 20):
        with LLM(demo, prefix_cache_bytes=cached, **sizes) as llm:
            engine, pool = llm.engine, llm.backend._state  # type: ignore[attr-defined]
            requests = [engine.add(None, prompt, params) for prompt, params in wanted]
            most = 0
            for step in itertools.count():
                if not engine.has_work:
                    break
                engine.step()
                engine.check_integrity()
                most = max(most, 0 if step % 8 else resident(pool))
            assert engine.scheduler.num_preempted > 4
            assert bound // 2 < most <= bound <= pool.plan.bytes // 2
            assert resident(pool) <= 6 * 32 * pool.plan.bytes // (6 * 160)  # idle rows wrote at their first positions
        for request, single in zip(requests, expected, strict=True):
            assert request.error is None
            for sequence, output in zip(request.sequences, single.outputs, strict=True):
                assert (sequence.output_ids, sequence.text) == (output.token_ids, output.text)
                assert (sequence.finish_reason, sequence.stop_reason) == (output.finish_reason, output.stop_reason)
                assert request.params.logprobs is None or sequence.logprobs == output.logprobs


def test_a_session_keeps_what_it_said_where_it_was_preempted_and_left(demo: Path) -> None:
    bound = load_manifest(demo).state_bytes_per_token() * 200
    with LLM(demo, slots=2, max_length=128, kv_cache_memory_bytes=bound) as llm:
        llm.engine.add(None, [5] * 20, greedy(max_tokens=100))
        session = llm.session()
        session.append([7] * 20)
        stream = session.stream(greedy(max_tokens=100))
        while not llm.engine.scheduler.num_preempted:
            next(stream)
        said = len(session._request.sequences[0].output_ids)  # type: ignore[union-attr]
        stream.close()
        assert said > 10 and len(session.append([]).tokens) == 20 + said


def test_scoring_gives_its_memory_back(demo: Path) -> None:
    bound = load_manifest(demo).state_bytes_per_token() * 200
    with LLM(demo, slots=2, max_length=128, kv_cache_memory_bytes=bound) as llm:
        llm.score([5] * 120)
        assert resident(llm.backend._state) == 0  # type: ignore[attr-defined]
