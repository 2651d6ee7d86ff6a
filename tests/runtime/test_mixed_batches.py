"""Any mix of parameters in one batch gives each row what it gets alone, from the fake backend and from a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmx.runtime import LLM, RequestError, RequestOutput, SamplingParams
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.grammar import GrammarCompiler
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.scheduler import Request
from llmx.runtime.tokenizer import Tokenizer
from zoo.models import VOCAB, write_tokenizer

TOKENS = st.integers(1, 262)
WORDS = st.text("abet hn", min_size=1, max_size=4).filter(str.strip)
FORMS = [
    {"regex": "[a-e]{1,9}(x|yz)"},
    {"choice": ["yes", "no", "never"]},
    {"json": {"type": "object", "properties": {"a": {"enum": [1, 22, 333]}}, "required": ["a"]},
     "disable_any_whitespace": True, "disable_additional_properties": True},
    {"grammar": 'start: "(" start ")" | "x"'},
]  # fmt: skip
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.5]),
    "top_k": st.integers(1, 60),
    "top_p": st.floats(0.1, 0.99),
    "min_p": st.floats(0.001, 0.5),
    "typical_p": st.floats(0.1, 0.99),
    "epsilon_cutoff": st.floats(0.0001, 0.01),
    "eta_cutoff": st.floats(0.0001, 0.05),
    "top_n_sigma": st.floats(0.5, 3.0),
    "repetition_penalty": st.floats(0.5, 2.0),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "no_repeat_ngram_size": st.integers(1, 4),
    "logit_bias": st.dictionaries(TOKENS, st.floats(-50, 50), max_size=5),
    "allowed_token_ids": st.lists(TOKENS, min_size=20, max_size=60),
    "bad_words": st.lists(WORDS, max_size=4),
    "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=4),
    "min_tokens": st.integers(0, 5),
    "stop": st.lists(WORDS, min_size=1, max_size=3),
    "stop_token_ids": st.lists(TOKENS, max_size=30),
    "ignore_eos": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "logprobs": st.integers(0, 4),
    "prompt_logprobs": st.integers(0, 2),
    "n": st.integers(1, 3),
    "structured_outputs": st.sampled_from(FORMS),
}


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    """A few parameters of all, and a seed."""
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=8, unique=True))
    options = {name: draw(OPTIONS[name]) for name in names}
    return SamplingParams(seed=draw(st.integers(0, 2**32)), max_tokens=draw(st.integers(5, 18)), **options)


REQUESTS = st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=14), params()), min_size=2, max_size=6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder, TokenizerInfo(eos_token_ids=[0, 3]))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> GrammarCompiler:
    """Shared by the engines, as compiling takes longer than running."""
    return GrammarCompiler(tokenizer, VOCAB)


def outcome(request: Request) -> Any:
    if request.error is not None:
        return type(request.error), str(request.error)
    return [
        (s.output_ids, s.text, s.finish_reason, s.stop_reason, s.logprobs, s.cumulative_logprob)
        for s in request.sequences
    ], request.prompt_logprobs


@settings(max_examples=200, deadline=None)
@given(
    wanted=REQUESTS,
    slots=st.integers(1, 4),
    chunk=st.integers(1, 9),
    joins=st.lists(st.integers(0, 5), min_size=6, max_size=6),
)
def test_over_the_fake_backend(
    tokenizer: Tokenizer,
    grammars: GrammarCompiler,
    wanted: list[tuple[list[int], SamplingParams]],
    slots: int,
    chunk: int,
    joins: list[int],
) -> None:
    def run(each: list[tuple[list[int], SamplingParams]], slots: int, chunk: int, joins: list[int]) -> list[Any]:
        engine = Engine(FakeBackend(slots, 64, VOCAB), tokenizer, chunk)
        engine.grammars = grammars
        requests = []
        for (prompt, wanted), steps in zip(each, joins, strict=False):
            requests.append(engine.add(None, prompt, wanted.resolved({})))
            for _ in range(steps):
                engine.step()
        while engine.has_work:
            engine.step()
            engine.scheduler.pool.check_integrity()
        return [outcome(request) for request in requests]

    together = run(wanted, slots, chunk, joins)
    assert together == [run([each], 1, 64, [0])[0] for each in wanted]


@pytest.fixture(scope="module")
def llm(demo: Path) -> Iterator[LLM]:
    with LLM(demo, slots=5) as loaded:
        yield loaded


def tokens_of(output: RequestOutput) -> list[Any]:
    return [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in output.outputs]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(wanted=REQUESTS)
def test_over_the_demo_model(llm: LLM, wanted: list[tuple[list[int], SamplingParams]]) -> None:
    """Rows of a batch differ from a row alone by float32 rounding, which log-probabilities show."""
    kept, alone = [], []
    for prompt, each in wanted:
        try:
            alone.append(llm.generate([prompt], each)[0])
        except RequestError:  # the rules leave no token
            continue
        kept.append((prompt, each))
    together = llm.generate([prompt for prompt, _ in kept], [each for _, each in kept])
    for one, other in zip(alone, together, strict=True):
        assert tokens_of(one) == tokens_of(other)
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert (a.logprobs is None) == (b.logprobs is None)
            for left, right in zip(a.logprobs or [], b.logprobs or [], strict=True):
                shared = left.keys() & right.keys()
                assert len(shared) >= len(left) - 1  # but for a tie with the last of the top
                np.testing.assert_allclose(
                    [left[t].logprob for t in shared], [right[t].logprob for t in shared], atol=1e-4
                )


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=9),
    seed=st.integers(0, 2**32),
    stop=st.lists(st.text("abet hn", min_size=1, max_size=3), min_size=1, max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
    form=st.sampled_from([None, {"regex": "([abet hn]{1,4} )+"}, {"json": {"enum": ["the ant then ate", "a bee"]}}]),
)
def test_what_is_streamed_is_never_taken_back(
    tokenizer: Tokenizer,
    grammars: GrammarCompiler,
    prompt: list[int],
    seed: int,
    stop: list[str],
    include: bool,
    min_tokens: int,
    form: Any,
) -> None:
    """Streamed text is the beginning of the text without stop strings, cut where a stop string first came to an end."""
    letters = [token for token in range(1, 263) if set(tokenizer.decode([token])) <= set("abet hn")]
    engine = Engine(FakeBackend(2, 64, VOCAB), tokenizer, 16)
    engine.grammars = grammars
    shown: list[str] = []
    options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 30, "min_tokens": min_tokens}
    options |= {"structured_outputs": form} if form else {"allowed_token_ids": letters, "ignore_eos": True}
    plain = engine.add(None, prompt, SamplingParams(**options).resolved({}))
    stopping = SamplingParams(**options, stop=stop, include_stop_str_in_output=include)
    request = engine.add(None, prompt, stopping.resolved({}), lambda piece: shown.append(piece.text))
    while engine.has_work:
        engine.step()
    assert plain.error is request.error is None
    [whole], [sequence] = plain.sequences, request.sequences
    early = len(tokenizer.decode(whole.output_ids[:min_tokens]))  # ASCII, one text for each token: no stop string there
    ends = [(early + at + len(s), early + at, s) for s in stop if (at := whole.text[early:].find(s)) >= 0]
    if ends:
        end, start, matched = min(ends)
        assert sequence.text == whole.text[: end if include else start]
        assert (sequence.finish_reason, sequence.stop_reason) == ("stop", matched)
    else:
        assert sequence.text == whole.text
        assert (sequence.finish_reason, sequence.stop_reason) == (whole.finish_reason, None)
    assert "".join(shown) == sequence.text
