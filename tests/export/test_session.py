"""Sessions: the tokens of one long prompt, each of them computed once; rewound, forked, saved, shifted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from llmx.runtime import (
    LLM,
    AsyncLLM,
    ClosedError,
    ContextLengthError,
    FamilyError,
    RequestError,
    SamplingParams,
    Session,
    Speculation,
)
from zoo.models import VOCAB

GREEDY = SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True)


def turns(seed: int, count: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, rng.integers(1, 14)).tolist() for _ in range(count)]


def converse(session: Session, said: list[list[int]]) -> list[list[int]]:
    answers = []
    for turn in said:
        past = len(session)
        out = session.append(turn).generate(GREEDY)
        answers.append(out.outputs[0].token_ids)
        assert out.metrics.num_cached_tokens == max(past - 1, 0), "the past was computed again"
        assert session.tokens[past:] == turn + answers[-1]
    return answers


def afresh(llm: LLM, session: Session) -> list[int]:
    return llm.generate([session.tokens], GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "mamba", "lfm2"])
def test_a_conversation(name: str, package: Callable[[str], Path], tmp_path: Path) -> None:
    """In place, with windows, grown, and two recurrences."""
    with LLM(package(name), slots=2, max_length=160) as llm:
        said = turns(1)
        tokens: list[int] = []
        expected = []
        for turn in said:
            tokens += turn
            expected.append(llm.generate([tokens], GREEDY)[0].outputs[0].token_ids)
            tokens += expected[-1]
        session = llm.session()
        assert converse(session, said) == expected
        assert session.tokens == tokens and session.text == llm.tokenizer.decode_raw(tokens, skip_special_tokens=False)

        twin = session.fork()
        other = converse(twin, turns(2, 2))
        session.save(tmp_path / "talk.npz")
        loaded = llm.load_session(tmp_path / "talk.npz")
        assert loaded.tokens == tokens and loaded.num_cached == session.num_cached == len(tokens) - 1
        assert converse(loaded, turns(2, 2)) == other == converse(session, turns(2, 2))

        for position in (len(session) - 3, len(tokens) - 2, len(said[0]) + 2, 1, 0):
            session.rewind(position)
            assert session.num_cached <= position and len(session) == position
            session.append([9, 8])
            wanted = afresh(llm, session)
            assert session.generate(GREEDY).outputs[0].token_ids == wanted, position
        assert [p.name for p in tmp_path.iterdir()] == ["talk.npz"]
        llm.engine.check_integrity()
        assert llm.engine.scheduler.pool.num_free == 2


def test_beside_other_requests(package: Callable[[str], Path]) -> None:
    """Sessions share the slots with everything else, move among them, and keep to themselves."""
    said = turns(3, 4)
    with LLM(package("llama"), slots=3, max_length=160, prefix_cache_bytes=1 << 20, prefill_chunk=8) as llm:
        alone = converse(llm.session(), said)
        sessions = [llm.session() for _ in range(3)]
        for turn, answer in zip(said, alone, strict=True):
            streams = [session.append(turn).stream(GREEDY) for session in sessions]
            other = llm.stream([5, 6, 7], SamplingParams(max_tokens=20, temperature=1.0, seed=1, ignore_eos=True))
            for stream in streams:
                assert [i for piece in stream for i in piece.token_ids] == answer
            other.close()
            llm.engine.check_integrity()


def test_closing_a_stream_keeps_what_was_said(package: Callable[[str], Path]) -> None:
    with LLM(package("llama"), slots=1) as llm:
        session = llm.session().append([5, 6, 7])
        stream = session.stream(SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True))
        said = [*next(stream).token_ids, *next(stream).token_ids]
        with pytest.raises(RequestError, match="The session is generating"):
            session.append([1])
        stream.close()
        assert session.append([9]).tokens[: 3 + len(said)] == [5, 6, 7, *said]
        wanted = afresh(llm, session)
        assert session.generate(GREEDY).outputs[0].token_ids == wanted


def test_a_failed_answer_leaves_the_session(package: Callable[[str], Path]) -> None:
    with LLM(package("llama"), slots=1) as llm:
        session = llm.session().append([5, 6, 7])
        session.generate(GREEDY)
        before = session.append([8]).tokens
        good, llm.engine.backend.decode = llm.engine.backend.decode, None  # type: ignore[method-assign,assignment]
        with pytest.raises(TypeError):
            session.generate(GREEDY)
        llm.engine.backend.decode = good  # type: ignore[method-assign]
        assert session.tokens == before
        wanted = afresh(llm, session)
        assert session.generate(GREEDY).outputs[0].token_ids == wanted


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_full_context(name: str, package: Callable[[str], Path]) -> None:
    with LLM(package(name), slots=1, max_length=40) as llm:
        session = llm.session().append([5] * 30)
        out = session.generate(SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True))
        assert out.outputs[0].finish_reason == "length" and len(session) == 40
        with pytest.raises(ContextLengthError, match="has 40 tokens and the context holds 40"):
            session.generate(GREEDY)
        session.rewind(10)
        assert session.generate(GREEDY).outputs[0].finish_reason == "length"

        moving = llm.session(on_full="shift", keep_first=4).append([5, 6, 7, 8, *range(20, 55)])
        for _ in range(5):
            out = moving.append([9]).generate(GREEDY)
            assert len(out.outputs[0].token_ids) == 7 and len(moving) <= 40
            assert moving.tokens[:4] == [5, 6, 7, 8]
            wanted = afresh(llm, moving.fork().rewind(len(moving) - 7))
            assert out.outputs[0].token_ids == wanted
        everything = llm.tokenizer.decode_raw([5, 6, 7, 8, *range(20, 55)], skip_special_tokens=False)
        assert moving.text.startswith(everything)


def test_rotary_factors_of_another_length(package: Callable[[str], Path]) -> None:
    """Phi-3's state is computed anew past 32 positions, and again where a session goes back to before them."""
    with LLM(package("phi3-longrope"), slots=1) as llm:
        session = llm.session().append([5, 6, 7] * 9)
        session.generate(GREEDY)  # 27 + 7: past 32
        for position, more in ((34, 3), (20, 4), (24, 20), (10, 2)):
            session.rewind(position).append([11] * more)
            wanted = afresh(llm, session)
            assert session.generate(GREEDY).outputs[0].token_ids == wanted


def test_chat(demo: Path) -> None:
    """The template's text is followed: what was said is not computed again, a changed message from there on."""
    params = SamplingParams(max_tokens=12, temperature=0.0)
    with LLM(demo, slots=1, max_length=512) as llm:
        session, messages = llm.session(), [{"role": "user", "content": "What news?"}]
        first = session.chat(messages, params)
        assert first.outputs[0].text == llm.chat(messages, params).outputs[0].text
        assert first.outputs[0].message is not None
        held = len(session)
        messages += [first.outputs[0].message.to_dict(), {"role": "user", "content": "And then?"}]
        second = session.chat(messages, params)
        assert second.metrics.num_cached_tokens >= held - 1 - 1
        streamed = session.fork()
        messages += [second.outputs[0].message.to_dict(), {"role": "user", "content": "Why?"}]
        pieces = list(streamed.chat(messages, params, stream=True))
        assert (
            "".join(p.delta.content or "" for p in pieces) == session.chat(messages, params).outputs[0].message.content
        )
        messages[2]["content"] = "Who says so?"
        changed = session.chat(messages, params)
        assert 0 < changed.metrics.num_cached_tokens < held + 20
        assert changed.outputs[0].token_ids == llm.chat(messages, params).outputs[0].token_ids


def test_with_speculation(demo: Path) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    said = ["ROMEO:\nO, she doth teach", " the torches to burn", "\nJULIET:\n"]
    answers = []
    for speculative in (None, Speculation(prompt_lookup=True, min_ngram=1, num_tokens=4)):
        with LLM(demo, slots=1, max_length=256, speculative=speculative) as llm:
            session = llm.session()
            answers.append([session.append(text).generate(params).outputs[0].token_ids for text in said])
    assert answers[0] == answers[1]


def test_files(package: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "talk"
    with LLM(package("llama"), slots=1, max_length=64) as llm:
        session = llm.session(on_full="shift", keep_first=2).append([5] * 20)
        session.generate(GREEDY)
        session.save(file)
        with pytest.raises(RequestError, match="cannot be written"):
            session.save(tmp_path / "nowhere" / "talk")
        with pytest.raises(RequestError, match="There is no saved session"):
            llm.load_session(tmp_path / "other")
        good = file.read_bytes()
        for damaged in (
            b"",
            b"x" * 100,
            good[:-200],
            good[: len(good) // 2],
            good.replace(b"llmx-session", b"other-things"),
        ):
            (tmp_path / "bad").write_bytes(damaged)
            with pytest.raises(RequestError, match="no saved session, or is damaged"):
                llm.load_session(tmp_path / "bad")
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 255
        (tmp_path / "bad").write_bytes(flipped)
        with pytest.raises(RequestError, match="damaged"):
            llm.load_session(tmp_path / "bad")
        loaded = llm.load_session(file)
        assert (loaded.on_full, loaded.keep_first, loaded.tokens) == ("shift", 2, session.tokens)
    with LLM(package("llama"), slots=1, max_length=20) as llm, pytest.raises(ContextLengthError, match="27 tokens"):
        llm.load_session(file)
    with LLM(package("qwen2"), slots=1) as llm, pytest.raises(RequestError, match="another package"):
        llm.load_session(file)


def test_refusals(package: Callable[[str], Path], seq2seq_package: Callable[[str], Path]) -> None:
    with LLM(package("llama"), slots=2, max_length=64) as llm:
        with pytest.raises(RequestError, match="on_full must be"):
            llm.session(on_full="drop")
        with pytest.raises(RequestError, match="keep_first must be a whole number from 0 to 62"):
            llm.session(keep_first=63)
        session = llm.session()
        with pytest.raises(RequestError, match="empty"):
            session.generate(GREEDY)
        for position in (-1, 1, True, 0.0):
            with pytest.raises(RequestError, match="A position must be a whole number from 0 to 0"):
                session.rewind(position)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="between 0 and"):
            session.append([VOCAB + 9])
        for options in ({"n": 2}, {"best_of": 2}, {"num_beams": 2}, {"prompt_logprobs": 1}):
            with pytest.raises(RequestError, match="leave out n, best_of, num_beams and prompt_logprobs"):
                session.append([4]).generate(SamplingParams(**options))  # type: ignore[arg-type]
    with LLM(seq2seq_package("t5"), slots=1) as llm, pytest.raises(FamilyError, match="encoder-decoder"):
        llm.session()


def test_a_session_in_asyncio(demo: Path, tmp_path: Path) -> None:
    """What a Session does, while another task shares the batch; a task that is cancelled keeps what was said."""
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with LLM(demo, slots=2, max_length=200) as llm:
        plain = llm.session()
        expected = [plain.append(turn).generate(params).outputs[0].text for turn in ("ROMEO:\n", "\nJULIET:\n")]

    async def talk() -> None:
        async with AsyncLLM(demo, slots=2, max_length=200) as aio:
            other = asyncio.create_task(aio.generate("KING:", SamplingParams(max_tokens=60, ignore_eos=True)))
            session = aio.session()
            await session.append("ROMEO:\n")
            assert (await session.generate(params)).outputs[0].text == expected[0]
            end = len(session)
            await session.append("\nJULIET:\n")
            twin = await session.fork()
            text = "".join([piece.text async for piece in session.stream(params)])
            assert text == expected[1] and session.tokens == plain.tokens and session.text == plain.text
            out = await twin.generate(params)
            assert out.outputs[0].text == expected[1] and out.metrics.num_cached_tokens == end - 1
            await twin.save(tmp_path / "talk.npz")
            again = await aio.load_session(tmp_path / "talk.npz")
            await again.rewind(end)
            assert again.num_cached == end - 1 or again.num_cached == end
            await again.append("\nJULIET:\n")
            assert (await again.generate(params)).outputs[0].text == expected[1]
            long = asyncio.create_task(again.generate(SamplingParams(max_tokens=100, ignore_eos=True)))
            while not again.session._request:
                await asyncio.sleep(0.001)
            long.cancel()
            with pytest.raises(asyncio.CancelledError):
                await long
            assert (await again.append([5])).tokens[-1] == 5
            messages = [{"role": "user", "content": "What news?"}]
            template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
            answer = await aio.session().chat(messages, params, chat_template=template)
            pieces = [p async for p in aio.session().chat_stream(messages, params, chat_template=template)]
            assert "".join(p.delta.content for p in pieces) == answer.outputs[0].message.content
            await other
        with pytest.raises(ClosedError):
            await session.generate(params)

    asyncio.run(talk())
