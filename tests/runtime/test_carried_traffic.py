"""Real carried state under traffic: whatever else runs, comes, goes or is cancelled, a request gets what it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, SamplingParams, load_manifest
from llmx.runtime.carried import CarriedBackend
from llmx.runtime.scheduler import Request
from zoo.models import VOCAB, make_seq2seq, save_checkpoint

REQUESTS, SLOTS = 30, 3


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("t5")
    save_checkpoint(make_seq2seq("t5"), work / "checkpoint")
    return export_model(ExportOptions(str(work / "checkpoint"), work / "package", verify=False)).path


def random_request(llm: LLM, rng: np.random.Generator) -> Request:
    """A prompt of 1 to 40 tokens (around the shortest that goes through a prefill graph), up to five continuations of it
    (more than there are slots), greedy or drawn.
    """
    ids = rng.integers(3, VOCAB, rng.choice([1, 2, 10, 11, 12, 40])).tolist()
    several = int(rng.choice([1, 1, 2, 5]))
    params = SamplingParams(
        n=several,
        max_tokens=int(rng.integers(1, 9)),
        temperature=float(rng.choice([0.0, 0.8])),
        seed=int(rng.integers(1000)),
        ignore_eos=True,
    ).resolved({})
    if llm.manifest.seq2seq is None:
        return llm.engine.add(None, ids, params)
    return llm.engine.add(None, llm.manifest.seq2seq.decoder_prompt, params, None, np.array(ids))


def tokens_of(request: Request) -> list[list[int]]:
    return [sequence.output_ids for sequence in request.sequences]


def alone(llm: LLM, request: Request) -> list[list[int]]:
    """What the same request says with the engine to itself, each continuation by itself."""
    outputs = []
    for sequence in request.sequences:
        seed = None if request.params.seed is None else request.params.seed + sequence.index
        again = llm.engine.add(None, request.prompt_ids, with_one(request.params, seed), None, request.source)
        while llm.engine.has_work:
            llm.engine.step()
        outputs += tokens_of(again)
    return outputs


def with_one(params: Any, seed: int | None) -> Any:
    from dataclasses import replace

    return replace(params, n=1, seed=seed)


@pytest.mark.parametrize("name", ["bloom", "mamba", "lfm2", "t5"])
def test_traffic(name: str, package: Callable[[str], Path], request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("t5") if name == "t5" else package(name)
    rng = np.random.default_rng(11)
    with LLM(folder, slots=SLOTS, max_length=64, threads=1) as llm:
        assert isinstance(llm.backend, CarriedBackend)
        live: list[Request] = []
        cancelled = set()
        for _ in range(REQUESTS):
            live.append(random_request(llm, rng))
            for _ in range(int(rng.integers(0, 6))):
                llm.engine.step()
                llm.engine.scheduler.pool.check_integrity()
            victim = live[int(rng.integers(len(live)))]
            if rng.random() < 0.3 and not victim.finished:
                llm.engine.cancel(victim)
                cancelled.add(id(victim))
        while llm.engine.has_work:
            llm.engine.step()
        assert not llm.engine.scheduler.pool.held() and cancelled
        assert all(r.error is None for r in live)
        for asked in live:
            wanted = alone(llm, asked)
            for got, want in zip(tokens_of(asked), wanted, strict=True):
                assert got == (want[: len(got)] if id(asked) in cancelled else want)


@pytest.mark.parametrize("name", ["bloom", "lfm2", "t5"])
def test_what_was_preempted_goes_on_as_it_would_have(
    name: str, package: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    """Three slots in the memory of a sequence and a third: prompts, recurrences and sources are read again."""
    folder = request.getfixturevalue("t5") if name == "t5" else package(name)
    manifest, rng = load_manifest(folder), np.random.default_rng(5)
    # a state that grows is there twice while a step makes it
    bound = manifest.state_bytes_per_slot() * 3 + manifest.state_bytes_per_token() * (64 + 88)
    with LLM(folder, slots=3, max_length=64, threads=1, kv_cache_memory_bytes=bound) as llm:
        live: list[Request] = []
        for index in range(6):
            params = SamplingParams(max_tokens=40, temperature=float(index % 2), seed=index, ignore_eos=True).resolved(
                {}
            )
            ids = rng.integers(3, VOCAB, 12).tolist()
            if llm.manifest.seq2seq is None:
                live.append(llm.engine.add(None, ids, params))
            else:
                live.append(llm.engine.add(None, llm.manifest.seq2seq.decoder_prompt, params, None, np.array(ids)))
        while llm.engine.has_work:
            llm.engine.step()
            llm.engine.check_integrity()
        assert llm.engine.scheduler.num_preempted > 1
        assert [tokens_of(asked) for asked in live] == [alone(llm, asked) for asked in live]
