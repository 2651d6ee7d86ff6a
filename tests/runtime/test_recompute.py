"""State that is computed anew at a certain length (`Backend.recompute_at`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.params import SamplingParams
from llmx.runtime.parked_state import Part, PositionState
from llmx.runtime.session import Session
from llmx.runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

VOCAB, AT = 32, 9


class Recorded(FakeBackend):
    """Notes each prefill as (slot, start, tokens, prompt_length)."""

    recompute_at = AT

    def __init__(self) -> None:
        super().__init__(2, 64, VOCAB)
        self.calls: list[tuple[int, int, int, int | None]] = []
        self.anew: set[int] = set()  # slots whose state was computed anew
        self.copies: list[tuple[int, bool]] = []  # (length, of state computed anew)

    def prefill(
        self, slot: int, token_ids: np.ndarray, start: int, positions: np.ndarray, prompt_length: int | None = None
    ) -> np.ndarray:
        self.calls.append((slot, start, len(token_ids), prompt_length))
        (self.anew.add if prompt_length == AT + 1 else self.anew.discard)(slot)
        return super().prefill(slot, token_ids, start, positions, prompt_length)

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        self.copies.append((length, source in self.anew))
        (self.anew.add if source in self.anew else self.anew.discard)(target)
        super().copy_slot(source, target, length, start)


def run(prompt: list[int], **options: Any) -> tuple[Recorded, list[list[int]]]:
    backend = Recorded()
    raw = RawTokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    engine = Engine(backend, Tokenizer(raw, TokenizerInfo()), 4)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **options})
    request = engine.add(None, prompt, params.resolved({}))
    while engine.has_work:
        engine.step()
    return backend, [sequence.output_ids for sequence in request.sequences]


@pytest.mark.parametrize(("length", "recomputed"), [(3, False), (4, False), (5, True), (9, True), (10, False)])
def test_once_when_a_sequence_grows_past_it(length: int, recomputed: bool) -> None:
    prompt = list(range(1, length + 1))
    backend, outputs = run(prompt)
    assert outputs == [FakeBackend(1, 64, VOCAB).greedy(prompt, 6)]
    prefill = [(0, start, min(4, length - start), length) for start in range(0, length, 4)]
    again = [(0, 0, 4, AT + 1), (0, 4, 4, AT + 1), (0, 8, 1, AT + 1)]
    assert backend.calls == prefill + (again if recomputed else [])


def test_a_sibling_does_not_copy_state_that_was_computed_anew() -> None:
    """Many answers in two slots, ending at random: a slot becomes free when the other's sequence has grown past it."""
    length = AT - 2
    stops = list(range(0, VOCAB, 3))
    backend, _ = run(list(range(length)), n=16, temperature=5.0, seed=1, max_tokens=20, stop_token_ids=stops)
    forks = [anew for copied, anew in backend.copies if copied == length]
    assert forks and not any(forks)
    assert any(prompt_length == AT + 1 for *_, prompt_length in backend.calls)


def test_a_session_keeps_nothing_of_what_was_there_before() -> None:
    """Its second answer grows past the length: what it had kept of the first is not what the slot holds any more."""
    backend, session = Recorded(), object.__new__(Session)
    session._parked = PositionState([Part(0, 4, [np.array([99, 99, 99, 99])])], 4)
    raw = RawTokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    engine = Engine(backend, Tokenizer(raw, TokenizerInfo()), 4)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    session.restore = lambda backend, sequence: 0  # type: ignore[method-assign]
    engine.add(None, [1, 2, 3, 4, 5], params.resolved({}), session=session)
    while engine.has_work:
        engine.step()
    assert backend.anew and [part.start for part in session._parked.parts] == [0]
    assert session._parked.parts[0].arrays[0].tolist() == session.tokens[:10]
