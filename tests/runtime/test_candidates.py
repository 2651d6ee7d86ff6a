"""Sampling from the top of a row: the same tokens are possible, with the same probabilities, as from the whole row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import LlmxError, SamplingParams
from llmx.runtime.candidate_rows import Rows
from llmx.runtime.candidates import NUM_TOP, WHOLE_ROW, asked, choose_from_step, draw_from_all, narrowed
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.filters import all_of, filtered
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.sampling import Choice, make_generator
from llmx.runtime.step_logits import HostLogits, StepLogits, TopLogits, TopRows
from llmx.runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models


def top_of(row: np.ndarray, temperature: float, count: int = NUM_TOP) -> TopLogits:
    """The definition, in float64."""
    ids = np.argsort(-row, kind="stable")[:count]
    scaled = (row.astype(np.float64) - row.max()) / temperature
    return TopLogits(ids, row[ids].astype(np.float32), float(np.log(np.exp(scaled).sum())), temperature)


class DeviceLogits(HostLogits):
    """What a GPU would return: the top of each row, and a count of the rows that were read whole."""

    def __init__(self, logits: np.ndarray, temperatures: np.ndarray) -> None:
        super().__init__(logits)
        self.temperatures, self.num_read = temperatures, 0

    def row(self, index: int) -> np.ndarray:
        self.num_read += 1
        return super().row(index)

    def greedy(self, index: int) -> int | None:
        return int(self._logits[index].argmax())

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        return self._logits.argmax(1), np.ones(len(self._logits), bool)

    def top(self, index: int) -> TopLogits | None:
        return top_of(self._logits[index], float(self.temperatures[index]))

    def tops(self) -> TopRows | None:
        tops = [top_of(row, max(float(t), 1e-3)) for row, t in zip(self._logits, self.temperatures, strict=True)]
        ids, logits = np.array([t.ids for t in tops]), np.array([t.logits for t in tops])
        return TopRows(ids, logits, np.array([t.log_sum for t in tops]), np.asarray(self.temperatures))


def resolved(**options: object) -> SamplingParams:
    return SamplingParams(**options).resolved({})  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([65, 100, 700, 5000]),
    spread=st.floats(0.2, 8.0),
    steps=st.sampled_from([2.0, 16.0, 1024.0]),  # values are multiples of 1 / steps: few of them make many equals
    temperature=st.floats(0.05, 4.0),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 63, 64]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.9]),
)
def test_what_is_left_is_what_the_whole_row_leaves(
    seed: int, vocab: int, spread: float, steps: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    rng = np.random.default_rng(seed)
    row = (np.round(rng.standard_normal(vocab) * spread * steps) / steps).astype(np.float32)
    params = resolved(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = narrowed(top_of(row, temperature), params)
    want = filtered(all_of(row), params)
    if got is None:
        # never for want of trying: what is kept (by min-p and top-k, at least) reaches what equals the last of the top
        whole = resolved(temperature=temperature, top_k=top_k, min_p=min_p)
        kept = len(filtered(all_of(row), whole).ids) if top_k or min_p else len(want.ids)
        assert kept > np.count_nonzero(row > np.sort(row)[-NUM_TOP])
        return
    if not np.array_equal(got.ids, want.ids):  # only where a sum equals p or min_p but for rounding
        edge = set(got.ids.tolist()) ^ set(want.ids.tolist())
        assert len(edge) <= 1
        cut = row[list(edge)]
        weight = np.exp((cut - row.max()) / np.float32(temperature))
        assert abs(weight - min_p).min() < 1e-5 or top_p < 1.0
    else:
        np.testing.assert_allclose(got.logits - got.logits.max(), want.logits - want.logits.max(), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_draws_have_the_whole_rows_distribution(temperature: float) -> None:
    """Pearson's chi-square over every token and the tail's; at the 1e-4 level."""
    rng = np.random.default_rng(5)
    row = rng.standard_normal(400).astype(np.float32) * 1.5
    top = top_of(row, temperature)
    probs = np.exp(row.astype(np.float64) / temperature)
    probs /= probs.sum()
    generator, draws = make_generator(11), 40_000
    reads = 0

    def read() -> np.ndarray:
        nonlocal reads
        reads += 1
        return row

    counts = np.bincount([draw_from_all(top, read, generator) for _ in range(draws)], minlength=400)
    expected = probs * draws
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    statistic = float(((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum())
    freedom = len(observed) - 1
    assert statistic < freedom + 4.0 * np.sqrt(2 * freedom) + 10
    tail = 1 - probs[top.ids].sum()
    assert abs(reads - tail * draws) < 5 * np.sqrt(draws * max(tail * (1 - tail), 1e-4))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(2, 9),
    steps=st.sampled_from([2.0, 1024.0]),
    spread=st.floats(0.05, 8.0),
)
def test_rows_together_give_what_each_gives_alone(seed: int, rows: int, steps: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (np.round(rng.standard_normal((rows, 500)) * spread * steps) / steps).astype(np.float32)
    each = [
        resolved(
            temperature=float(rng.choice([0.0, 0.2, 1.0, 3.0])),
            top_k=int(rng.choice([0, 1, 5, 40, 64, 100])),
            top_p=float(rng.choice([1.0, 0.9, 0.3])),
            min_p=float(rng.choice([0.0, 0.05, 0.5])),
        )
        for _ in range(rows)
    ]
    asks = [asked(params) for params in each]
    step = DeviceLogits(logits, np.array(asks, np.float32))
    generators = [make_generator(row) for row in range(rows)]
    sampled = sum(ask > 0 for ask in asks)
    together = Rows(range(rows), each, generators, asks).choose(step)
    for row, (params, ask) in enumerate(zip(each, asks, strict=True)):
        alone = make_generator(row)
        choice = choose_from_step(step, row, params, alone, ask)
        if together[row] is None:
            assert choice is None or sampled < 2
            assert generators[row].random() == make_generator(row).random()
            continue
        got = Choice(together[row]) if isinstance(together[row], int) else together[row]()
        assert choice == got
        assert generators[row].random() == alone.random()  # the same numbers are used up


def test_one_number_is_drawn_each_time() -> None:
    row = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    for params in (resolved(temperature=1.0), resolved(temperature=1.0, top_k=5), resolved(temperature=2.0, top_p=0.3)):
        generator, other = make_generator(3), make_generator(3)
        step = DeviceLogits(row[None], np.array([params.temperature]))
        assert choose_from_step(step, 0, params, generator, asked(params)) is not None
        other.random()
        assert generator.random() == other.random()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_refused(bad: float) -> None:
    row = np.zeros((1, 100), np.float32)
    row[0, 7] = bad
    params = resolved(temperature=1.0)
    with np.errstate(invalid="ignore"), pytest.raises(LlmxError, match="NaN or infinite"):
        choose_from_step(DeviceLogits(row, np.ones(1)), 0, params, make_generator(0), asked(params))


def test_what_is_asked() -> None:
    assert asked(resolved(temperature=0.0)) == 0.0
    assert asked(resolved(temperature=0.7, top_k=50)) == 0.7
    assert asked(resolved(temperature=0.7, top_k=NUM_TOP + 1)) == WHOLE_ROW
    assert asked(resolved(temperature=0.0, logprobs=0)) == WHOLE_ROW
    assert asked(resolved(temperature=1e-60)) > 0


class _TopBackend(FakeBackend):
    """The fake with a device's step: as a backend on a GPU answers."""

    num_read = 0
    seen: list[float]

    def decode(
        self,
        token_ids: np.ndarray,
        lengths: np.ndarray,
        active: np.ndarray | None = None,
        temperatures: np.ndarray | None = None,
    ) -> StepLogits:
        logits = super().decode(token_ids, lengths, active).rows()
        assert temperatures is not None
        self.seen = temperatures.tolist()
        return DeviceLogits(logits, temperatures)


def test_an_engine_over_a_device_generates_what_the_plain_one_does() -> None:
    """Greedy, filtered and min_tokens rows in one batch; filtered draws fall on the same tokens, number for number."""
    vocab = 200
    raw = RawTokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    each = [
        resolved(temperature=0.0, max_tokens=9),
        resolved(temperature=0.8, top_k=12, seed=1, max_tokens=9),
        resolved(temperature=1.3, top_p=0.4, seed=2, max_tokens=9),
        resolved(temperature=0.0, min_tokens=5, max_tokens=9),
        resolved(temperature=0.0, logprobs=2, max_tokens=9),
    ]
    outputs = []
    for kind in (FakeBackend, _TopBackend):
        engine = Engine(kind(3, 64, vocab), Tokenizer(raw, TokenizerInfo(eos_token_ids=[7])), 4)
        requests = [engine.add(None, [3 + i, 1, 2], p) for i, p in enumerate(each)]
        while engine.has_work:
            engine.step()
        assert all(request.error is None for request in requests)
        outputs.append([request.sequences[0].output_ids for request in requests])
    assert outputs[0] == outputs[1]


def test_greedy_rows_of_the_host() -> None:
    """The lowest of the likeliest ids; nothing where the row is not finite or of a narrower type."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 40, (50, 300)).astype(np.float32)  # many equals
    logits = HostLogits(rows)
    for index, row in enumerate(rows):
        assert logits.greedy(index) == int(np.flatnonzero(row == row.max())[0])
    for bad in (np.nan, np.inf):
        rows[0, 17] = bad
        assert logits.greedy(0) is None
    assert HostLogits(np.full((1, 9), -np.inf, np.float32)).greedy(0) is None
    assert HostLogits(rows[1:].astype(np.float16)).greedy(0) is None
