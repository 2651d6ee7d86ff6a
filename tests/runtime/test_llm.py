"""LLM and AsyncLLM on the demo package: threads, cancellation, closing, forks."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from llmx.runtime import (
    LLM,
    AsyncLLM,
    ClosedError,
    ContextLengthError,
    OutOfMemoryError,
    RequestError,
    RequestOutput,
    SamplingParams,
)

PROMPTS = ["ROMEO:", "JULIET:\nO", "First Citizen:\nBefore we proceed any further", "KING", "All:\n"]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(demo: Path) -> Iterator[LLM]:
    with LLM(demo, slots=3) as loaded:
        loaded.warmup()
        yield loaded


def free(llm: LLM) -> bool:
    return llm.engine.scheduler.pool.held() == [] and not llm.engine.scheduler.waiting


def test_stream_equals_generate(llm: LLM) -> None:
    for prompt in PROMPTS:
        [out] = llm.generate(prompt, GREEDY)
        pieces = list(llm.stream(prompt, GREEDY))
        assert "".join(p.text for p in pieces) == out.outputs[0].text
        assert [i for p in pieces for i in p.token_ids] == out.outputs[0].token_ids
        assert pieces[-1].finish_reason == "length"
        assert pieces[-1].metrics is not None and pieces[-1].metrics.ttft > 0
        assert out.outputs[0].text == llm.tokenizer.decode(out.outputs[0].token_ids)


def test_params_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (1, 5, 9, 2, 7)]
    outs = llm.generate(PROMPTS, params)
    assert [len(o.outputs[0].token_ids) for o in outs] == [1, 5, 9, 2, 7]
    with pytest.raises(RequestError, match="5 prompts and 2"):
        llm.generate(PROMPTS, params[:2])


def test_token_ids_and_text_prompts_agree(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[2])
    [text, tokens] = llm.generate([PROMPTS[2], ids], GREEDY)
    assert text.outputs[0].token_ids == tokens.outputs[0].token_ids
    assert (text.prompt, tokens.prompt) == (PROMPTS[2], None)
    assert llm.generate(ids, GREEDY)[0].prompt_token_ids == ids


@pytest.mark.parametrize("prompt", ["", [[]], [1, 99999], ["a", "b", 3.5], [[1, "x"]]])
def test_bad_prompts(llm: LLM, prompt: object) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
    assert free(llm)


def test_a_bad_request_does_not_run_its_batch(llm: LLM) -> None:
    with pytest.raises(ContextLengthError):
        llm.generate(["fine", "word " * 3000], GREEDY)
    llm.generate("x", SamplingParams(max_tokens=1))
    assert free(llm)


def test_each_request_gets_its_output_or_its_error(llm: LLM) -> None:
    """Refused, failed while it ran, and fine, side by side; the fine ones as they are alone."""
    nothing = SamplingParams(max_tokens=4, allowed_token_ids=[5], bad_words_ids=[[5]])
    outs = llm.generate_each(
        ["fine", "word " * 3000, PROMPTS[0], PROMPTS[1], PROMPTS[2]],
        [GREEDY, GREEDY, nothing, SamplingParams(stop_token_ids=[99_999]), GREEDY],
    )
    assert [type(out) for out in outs] == [
        RequestOutput, ContextLengthError, RequestError, RequestError, RequestOutput,
    ]  # fmt: skip
    assert "No token is left" in str(outs[2]) and "stop_token_ids must lie between 0" in str(outs[3])
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0] for prompt in ("fine", PROMPTS[2])]
    assert [out.outputs[0].token_ids for out in (outs[0], outs[4]) if isinstance(out, RequestOutput)] == [
        output.token_ids for output in alone
    ]
    with pytest.raises(RequestError, match="2 SamplingParams"):
        llm.generate_each(["a"], [GREEDY, GREEDY])
    assert free(llm)


def test_stop_strings_across_tokens(llm: LLM) -> None:
    text = llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].text
    stop = text[5:12]
    [out] = llm.generate(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0.0, stop=[stop]))
    assert out.outputs[0].text == text[: text.index(stop)]
    assert (out.outputs[0].finish_reason, out.outputs[0].stop_reason) == ("stop", stop)
    streamed = "".join(
        p.text for p in llm.stream(PROMPTS[0], SamplingParams(max_tokens=24, temperature=0.0, stop=stop))
    )
    assert streamed == out.outputs[0].text
    kept = SamplingParams(max_tokens=24, temperature=0.0, stop=stop, include_stop_str_in_output=True)
    assert llm.generate(PROMPTS[0], kept)[0].outputs[0].text.endswith(stop)


def test_context_full(llm: LLM) -> None:
    [out] = llm.generate("ROMEO:", SamplingParams(max_tokens=5000, temperature=0.0, ignore_eos=True))
    assert out.outputs[0].finish_reason == "length"
    assert len(out.prompt_token_ids) + len(out.outputs[0].token_ids) == llm.max_length == 1024


def test_threads_share_steps_and_do_not_mix(llm: LLM) -> None:
    expected = {p: llm.generate(p, GREEDY)[0].outputs[0].token_ids for p in PROMPTS}
    failures: list[str] = []

    def work(seed: int) -> None:
        for turn in range(4):
            prompt = PROMPTS[(seed + turn) % len(PROMPTS)]
            if (seed + turn) % 2:
                got = [i for piece in llm.stream(prompt, GREEDY) for i in piece.token_ids]
            else:
                got = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
            if got != expected[prompt]:
                failures.append(prompt)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(t.is_alive() for t in threads)
    assert failures == []
    assert free(llm)


def test_leaving_a_stream_frees_its_slot(llm: LLM) -> None:
    stream = llm.stream("ROMEO:", LONG)
    next(stream)
    stream.close()
    llm.generate("x", SamplingParams(max_tokens=1))
    assert free(llm)


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What news?"}]
    assert llm.chat_prompt(messages) == "FIRST CITIZEN:\nWhat news?\n\nSECOND CITIZEN:\n"
    out = llm.chat(messages, GREEDY)
    direct = llm.generate(llm.tokenizer.encode(llm.chat_prompt(messages)), GREEDY)[0]
    assert out.outputs[0].text == direct.outputs[0].text  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="Roles are"):
        llm.chat([{"role": "oracle", "content": "x"}])
    with pytest.raises(RequestError, match="no chat template named"):
        llm.chat_prompt(messages, chat_template="rag")


def test_chat_answers_are_taken_apart(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What news?"}]
    # The demo model knows no tags: what it says is read as the reasoning that this template opens.
    template = "{{ messages[0].content }}\n<think>\n"
    out = llm.chat(messages, GREEDY, chat_template=template)
    message = out.outputs[0].message  # type: ignore[union-attr]
    assert message is not None and message.reasoning_content == out.outputs[0].text.strip()  # type: ignore[union-attr]
    pieces = list(llm.chat(messages, GREEDY, chat_template=template, stream=True))  # type: ignore[arg-type]
    assert "".join(piece.delta.reasoning_content for piece in pieces) == message.reasoning_content
    plain = llm.chat(messages, SamplingParams(max_tokens=16, n=2, seed=1, temperature=1.0)).outputs  # type: ignore[union-attr]
    assert [out.message.content for out in plain] == [out.text for out in plain]  # type: ignore[union-attr]


def test_continuing_the_last_message(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What news?"}, {"role": "assistant", "content": "The king"}]
    assert llm.chat_prompt(messages, continue_final_message=True).endswith("SECOND CITIZEN:\nThe king")
    request = llm.chat_request(messages, continue_final_message=True)
    assert llm.chat(messages, GREEDY, continue_final_message=True).outputs[0].text == (  # type: ignore[union-attr]
        llm.generate([request.token_ids], GREEDY)[0].outputs[0].text
    )


def test_score_equals_logprobs_of_generation(llm: LLM) -> None:
    [out] = llm.generate("ROMEO:", SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True))
    scores = llm.score([*out.prompt_token_ids, *out.outputs[0].token_ids])[0]
    generated = [
        entry[t].logprob for entry, t in zip(out.outputs[0].logprobs or [], out.outputs[0].token_ids, strict=True)
    ]
    assert scores[len(out.prompt_token_ids) - 1 :] == pytest.approx(generated, abs=1e-4)
    assert out.outputs[0].cumulative_logprob == pytest.approx(sum(generated))
    with pytest.raises(ContextLengthError):
        llm.score([[1] * 2000])


def test_closing(demo: Path) -> None:
    llm = LLM(demo, slots=1)
    stream = llm.stream("ROMEO:", LONG)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(ClosedError, match="was closed"):
        llm.generate("x")
    with pytest.raises(ClosedError):
        list(stream)


def _in_child(llm: LLM, answers: object) -> None:
    try:
        llm.generate("x")
        answers.put("no error")  # type: ignore[attr-defined]
    except ClosedError as error:
        answers.put(str(error))  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_is_told_to_make_its_own(llm: LLM) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(llm, answers))
    child.start()
    assert "before a fork" in answers.get(timeout=20)
    child.join(10)


def test_memory_is_refused_before_it_is_allocated(demo: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"slots? .*would fit|would fit"):
        LLM(demo, slots=50_000_000)


def test_async_equals_sync_with_many_at_once(llm: LLM, demo: Path) -> None:
    expected = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, GREEDY)]

    async def work() -> None:
        async with AsyncLLM(demo, slots=3) as aio:
            outs = await asyncio.gather(*(aio.generate(p, GREEDY) for p in PROMPTS))
            assert [o[0].outputs[0].token_ids for o in outs] == expected
            pieces = [p async for p in aio.stream(PROMPTS[0], GREEDY)]
            assert [i for p in pieces for i in p.token_ids] == expected[0]
            both = [p async for p in aio.stream(PROMPTS[0], SamplingParams(n=2, max_tokens=5, temperature=1.0))]
            assert {p.index for p in both} == {0, 1}
            assert sum(p.finish_reason is not None for p in both) == 2
            with pytest.raises(RequestError):
                await aio.generate("")
            chat = await aio.chat([{"role": "user", "content": "hi"}], GREEDY)
            assert chat.outputs[0].token_ids
            deltas = [p.delta async for p in aio.chat_stream([{"role": "user", "content": "hi"}], GREEDY)]
            assert "".join(d.content for d in deltas if d) == chat.outputs[0].message.content  # type: ignore[union-attr]

    asyncio.run(work())


def test_async_cancellation_frees_the_slot(demo: Path) -> None:
    async def work() -> None:
        async with AsyncLLM(demo, slots=1) as aio:
            task = asyncio.create_task(aio.generate("ROMEO:", LONG))
            while not aio.llm.engine.scheduler.pool.held():
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            deadline = time.monotonic() + 5
            while not free(aio.llm):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.001)
            [out] = await aio.generate("x", SamplingParams(max_tokens=2, ignore_eos=True))
            assert len(out.outputs[0].token_ids) == 2

    asyncio.run(work())


def test_async_closing_ends_what_runs(demo: Path) -> None:
    async def work() -> None:
        aio = AsyncLLM(demo, slots=1)
        task = asyncio.create_task(aio.generate("ROMEO:", LONG))
        await asyncio.sleep(0.05)
        await aio.aclose()
        task.cancel()
        with pytest.raises(ClosedError):
            await aio.generate("x")

    asyncio.run(asyncio.wait_for(work(), 20))
