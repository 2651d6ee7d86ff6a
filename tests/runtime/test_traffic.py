"""Everything at once: arrivals, cancellations, shared prefixes, continuations, draws, grammars and guesses in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from llmx.runtime import LLM, SamplingParams, Speculation
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

CHUNK, LENGTH, SLOTS = 4, 64, 3
BAD = [1] * 9 + [31]  # no other request's prompt begins so
FORMS = [None, None, {"regex": "[ab]{1,9}(x|yz)"}, {"choice": ["yes", "no", "never"]}]


class Model(FakeBackend):
    """Its next token follows from the last two, so that guesses come true; one prompt makes NaN logits."""

    def next_logits(self, tokens: list[int]) -> np.ndarray:
        if tokens[: len(BAD)] == BAD:
            return np.full(self.vocab_size, np.nan, np.float32)
        near = [int(token) % 4 for token in tokens[-2:]]
        return np.random.default_rng(near).standard_normal(self.vocab_size).astype(np.float32)


def make_speculator(guesser: str | None, backend: Model) -> Speculator | None:
    """Three guesses a pass by prompt "lookup", by a "draft" or by nobody."""
    if guesser == "lookup":
        chosen = Speculation(prompt_lookup=True, min_ngram=1, num_tokens=3)
        return Speculator(chosen, backend, PromptLookup(chosen.max_ngram, chosen.min_ngram))
    if guesser == "draft":
        draft = DraftModel(Model(SLOTS, LENGTH, VOCAB), VOCAB, CHUNK)
        return Speculator(Speculation(draft="a package", num_tokens=3), backend, draft, Costs(0.05, 0.1))
    return None


class Traffic(RuleBasedStateMachine):
    """Each output equals the one that its request gets alone, in an engine with one slot, no cache and no guesses."""

    tokenizer: Tokenizer
    grammars: GrammarCompiler

    @initialize(guesser=st.sampled_from([None, "lookup", "draft"]))
    def start(self, guesser: str | None) -> None:
        backend = Model(SLOTS, LENGTH, VOCAB)
        speculator = make_speculator(guesser, backend)
        self.draws = guesser != "draft"  # a draft's guesses change which of the same distribution's draws is drawn
        cache = 5 * CHUNK * 8  # five blocks: the fake's state is its tokens
        self.engine = Engine(backend, self.tokenizer, CHUNK, prefix_cache_bytes=cache, speculator=speculator)
        self.engine.grammars = self.grammars
        self.requests: list[tuple[Request, list[str]]] = []

    @rule(
        prefix=st.sampled_from([[1] * 9, [1] * 4 + [2] * 9, [3] * 13, []]),
        tail=st.lists(st.integers(1, 30), min_size=1, max_size=6),
        length=st.integers(1, 12),
        n=st.sampled_from([1, 1, 2, 3]),
        form=st.sampled_from(FORMS),
        seed=st.sampled_from([None, 0, 7]),
        logprobs=st.sampled_from([None, None, 2]),
        stop=st.sampled_from([None, None, "a"]),
    )
    def arrive(self, prefix: list[int], tail: list[int], length: int, seed: int | None, **options: Any) -> None:
        drawn = seed is not None and self.draws
        options |= {"temperature": 0.8 if drawn else 0.0, "seed": seed, "max_tokens": length}
        options["structured_outputs"] = options.pop("form")
        shown = ["", "", ""]

        def emit(piece: Any) -> None:
            shown[piece.index] += piece.text

        params = SamplingParams(**options).resolved({})
        self.requests.append((self.engine.add(None, prefix + tail, params, emit), shown))

    @rule()
    def arrive_with_a_fault(self) -> None:
        self.requests.append((self.engine.add(None, BAD, SamplingParams(n=2, max_tokens=3).resolved({})), []))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request, _ = data.draw(st.sampled_from(self.requests))
        self.engine.cancel(request)
        self.engine.step()
        assert all(s.slot is None for s in request.sequences), "a cancelled request holds a slot after a step"

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.check()

    @invariant()
    def check(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            if self.engine.speculator is not None and isinstance(self.engine.speculator._drafter, DraftModel):
                self.engine.speculator._drafter.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.has_work:
            self.engine.step()
            self.check()
        assert self.engine.scheduler.pool.held() == []
        for request, shown in self.requests:
            if request.prompt_ids == BAD:
                assert request.cancelled or "NaN" in str(request.error)
                continue
            assert request.error is None
            for one, other in zip(request.sequences, self.alone(request).sequences, strict=True):
                assert shown[one.index] == one.text
                if one.finish_reason == "abort":
                    assert request.cancelled and one.output_ids == other.output_ids[: one.num_output]
                else:
                    assert told(one) == told(other)

    def alone(self, request: Request) -> Request:
        engine = Engine(Model(1, LENGTH, VOCAB), self.tokenizer, LENGTH)
        engine.grammars = self.grammars
        again = engine.add(None, request.prompt_ids, request.params)
        while engine.has_work:
            engine.step()
        return again


def told(sequence: Any) -> Any:
    return sequence.output_ids, sequence.text, sequence.logprobs, sequence.finish_reason, sequence.stop_reason


@pytest.fixture(scope="module", autouse=True)
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    Traffic.tokenizer = Tokenizer.load(folder, TokenizerInfo(eos_token_ids=[0]))
    Traffic.grammars = GrammarCompiler(Traffic.tokenizer, VOCAB)  # compiling takes longer than running


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("guesser", ["lookup", "draft"])
def test_the_demo_model_says_the_same_in_any_traffic(demo: Path, guesser: str) -> None:
    """Random arrivals, prefixes in common, cancellations, continuations, forms and guesses: bit for bit what each gets alone."""
    generator = np.random.default_rng(2)
    forms: list[Any] = [None, None, {"regex": "( the (sea|sky|king)[.,]?){3}"}, {"json_object": True}]

    def draw(count: int) -> list[int]:
        ids: list[int] = generator.integers(3, 1000, count).tolist()
        return ids

    wanted = Speculation(draft=demo, num_tokens=3)
    if guesser == "lookup":
        wanted = Speculation(prompt_lookup=True, min_ngram=1, num_tokens=3)
    options: dict[str, Any] = {"prefix_cache_bytes": 1 << 20, "prefill_chunk": 16, "speculative": wanted}
    with LLM(demo, slots=1) as alone, LLM(demo, slots=4, **options) as llm:
        engine, heads = llm.engine, [draw(40), draw(70), draw(5) * 8, []]
        waiting = [heads[generator.integers(4)] + draw(int(generator.integers(1, 20))) for _ in range(24)]
        requests: list[Request] = []
        while waiting or engine.has_work:
            if waiting and generator.random() < 0.3:
                params = SamplingParams(
                    max_tokens=int(generator.integers(1, 40)), temperature=0.0, ignore_eos=True, n=int(generator.integers(1, 3)),
                    structured_outputs=forms[generator.integers(len(forms))],
                )  # fmt: skip
                requests.append(engine.add(None, waiting.pop(), params.resolved({})))
            if requests and generator.random() < 0.02:
                engine.cancel(requests[generator.integers(len(requests))])
            engine.step()
            engine.check_integrity()
        assert sum(r.metrics.num_accepted for r in requests) > 20
        for request in requests:
            assert request.error is None
            params = SamplingParams(**{**vars(request.params), "n": 1})
            expected = alone.generate([request.prompt_ids], params)[0].outputs[0].token_ids
            for sequence in request.sequences:
                ended = sequence.finish_reason != "abort"
                assert sequence.output_ids == (expected if ended else expected[: sequence.num_output])
