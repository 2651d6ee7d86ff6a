"""Who steps, who waits, and how it ends: closing, failing receivers, forks, the engine at rest, dropped streams."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llmx.runtime import LLM, AsyncLLM, ClosedError, LlmxError, RequestError, SamplingParams
from llmx.runtime.driver import Driver
from llmx.runtime.engine import Engine

LONG = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def in_time(work: Callable[[], object], seconds: float = 30) -> None:
    """Run `work` in a thread; fail where it does not return."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "still waiting"
    if errors:
        raise errors[0]


def test_async_closing_answers_running_and_queued(demo: Path) -> None:
    async def work() -> None:
        aio = AsyncLLM(demo, slots=1)

        async def stream() -> int:
            return len([piece async for piece in aio.stream("ROMEO:", LONG)])

        tasks = [asyncio.create_task(w) for w in (aio.generate("A", LONG), stream(), aio.generate("B", LONG), stream())]
        while not aio.llm.engine.scheduler.pool.held():
            await asyncio.sleep(0.001)
        await aio.aclose()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert [type(a) for a in answers] == [ClosedError] * 4, answers
        await aio.aclose()

    in_time(lambda: asyncio.run(work()))


def test_a_closed_event_loop_ends_its_own_request_alone(demo: Path) -> None:
    """A loop that dies with a request running must not take the engine's thread with it."""
    aio = AsyncLLM(demo, slots=2)

    async def leave() -> None:
        stream = aio.stream("ROMEO:", LONG)
        await anext(stream)
        leave.kept = stream  # type: ignore[attr-defined]

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()  # without shutdown_asyncgens: the request still runs

    async def next_one() -> None:
        [out] = await asyncio.wait_for(aio.generate("x", SHORT), 20)
        assert len(out.outputs[0].token_ids) == 4
        assert aio._thread.is_alive()
        assert aio.llm.engine.scheduler.pool.held() == []
        await aio.aclose()

    in_time(lambda: asyncio.run(next_one()))


def test_a_bug_in_a_step_reaches_its_callers_and_the_engine_goes_on(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with AsyncLLM(demo, slots=2) as aio:
            original = aio.llm.backend.decode
            monkeypatch.setattr(aio.llm.backend, "decode", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await aio.generate("x", SHORT)
            monkeypatch.setattr(aio.llm.backend, "decode", original)
            assert len((await aio.generate("x", SHORT))[0].outputs[0].token_ids) == 4

    in_time(lambda: asyncio.run(work()))


def test_an_interrupted_step_leaves_nothing_behind(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(demo, slots=2) as llm:
        expected = llm.generate("x", SHORT)[0].outputs[0].token_ids
        original = llm.backend.decode

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(llm.backend, "decode", interrupt)
        other = llm.stream("y", LONG)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("x", SHORT)
        monkeypatch.setattr(llm.backend, "decode", original)
        llm.engine.scheduler.pool.check_integrity()
        assert llm.engine.scheduler.pool.held() == []
        with pytest.raises(LlmxError, match="was interrupted"):
            next(other)
        assert llm.generate("x", SHORT)[0].outputs[0].token_ids == expected


def _close_in_child(llm: LLM, stream: object, answers: object) -> None:
    llm.close()
    try:
        next(stream)  # type: ignore[call-overload]
    except ClosedError as error:
        answers.put(str(error))  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_in_the_middle_of_a_step_neither_hangs_nor_steps(demo: Path) -> None:
    context = multiprocessing.get_context("fork")
    with LLM(demo, slots=1) as llm:
        stream = llm.stream("ROMEO:", LONG)
        stepping = threading.Thread(target=lambda: llm.generate("x", LONG))
        stepping.start()
        while not llm._driver._busy:
            time.sleep(0.0005)
        answers = context.Queue()
        with llm._driver._turn:  # held at the fork, as it may be
            child = context.Process(target=_close_in_child, args=(llm, stream, answers))
            child.start()
        assert "before a fork" in answers.get(timeout=20)
        child.join(10)
        stream.close()
        stepping.join(60)
        assert not stepping.is_alive()


def test_scores_are_not_starved_by_generation(demo: Path) -> None:
    with LLM(demo, slots=2) as llm:
        expected = llm.score("ROMEO:\nO")[0]
        stop = threading.Event()

        def keep_busy() -> None:
            while not stop.is_set():
                llm.generate("x", SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))

        busy = [threading.Thread(target=keep_busy) for _ in range(4)]
        scores: list[list[float]] = []
        scoring = [threading.Thread(target=lambda: scores.extend(llm.score(["ROMEO:\nO"] * 3))) for _ in range(3)]
        for thread in busy + scoring:
            thread.start()
        for thread in scoring:
            thread.join(30)
        late = any(thread.is_alive() for thread in scoring)
        stop.set()
        for thread in busy + scoring:
            thread.join(60)
        assert not late
        assert scores == [expected] * 9


def test_waiting_for_rest_does_not_spin() -> None:
    class Idle(Engine):
        def __init__(self) -> None:
            pass

        has_work = True  # something is queued that may not be admitted

        class scheduler:  # noqa: N801
            room = None

            class pool:  # noqa: N801
                @staticmethod
                def held() -> list[object]:
                    return []

        def step(self, admit: bool = True) -> None:
            raise AssertionError("stepped at rest")

    driver = Driver()
    driver.engine = Idle()
    done = threading.Event()
    waiter = threading.Thread(target=lambda: driver.drive(done.is_set))
    with driver.at_rest():
        used = time.process_time()
        waiter.start()
        time.sleep(0.3)
        assert time.process_time() - used < 0.15
        done.set()
    waiter.join(10)
    assert not waiter.is_alive()


@pytest.mark.parametrize("ids", [[], [-1, 5], [5, 10**6]])
def test_scores_check_token_ids(demo: Path, ids: list[int]) -> None:
    with LLM(demo) as llm, pytest.raises(RequestError, match="token"):
        llm.score([ids])


@pytest.mark.parametrize("prompt", [b"abc", {"a": 1}, 5, None, [True, False], [[1, True]], [b"x"], [{1: 2}], [None]])
def test_what_is_no_prompt_is_refused(demo: Path, prompt: object) -> None:
    with LLM(demo) as llm:
        for call in (llm.generate, llm.score):
            with pytest.raises(RequestError, match="text or a list of token ids"):
                call(prompt)  # type: ignore[operator]


def test_a_stream_that_was_never_begun_frees_its_slot(demo: Path) -> None:
    with LLM(demo, slots=1) as llm:
        for drop in (lambda s: s.close(), lambda s: None):
            stream = llm.stream("ROMEO:", LONG)
            drop(stream)
            del stream
            gc.collect()
            assert len(llm.generate("x", SHORT)[0].outputs[0].token_ids) == 4
            assert llm.engine.scheduler.pool.held() == []


# -- time limits and cancelling -----------------------------------------------------------------------------------------


def test_max_time_ends_a_request_with_what_it_has(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(demo, slots=2) as llm:
        original = llm.backend.decode

        def slow(*args: Any) -> Any:
            time.sleep(0.02)
            return original(*args)

        monkeypatch.setattr(llm.backend, "decode", slow)
        whole = llm.generate("x", replace(LONG, max_tokens=40))[0].outputs[0]
        begin = time.perf_counter()
        pieces = list(llm.stream("x", replace(LONG, max_time=0.3)))
        assert 0.3 <= time.perf_counter() - begin < 5
        ids = [token for piece in pieces for token in piece.token_ids]
        assert 1 <= len(ids) < 16
        assert ids == whole.token_ids[: len(ids)]
        assert "".join(piece.text for piece in pieces) == llm.tokenizer.decode(ids)
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("length", "max_time")
        assert llm.engine.scheduler.pool.held() == []
        [beams] = llm.generate("x", replace(LONG, num_beams=2, n=2, max_time=0.3))
        for each in beams.outputs:
            assert 1 <= len(each.token_ids) < 16
            assert (each.finish_reason, each.stop_reason) == ("length", "max_time")
        # enough time changes nothing, and the others of a batch go on
        [cut, free] = llm.generate(["x", "x"], [replace(LONG, max_time=0.3), replace(LONG, max_tokens=40, max_time=60)])
        assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("length", "max_time")
        assert free.outputs[0].token_ids == whole.token_ids
        assert (free.outputs[0].finish_reason, free.outputs[0].stop_reason) == ("length", None)


def test_max_time_counts_the_wait_for_a_slot(demo: Path) -> None:
    with LLM(demo, slots=1) as llm:
        first = llm.stream("x", LONG)
        next(first)
        [late] = llm.generate("y", SamplingParams(max_tokens=5, max_time=0.001))
        assert late.outputs[0].token_ids == [] and late.outputs[0].text == ""
        assert (late.outputs[0].finish_reason, late.outputs[0].stop_reason) == ("length", "max_time")
        assert first.__next__().finish_reason is None
        first.close()


def test_cancelling_from_another_thread(demo: Path) -> None:
    with LLM(demo, slots=2) as llm:
        stream, begun = llm.stream("x", replace(LONG, n=2)), threading.Event()
        other = llm.stream("y", replace(LONG, max_tokens=60))

        def cancel() -> None:
            begun.wait(20)
            stream.cancel()
            stream.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        pieces = []
        for piece in stream:  # this thread waits for pieces all along
            pieces.append(piece)
            begun.set()
        thread.join()
        ends = [piece.finish_reason for piece in pieces if piece.finish_reason]
        assert ends == ["abort", "abort"]
        assert pieces[-1].metrics is not None
        assert len(pieces) < 1600
        assert len([token for piece in other for token in piece.token_ids]) == 60
        assert llm.engine.scheduler.pool.held() == [] and not llm.engine.scheduler.waiting
        with pytest.raises(StopIteration):
            next(stream)


def test_closing_tells_wakers_without_its_lock(demo: Path) -> None:
    """Who submits takes it as well, and a waker may wait for what is being submitted."""
    llm = LLM(demo, slots=1)
    stream = llm.stream("x", LONG)
    next(stream)
    found: list[bool] = []

    def wake() -> None:
        other = threading.Thread(target=llm._driver.wake, daemon=True)
        other.start()
        other.join(2)
        found.append(not other.is_alive())

    llm.engine.add_waker(wake)
    llm.close()
    assert found and all(found)
