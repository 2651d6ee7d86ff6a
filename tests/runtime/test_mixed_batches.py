"""Any mix of parameters in one batch gives each row what it gets alone, from the fake backend and from a real one: drawn,
greedy, several, the best of several, beams, grammars, and all of them with guesses that are judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmx.runtime import LLM, RequestError, RequestOutput, SamplingParams, Speculation
from llmx.runtime.draft import DraftModel
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.grammar import GrammarCompiler
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.pace import Costs
from llmx.runtime.scheduler import Request
from llmx.runtime.speculation import PromptLookup
from llmx.runtime.speculator import Speculator
from llmx.runtime.tokenizer import Tokenizer
from zoo.models import VOCAB, write_tokenizer

MOST_BEAMS = 3
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
    "best_of": st.integers(3, 5),
    "suppress_tokens": st.lists(TOKENS, max_size=5),
    "begin_suppress_tokens": st.lists(TOKENS, max_size=5),
    "structured_outputs": st.sampled_from(FORMS),
}
BEAMS: dict[str, st.SearchStrategy[Any]] = {
    "num_beams": st.integers(2, MOST_BEAMS),
    "length_penalty": st.floats(-1.0, 2.0),
    "early_stopping": st.sampled_from([True, False, "never"]),
}
NOT_WITH_BEAMS = {"temperature", "structured_outputs", "best_of", "n"}


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    """A few parameters of all, and a seed."""
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=8, unique=True))
    options = {name: draw(OPTIONS[name]) for name in names}
    if draw(st.integers(0, 3)) == 0:
        options = {name: value for name, value in options.items() if name not in NOT_WITH_BEAMS}
        options |= {name: draw(strategy) for name, strategy in BEAMS.items()}
        options["n"] = draw(st.integers(1, options["num_beams"]))
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
        (s.output_ids, s.text, s.finish_reason, s.stop_reason, s.logprobs, s.cumulative_logprob, s.score)
        for s in request.sequences
    ], request.prompt_logprobs


class Near(FakeBackend):
    """Looks at the last two tokens alone, so that texts repeat; a draft of it is wrong now and then."""

    def __init__(self, slots: int, max_length: int, vocab_size: int, error: float = 0.0) -> None:
        super().__init__(slots, max_length, vocab_size)
        self._error = error

    def next_logits(self, tokens: list[int]) -> np.ndarray:
        near = [int(t) % 5 for t in tokens[-2:]]
        return 4 * super().next_logits(near) + np.float32(self._error) * super().next_logits([7, *near])


def make_speculator(drafter: str, backend: FakeBackend, num_tokens: int | None) -> Speculator:
    if drafter == "lookup":
        settings = Speculation(prompt_lookup=True, min_ngram=1, num_tokens=num_tokens)
        return Speculator(settings, backend, PromptLookup(settings.max_ngram, settings.min_ngram))
    draft = DraftModel(Near(backend.slots, 50, VOCAB, 2.0), VOCAB, 6)
    return Speculator(Speculation(draft="a package", num_tokens=num_tokens), backend, draft, Costs(0.05, 0.1))


@settings(max_examples=200, deadline=None)
@given(
    wanted=REQUESTS,
    slots=st.integers(MOST_BEAMS, 5),
    drafter=st.sampled_from(["nobody", "nobody", "lookup", "draft"]),
    num_tokens=st.sampled_from([None, 1, 4]),
    chunk=st.integers(1, 9),
    joins=st.lists(st.integers(0, 5), min_size=6, max_size=6),
)
def test_over_the_fake_backend(
    tokenizer: Tokenizer,
    grammars: GrammarCompiler,
    wanted: list[tuple[list[int], SamplingParams]],
    slots: int,
    drafter: str,
    num_tokens: int | None,
    chunk: int,
    joins: list[int],
) -> None:
    """With prompt lookup a row gets what it gets alone without; a draft's guesses are draws of their own."""

    def run(
        each: list[tuple[list[int], SamplingParams]], slots: int, chunk: int, joins: list[int], drafter: str
    ) -> list[Any]:
        backend = FakeBackend(slots, 64, VOCAB) if drafter == "nobody" else Near(slots, 64, VOCAB)
        speculator = make_speculator(drafter, backend, num_tokens) if drafter in ("lookup", "draft") else None
        engine = Engine(backend, tokenizer, chunk, speculator=speculator)
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

    together = run(wanted, slots, chunk, joins, drafter)
    alone = "plain" if drafter == "lookup" else drafter
    assert together == [run([each], MOST_BEAMS, 64, [0], alone)[0] for each in wanted]


@pytest.fixture(scope="module", params=["plain", "lookup"])
def llms(request: pytest.FixtureRequest, demo: Path) -> Iterator[tuple[LLM, LLM]]:
    """What requests run on alone, and together."""
    with LLM(demo, slots=5) as alone:
        if request.param == "plain":
            yield alone, alone
            return
        with LLM(demo, slots=5, speculative=Speculation(prompt_lookup=True, min_ngram=1, num_tokens=3)) as guessing:
            yield alone, guessing


def tokens_of(output: RequestOutput) -> list[Any]:
    return [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in output.outputs]


@settings(max_examples=18, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(wanted=REQUESTS)
def test_over_the_demo_model(llms: tuple[LLM, LLM], wanted: list[tuple[list[int], SamplingParams]]) -> None:
    """Rows of a batch differ from a row alone by float32 rounding, which log-probabilities show."""
    llm, batching = llms
    kept, alone = [], []
    for prompt, each in wanted:
        try:
            alone.append(llm.generate([prompt], each)[0])
        except RequestError:  # the rules leave no token
            continue
        kept.append((prompt, each))
    together = batching.generate([prompt for prompt, _ in kept], [each for _, each in kept])
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
