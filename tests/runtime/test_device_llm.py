"""`LLM` over the device backend (on the CPU provider) generates what it does over the host's, whatever is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llmx.runtime import LLM, SamplingParams, Speculation
from llmx.runtime import llm as llm_module
from llmx.runtime.device_backend import DeviceBackend
from llmx.runtime.device_memory import HostMemory
from llmx.runtime.device_sessions import open_device_sessions
from llmx.runtime.manifest import Manifest
from llmx.runtime.state import plan_state

PROMPTS = [[5, 9, 11, 4], [7], list(range(20, 60)), [3, 3, 3], [200, 100], [31, 32, 33, 34, 35, 36]]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"n": 3, "temperature": 0.9, "top_k": 20, "seed": 4},
    {"temperature": 0.7, "top_p": 0.8, "seed": 1},
    {"temperature": 1.3, "min_p": 0.05, "seed": 2},
    {"min_tokens": 6, "logprobs": 2},
    {"temperature": 0.8, "top_k": 30, "repetition_penalty": 1.3, "seed": 9},
    {"prompt_logprobs": 1},
    {"num_beams": 3},
    {"logit_bias": {5: 2.0}, "temperature": 0.5, "seed": 3},
]


def on_device(folder: Path, manifest: Manifest, max_length: int, slots: int, **rest: Any) -> DeviceBackend:
    memory = HostMemory()
    sessions = open_device_sessions(folder, manifest, memory, ["CPUExecutionProvider"])
    return DeviceBackend(manifest, sessions, memory, plan_state(manifest, max_length, slots))


@pytest.fixture(scope="module")
def pair(device_package: Callable[[str], Path]) -> Iterator[tuple[LLM, LLM]]:
    folder = device_package("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_module, "open_backend", on_device)
        device = LLM(folder, max_length=96, slots=4, prefill_chunk=16, prefix_cache_bytes=1 << 20)
    host = LLM(folder, "cpu", max_length=96, slots=4, prefill_chunk=16)
    assert isinstance(device.backend, DeviceBackend)
    with device, host:
        yield device, host


def said(llm: LLM, params: list[SamplingParams]) -> list[Any]:
    outputs = llm.generate([PROMPTS[i % len(PROMPTS)] for i in range(len(params))], params)
    return [[(o.token_ids, o.finish_reason, o.text) for o in output.outputs] for output in outputs]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "greedy")
def test_alone(options: dict[str, Any], pair: tuple[LLM, LLM]) -> None:
    params = [SamplingParams(max_tokens=12, ignore_eos=True, **options)]
    assert said(pair[0], params) == said(pair[1], params)


def test_all_at_once(pair: tuple[LLM, LLM]) -> None:
    """More requests than slots, of every kind, joining and leaving; twice, so that prompts come from the prefix cache."""
    params = [SamplingParams(max_tokens=5 + i % 7, ignore_eos=True, **options) for i, options in enumerate(OPTIONS * 2)]
    want = said(pair[1], params)
    assert said(pair[0], params) == want
    assert said(pair[0], params) == want


def test_scores(pair: tuple[LLM, LLM]) -> None:
    [got], [want] = (llm.score([PROMPTS[2]]) for llm in pair)
    assert got == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("num_tokens", [3, None])
def test_guesses_change_nothing(
    num_tokens: int | None, pair: tuple[LLM, LLM], device_package: Callable[[str], Path]
) -> None:
    """Prompt lookup on the device, judged from its most likely tokens, its candidates, or whole rows."""
    folder = device_package("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm_module, "open_backend", on_device)
        device = LLM(folder, max_length=96, slots=4, speculative=Speculation(prompt_lookup=True, num_tokens=num_tokens))
    asked: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "top_p": 0.8, "seed": 1},
        {"temperature": 0.4, "seed": 5},
        {"min_tokens": 6, "logprobs": 2},
        {"temperature": 0.8, "top_k": 30, "repetition_penalty": 1.1, "seed": 9},
        {"temperature": 0.3, "min_p": 0.2, "seed": 2},
    ]
    params = [SamplingParams(max_tokens=30, ignore_eos=True, **options) for options in asked]
    with device:
        assert said(device, params) == said(pair[0], params)
        drafted = sum(out.metrics.num_drafted for out in device.generate(PROMPTS, params))
        assert drafted > 0 or num_tokens is None  # where guesses do not pay there are none
