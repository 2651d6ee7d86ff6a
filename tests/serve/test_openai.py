"""openai-python, unmodified, against the server: what it returns is what the runtime gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openai
import pytest
from harness import Running, running
from llmx.runtime import LLM, SamplingParams
from llmx.serve import ServeConfig

MESSAGES = [{"role": "user", "content": "What news?"}]


@pytest.fixture(scope="module")
def reference(demo: Path) -> LLM:
    return LLM(demo, slots=2)


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_chat(client: openai.OpenAI, reference: LLM) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_completion_tokens=20, temperature=0)
    expected = reference.chat(MESSAGES, SamplingParams(max_tokens=20, temperature=0.0))
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.outputs[0].text)
    assert choice.finish_reason == expected.outputs[0].finish_reason
    assert answer.usage is not None and answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)


def test_chat_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    options = {"model": "demo", "messages": MESSAGES, "max_tokens": 24, "temperature": 0.9, "seed": 7, "n": 2}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    texts, ends, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):  # type: ignore[call-overload]
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [c.message.content for c in whole.choices] and texts[0] != texts[1]
    assert ends == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage


def test_logprobs(client: openai.OpenAI, reference: LLM) -> None:
    [out] = reference.generate(
        [reference.chat_ids(MESSAGES)], SamplingParams(max_tokens=5, temperature=0.0, logprobs=3)
    )
    expected = out.outputs[0]
    assert expected.logprobs is not None
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode() == expected.text
    for entry, token, known in zip(content, expected.token_ids, expected.logprobs, strict=True):
        assert entry.logprob == pytest.approx(known[token].logprob)
        best = sorted(known.values(), key=lambda p: p.rank)[:3]
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([p.logprob for p in best])
    legacy = client.completions.create(
        model="demo", prompt=out.prompt_token_ids, max_tokens=5, temperature=0, logprobs=2, echo=True
    ).choices[0]
    assert legacy.logprobs.token_logprobs[0] is None
    assert legacy.logprobs.token_logprobs[1:][-5:] == pytest.approx([e.logprob for e in content])
    assert legacy.text.endswith(expected.text) and "".join(legacy.logprobs.tokens) == legacy.text
    for token, offset in zip(legacy.logprobs.tokens, legacy.logprobs.text_offset, strict=True):
        assert legacy.text.startswith(token, offset)


def test_prompts_of_every_kind(client: openai.OpenAI, reference: LLM) -> None:
    options = {"model": "demo", "max_tokens": 6, "temperature": 0}
    ids = [reference.tokenizer.encode(t) for t in ("ROMEO:", "JULIET: my")]
    one, two = (o.outputs[0].text for o in reference.generate(ids, SamplingParams(max_tokens=6, temperature=0.0)))
    for prompt, expected in (
        ("ROMEO:", [one]),
        (["ROMEO:", "JULIET: my"], [one, two]),
        (ids[0], [one]),
        (ids, [one, two]),
    ):
        answer = client.completions.create(prompt=prompt, **options)  # type: ignore[call-overload]
        assert [c.text for c in answer.choices] == expected
        pieces = [""] * len(expected)
        for chunk in client.completions.create(prompt=prompt, stream=True, **options):  # type: ignore[call-overload]
            for choice in chunk.choices:
                pieces[choice.index] += choice.text
        assert pieces == expected


def test_a_stop_string_split_across_tokens(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt="ROMEO:", max_tokens=40, temperature=0).choices[0].text
    stop = whole[11:17]
    expected = whole[: whole.index(stop)]
    answer = client.completions.create(model="demo", prompt="ROMEO:", max_tokens=40, temperature=0, stop=["§", stop])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    stream = client.completions.create(
        model="demo", prompt="ROMEO:", max_tokens=40, temperature=0, stop=stop, stream=True
    )
    assert "".join(c.text for chunk in stream for c in chunk.choices) == expected


def test_echo(client: openai.OpenAI) -> None:
    options = {"model": "demo", "prompt": ["ROMEO:", "JULIET: my"], "temperature": 0, "logprobs": 0, "n": 2}
    plain = client.completions.create(**options, max_tokens=4).choices  # type: ignore[call-overload]
    prompts = ["ROMEO:", "ROMEO:", "JULIET: my", "JULIET: my"]
    echoed = client.completions.create(**options, max_tokens=4, echo=True).choices  # type: ignore[call-overload]
    assert [c.text for c in echoed] == [p + c.text for p, c in zip(prompts, plain, strict=True)]
    texts, tokens = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in client.completions.create(**options, max_tokens=4, echo=True, stream=True):  # type: ignore[call-overload]
        for c in chunk.choices:
            texts[c.index] += c.text
            tokens[c.index] += c.logprobs.tokens if c.logprobs else []
    assert texts == [c.text for c in echoed] and tokens == [c.logprobs.tokens for c in echoed]
    silent = client.completions.create(**options, max_tokens=0, echo=True)  # type: ignore[call-overload]
    assert [c.text for c in silent.choices] == prompts and silent.usage.completion_tokens == 0
    assert [c.logprobs.tokens for c in silent.choices] == [
        c.logprobs.tokens[: len(s.logprobs.tokens)] for c, s in zip(echoed, silent.choices, strict=True)
    ]


def test_vllms_extras(client: openai.OpenAI, served: Running) -> None:
    extra = {"top_k": 1, "min_tokens": 3, "ignore_eos": True, "repetition_penalty": 1.0, "prompt_logprobs": 1}
    answer = client.completions.create(model="demo", prompt="ROMEO:", temperature=1, max_tokens=6, extra_body=extra)
    greedy = client.completions.create(model="demo", prompt="ROMEO:", temperature=0, max_tokens=6)
    assert answer.choices[0].text == greedy.choices[0].text
    assert len(answer.choices[0].prompt_logprobs) == answer.usage.prompt_tokens  # type: ignore[union-attr,attr-defined]
    counts = [
        chunk.usage.completion_tokens
        for chunk in client.completions.create(
            model="demo", prompt="x", max_tokens=5, stream=True, extra_body={"ignore_eos": True},
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
        )
        if chunk.usage
    ]  # fmt: skip
    assert counts == sorted(counts) and counts[-1] == 5
    reason = served.post(
        "/v1/completions", {"prompt": "ROMEO:", "max_tokens": 30, "temperature": 0, "stop": [" "]}
    ).json()
    assert (reason["choices"][0]["finish_reason"], reason["choices"][0]["stop_reason"]) == ("stop", " ")


def test_async_clients_share_the_batch(served: Running, reference: LLM) -> None:
    prompts = [
        f"{name}: I" for name in ("ROMEO", "JULIET", "KING", "QUEEN", "DUKE", "NURSE", "LEAR", "FOOL", "MENENIUS")
    ]
    expected = [o.outputs[0].text for o in reference.generate(prompts, SamplingParams(max_tokens=24, temperature=0.0))]

    async def work() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="demo", prompt=prompt, max_tokens=24, temperature=0, stream=True
                )
                return "".join([c.text async for chunk in stream for c in chunk.choices])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(work()) == expected
    served.wait_idle()


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="no model named 'other'"):
        client.models.retrieve("other")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="demo", prompt="word " * 2000)
    assert long.value.code == "context_length_exceeded" and long.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="demo", messages=MESSAGES, top_p=7)
    assert wrong.value.param == "top_p"


def test_embeddings(encoder: Callable[[str], Path]) -> None:
    texts = ["a sentence", "another one, a little longer"]
    with LLM(encoder("embed")) as llm:
        expected = llm.embed(texts)
    with running(ServeConfig(onnx=[f"vectors={encoder('embed')}"])) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        for options in ({}, {"encoding_format": "float"}):
            answer = client.embeddings.create(model="vectors", input=texts, **options)  # type: ignore[arg-type]
            np.testing.assert_array_equal(np.array([d.embedding for d in answer.data], np.float32), expected)
        assert answer.usage.prompt_tokens > 0
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="vectors", prompt="x")
        assert refused.value.code == "unsupported_model"
