"""Speculation over the fake backend: tokens of plain decoding where they are certain, its distribution where not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import RequestError, SamplingParams, Speculation
from llmx.runtime.draft import DraftModel, common
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.filters import probabilities
from llmx.runtime.history import History
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.pace import Budget, Costs, Pace, Probe, Progress, best_count
from llmx.runtime.sampling import distribution
from llmx.runtime.scheduler import Request
from llmx.runtime.speculation import PromptLookup, check_backend, check_vocabularies
from llmx.runtime.speculator import Speculator
from llmx.runtime.tokenizer import Tokenizer
from scipy.stats import chi2, chisquare
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

VOCAB = 12


@cache
def noise(tokens: tuple[int, ...], vocab: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *tokens]).standard_normal(vocab).astype(np.float32)


class Model(FakeBackend):
    """Looks at the last few tokens alone, so that texts repeat; a draft is the model with some noise."""

    def __init__(self, slots: int = 4, max_length: int = 64, vocab: int = VOCAB, error: float = 0.0) -> None:
        super().__init__(slots, max_length, vocab)
        self.error = error

    def next_logits(self, tokens: list[int]) -> np.ndarray:
        near = tuple(int(t) for t in tokens[-2:])
        return 1.5 * noise(near, self.vocab_size, 1) + np.float32(self.error) * noise(near, self.vocab_size, 2)


class RowByRow(Model):
    verifies_batches = False


def make_tokenizer(vocab: int = VOCAB, eos: list[int] | None = None) -> Tokenizer:
    raw = RawTokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    return Tokenizer(raw, TokenizerInfo(eos_token_ids=eos or []))


def make_engine(
    backend: Model, drafter: str | None, eos: list[int] | None = None, chunk: int = 5, **options: Any
) -> Engine:
    speculator = None
    if drafter == "lookup":
        settings = Speculation(prompt_lookup=True, min_ngram=1, **options)
        speculator = Speculator(settings, backend, PromptLookup(settings.max_ngram, settings.min_ngram))
    elif drafter == "draft":
        draft = Model(backend.slots, backend.max_length - 7, backend.vocab_size + 3, error=0.5)
        settings = Speculation(draft="a package", **options)
        speculator = Speculator(settings, backend, DraftModel(draft, backend.vocab_size, 4), Costs(0.05, 0.1))
    tokenizer = make_tokenizer(backend.vocab_size, eos)
    return Engine(backend, tokenizer, chunk, speculator=speculator)


def run(engine: Engine) -> None:
    for _ in range(200_000):
        if not engine.has_work:
            return
        engine.step()
        engine.check_integrity()
        if engine.speculator is not None and isinstance(engine.speculator._drafter, DraftModel):
            engine.speculator._drafter.check_integrity()
    raise AssertionError("the engine does not come to an end")


def told(request: Request) -> list[Any]:
    return [(s.output_ids, s.text, s.logprobs, s.finish_reason, s.stop_reason) for s in request.sequences]


MIXES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_p": st.just(0.8),
        "top_k": st.integers(1, 5),
        "repetition_penalty": st.sampled_from([0.8, 1.4]),
        "frequency_penalty": st.sampled_from([0.5, -0.5]),
        "no_repeat_ngram_size": st.integers(2, 3),
        "min_tokens": st.integers(0, 6),
        "logprobs": st.integers(0, 2),
        "stop": st.sampled_from(["t3", "t1t2", "t5"]),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=2),
        "logit_bias": st.just({2: 1.5}),
        "n": st.integers(1, 3),
    },
)


@settings(max_examples=120, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=5),
    mixes=st.lists(MIXES, min_size=5, max_size=5),
    drafter=st.sampled_from(["lookup", "draft"]),
    backend=st.sampled_from([Model, RowByRow]),
    guesses=st.sampled_from([None, 1, 3, 6]),
    slots=st.integers(1, 4),
    recompute_at=st.sampled_from([None, 13]),
)
def test_tokens_are_those_of_plain_decoding(
    prompts: list[list[int]],
    mixes: list[dict[str, Any]],
    drafter: str,
    backend: type[Model],
    guesses: int | None,
    slots: int,
    recompute_at: int | None,
) -> None:
    """At temperature 0, and at any where guesses are not drawn; with everything else of a request."""
    results = []
    for which in (None, drafter):
        model = backend(slots, 40)
        model.recompute_at = recompute_at
        engine = make_engine(model, which, [4], **({"num_tokens": guesses} if which else {}))
        requests = []
        for index, (prompt, mix) in enumerate(zip(prompts, mixes, strict=False)):
            options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 14, "seed": index, **mix}
            if drafter == "draft":
                options["temperature"] = 0.0
            requests.append(engine.add(None, prompt, SamplingParams(**options).resolved({})))
        run(engine)
        assert not any(r.error for r in requests) or which is None
        results.append([(str(r.error), told(r)) for r in requests])
    assert results[0] == results[1]


@pytest.mark.parametrize("drafter", ["draft", pytest.param("lookup", marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_distribution_is_that_of_plain_sampling(drafter: str, temperature: float) -> None:
    """The first three tokens of 20,000 outputs against their exact probabilities under the sampler."""
    vocab, prompt, count = 5, [1, 3, 1, 3, 2, 1, 3], 20_000
    params = SamplingParams(temperature=temperature, top_p=0.9, max_tokens=4, n=50, ignore_eos=True).resolved({})
    model = Model(10, 40, vocab)
    engine = make_engine(model, drafter, num_tokens=3)
    assert isinstance(engine.backend, Model)
    seen: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for index in range(count // params.n):
        request = engine.add(None, prompt, SamplingParams(**{**vars(params), "seed": 1000 * index}))
        while engine.has_work:
            engine.step()
        seen.update(tuple(s.output_ids[:3]) for s in request.sequences)
        drafted, accepted = drafted + request.metrics.num_drafted, accepted + request.metrics.num_accepted
    assert 0.05 < accepted / drafted < 0.98  # both ways of a token are tried
    expected = np.zeros(vocab**3)
    for index, triple in enumerate(product(range(vocab), repeat=3)):
        chance, tokens = 1.0, list(prompt)
        for token in triple:
            c = distribution(model.next_logits(tokens), params, History(prompt))
            place = np.flatnonzero(c.ids == token)
            chance *= float(probabilities(c.logits)[place[0]]) if len(place) else 0.0
            tokens.append(token)
        expected[index] = chance
    observed = np.array([seen[triple] for triple in product(range(vocab), repeat=3)])
    assert observed[expected == 0].sum() == 0
    likely = expected * count >= 5
    observed = np.append(observed[likely], observed[~likely].sum())
    chances = np.append(expected[likely], expected[~likely].sum())
    if chances[-1] * count < 5:
        observed, chances = observed[:-1], chances[:-1] / chances[:-1].sum()
    assert chisquare(observed, chances * observed.sum()).pvalue > 0.01


def test_a_wrong_law_would_be_found() -> None:
    """The test above has the power to see that a draft's own tokens are no draws of the model."""
    model, draft = Model(), Model(error=0.5)
    p, q = (probabilities(m.next_logits([1, 3])) for m in (model, draft))
    assert chi2.sf(20_000 * float(((p - q) ** 2 / p).sum()), VOCAB - 1) < 1e-9


def test_statistics() -> None:
    engine = make_engine(Model(2, 64), "lookup", num_tokens=4)
    request = engine.add(None, [1, 2, 3] * 5, SamplingParams(temperature=0.0, max_tokens=30).resolved({}))
    run(engine)
    metrics, [sequence] = request.metrics, request.sequences
    assert metrics.num_verifications > 0 and metrics.num_accepted <= metrics.num_drafted
    plain = 30 - 1 - metrics.num_verifications - metrics.num_accepted  # the prompt's pass gives one token
    assert plain >= 0 and len(sequence.output_ids) == 30
    assert metrics.mean_accepted_length == 1 + metrics.num_accepted / metrics.num_verifications
    decodes = engine.backend.num_decodes  # type: ignore[attr-defined]
    assert decodes == plain


def test_guesses_follow_their_success() -> None:
    costs = Costs(position=0.05, guess=0.1)
    good, bad = Progress(), Progress()
    for _ in range(20):
        good.note(4, 4)
        bad.note(0, 1)
    assert good.num_guesses(8, costs.line()) > Progress().num_guesses(8, costs.line()) > 0
    counts = [bad.num_guesses(8, costs.line()) for _ in range(16 + 32 + 64)]
    assert [i for i, count in enumerate(counts) if count] == [15, 47, 111]  # it looks again, more and more seldom
    assert max(counts) == 1
    assert good.num_guesses(3, costs.line()) == 3
    assert good.num_guesses(8, Costs(1.0, 0.0).line()) == 0
    again = Progress(0.1, Probe(4, 4, passes=2))
    assert [again.num_guesses(8, costs.line()) for _ in range(12)] == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0]


def test_the_count_is_the_one_that_promises_most() -> None:
    """Against every count tried, tokens drawn one by one."""
    rng = np.random.default_rng(0)
    costs = Costs(0.06, 0.11, 0.05)
    for rate in (0.2, 0.5, 0.8, 0.95):
        stands = rng.random((20_000, 8)) < rate
        speeds = [1.0]
        for count in range(1, 9):
            tokens = 1 + np.cumprod(stands[:, :count], axis=1).sum(axis=1).mean()
            start, slope = costs.line()
            speeds.append(tokens / (start + count * slope))
        assert speeds[best_count(rate, 8, costs.line())] > max(speeds) - 0.03


def test_costs_are_learned_while_requests_run() -> None:
    pace = Pace(Costs(0.05, 0.1), plain=1e-3)
    assert best_count(0.6, 8, pace.line(1)) > 0
    for _ in range(30):
        pace.note(1, 2, 2.4e-3)  # much more than was measured
    assert pace.line(1) == (pytest.approx(2.4 - 0.3, rel=0.05), pytest.approx(0.15))
    assert best_count(0.6, 8, pace.line(1)) == 0
    assert pace.line(4) == (1, pytest.approx(4 * 0.05 + 0.1))  # other batches are another matter
    pace.note(1, 2, 10.0)  # one pass that was disturbed is not believed
    assert pace.line(1)[0] < 2.3
    for _ in range(80):
        pace.note(1, 2, 1.2e-3)
    assert pace.stale(1) and pace.stale(2) and best_count(0.6, 8, pace.line(1)) > 0
    pace.note(1, 0, 1e-3)
    assert not pace.stale(1)


def test_what_guesses_may_cost_is_bounded() -> None:
    """A hundredth of the tokens, and a sum to begin with; after that they rest until it is earned."""
    budget, pace, lost, passes = Budget(), Pace(Costs(), plain=1e-3), 0.0, 0
    for _ in range(20_000):
        budget.earn(1)
        if not budget.exhausted:
            lost += pace.lost(1, 2.5e-3, 0)
            budget.spend(pace.lost(1, 2.5e-3, 0))
            passes += 1
    assert 0.005 * 20_000 < lost < 30 + 0.01 * 20_000 and passes > 100
    assert pace.lost(1, 1e-3, 3) == -3 and pace.lost(4, 1e-3, 0) == 0  # nothing is known of four rows
    for _ in range(100):
        budget.spend(-3)
    assert not budget.spent and not budget.exhausted


def test_a_sleeping_sequence_wakes_when_its_probe_is_due() -> None:
    known, asked = Progress(0.0, Probe(8, 64)), []
    known.idle = True
    due = []
    for length in range(10, 200):
        if length >= known.wake:
            asked.append(length)
            if known.due(length, 1, earned=length > 100):
                due.append(length)
                known.note(0, 1)
                known.idle = True
    assert due and due[0] > 100 and len(asked) < 40
    assert [b - a for a, b in pairwise(due)] == [16, 32]


class Clock:
    """A clock that only the calls of backends move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def slow_down(self, backend: Any, seconds: float) -> None:
        """Each of the backend's calls takes so long."""

        def after(call: Callable[..., Any], *args: Any, **more: Any) -> Any:
            self.now += seconds
            return call(*args, **more)

        for name in ("decode", "prefill", "verify"):
            setattr(backend, name, partial(after, getattr(backend, name)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def test_a_draft_that_does_not_pay_is_left_alone(clock: Clock) -> None:
    """Guesses that cost as much as a step: after a few passes next to none are made, in this request and the next."""
    model = Model(2, 400)
    engine = make_engine(model, "draft")
    draft = engine.speculator._drafter._backend  # type: ignore[union-attr,attr-defined]
    for backend in (model, draft):
        clock.slow_down(backend, 1e-3)
    drafted = []
    for _ in range(2):
        request = engine.add(None, [1, 2], SamplingParams(temperature=0.0, max_tokens=300).resolved({}))
        run(engine)
        drafted.append(request.metrics.num_drafted)
    assert drafted[0] < 80 and drafted[1] < 40  # of 300 tokens
    assert engine.speculator.counts[1] == sum(drafted)  # type: ignore[union-attr]


@pytest.mark.parametrize("drafter", ["draft", "lookup"])
def test_passes_are_timed_when_a_model_is_loaded(drafter: str, clock: Clock) -> None:
    model = Model(2, 400)
    engine = make_engine(model, drafter)
    speculator = engine.speculator
    assert speculator is not None
    clock.slow_down(model, 4e-3)
    if drafter == "draft":
        clock.slow_down(speculator._drafter._backend, 2e-3)  # type: ignore[attr-defined]
    speculator.calibrate(engine)
    assert speculator.costs.guess == pytest.approx(0.5 if drafter == "draft" else 0.0, abs=0.01)
    assert abs(speculator.costs.position) < 0.01 and abs(speculator.costs.fixed) < 0.01
    assert model.num_prefills >= 7  # the prompt, and passes of both widths
    assert speculator.counts == [0, 0, 0] and not engine.has_work and engine.num_output_tokens == 0
    engine.check_integrity()
    request = engine.add(None, [1, 2], SamplingParams(temperature=0.0, max_tokens=30).resolved({}))
    run(engine)
    assert len(request.sequences[0].output_ids) == 30


def test_a_failing_draft_is_no_failure() -> None:
    """NaN from the draft: the request goes on without guesses; NaN from the model ends its request alone."""
    engine = make_engine(Model(2, 40), "draft", num_tokens=3)
    draft = engine.speculator._drafter._backend  # type: ignore[union-attr,attr-defined]
    good = draft.next_logits
    draft.next_logits = lambda tokens: good(tokens) * float("nan")
    request = engine.add(None, [1, 2], SamplingParams(temperature=0.0, max_tokens=9).resolved({}))
    run(engine)
    assert request.error is None and len(request.sequences[0].output_ids) == 9
    draft.next_logits = good
    model = engine.backend
    original = model.next_logits  # type: ignore[attr-defined]
    model.next_logits = lambda tokens: original(tokens) * (float("nan") if len(tokens) == 9 and tokens[0] == 7 else 1)  # type: ignore[attr-defined]
    bad, fine = (
        engine.add(None, [first, 2], SamplingParams(temperature=0.0, max_tokens=12).resolved({})) for first in (7, 8)
    )
    run(engine)
    assert "NaN" in str(bad.error) and fine.error is None
    assert len(fine.sequences[0].output_ids) == 12


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common(a: list[int], b: list[int]) -> None:
    count = common(a, b)
    assert a[:count] == b[:count] and (count == min(len(a), len(b)) or a[count] != b[count])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a draft package or prompt_lookup"),
        ({"draft": "x", "prompt_lookup": True}, "one of the two"),
        ({"draft": "x", "num_tokens": 0}, "num_tokens must be a whole number from 1 to 64"),
        ({"draft": "x", "max_tokens": True}, "max_tokens must be a whole number from 1 to 64"),
        ({"prompt_lookup": True, "min_ngram": 3, "max_ngram": 2}, "1 <= min_ngram <= max_ngram"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Speculation(**options)


def test_what_cannot_speculate() -> None:
    with pytest.raises(RequestError, match="a recurrence, which cannot go back"):
        check_backend({"grow", "replace"})
    with pytest.raises(RequestError, match="token by token"):
        check_backend({"grow", "cross"})
    with pytest.raises(RequestError, match=r"another vocabulary than the model \(token 't12' is 12 and None\)"):
        check_vocabularies(make_tokenizer(13), make_tokenizer(12))
    with pytest.raises(RequestError, match="end tokens"):
        check_vocabularies(make_tokenizer(12, [1]), make_tokenizer(12, [2]))
    check_vocabularies(make_tokenizer(12, [1]), make_tokenizer(12, [1]))
