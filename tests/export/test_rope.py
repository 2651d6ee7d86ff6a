"""Rotary factors that depend on the sequence's length, at and past the length where they change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmx.export import ExportOptions, ExportResult, export_model, rope
from llmx.export.trace import probe_layers
from llmx.runtime import LLM, SamplingParams
from llmx.runtime.errors import UnsupportedModelError, VerificationError
from llmx.runtime.manifest import Manifest, load_manifest
from zoo.models import TINY, VOCAB, greedy, make_model, save_checkpoint

EDGE = 32
BY_LENGTH = ["llama-dynamic", "llama-longrope", "phi3-longrope"]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def random_prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(1, VOCAB, length).tolist()


def takes_lengths(manifest: Manifest) -> bool:
    named = [graph.input_named("rope_lengths") for graph in manifest.graphs.values()]
    assert len(set(named)) == 1
    return named[0] is not None


def export_of(name: str, work: Path, max_length: int | None = None, **overrides: Any) -> ExportResult:
    checkpoint = save_checkpoint(make_model(name, **overrides), work / "checkpoint")
    return export_model(ExportOptions(str(checkpoint), work / "package", max_length=max_length))


@pytest.mark.parametrize("name", BY_LENGTH)
def test_around_the_original_length(name: str, package: Callable[[str], Path]) -> None:
    model = make_model(name)
    prompts = [random_prompt(length) for length in (EDGE - 1, EDGE, EDGE + 1)]
    expected = [greedy(model, prompt, GREEDY.max_tokens or 0) for prompt in prompts]
    with LLM(package(name), slots=3, prefill_chunk=10) as llm:
        assert [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY)] == expected
        assert [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts] == expected


@pytest.mark.parametrize("name", BY_LENGTH)
def test_scores_are_those_of_the_whole_text(name: str, package: Callable[[str], Path]) -> None:
    prompt = random_prompt(EDGE + 20)
    with torch.no_grad():
        reference = torch.log_softmax(make_model(name)(torch.tensor([prompt])).logits[0], -1)
    want = [float(reference[i, token]) for i, token in enumerate(prompt[1:])]
    with LLM(package(name), slots=1, prefill_chunk=10) as llm:
        np.testing.assert_allclose(llm.score([prompt])[0], want, atol=1e-4)
        [out] = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert out.prompt_logprobs is not None
    chosen = [entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True) if entry]
    np.testing.assert_allclose(chosen, want, atol=1e-4)


def test_what_the_manifest_says(package: Callable[[str], Path]) -> None:
    dynamic, longrope, phi3, yarn = (load_manifest(package(n)) for n in [*BY_LENGTH, "llama-yarn"])
    assert [takes_lengths(m) for m in (dynamic, longrope, phi3, yarn)] == [True, True, True, False]
    assert [m.model.recompute_at for m in (dynamic, longrope, phi3, yarn)] == [None, None, EDGE, None]
    assert dynamic.model.context_length == 8 * EDGE  # the config's 32, stretched by the factor


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_a_context_within_the_original_length_has_static_factors(name: str, tmp_path: Path) -> None:
    manifest = export_of(name, tmp_path, max_length=EDGE).manifest
    assert not takes_lengths(manifest) and manifest.model.recompute_at is None
    prompt = random_prompt(9)
    with LLM(tmp_path / "package") as llm:
        got = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
    assert got == greedy(make_model(name), prompt, EDGE - 9)


@pytest.mark.parametrize("original", [EDGE, 2000])
def test_verification_crosses_the_original_length(
    original: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where a prompt of that length would cost too much: 2000 exceeds what verification runs."""
    frequencies = rope._Rotary.frequencies

    def always_short(self: Any, lengths: torch.Tensor | None) -> torch.Tensor:
        return frequencies(self, None if lengths is None else lengths * 0 + 1)

    overrides = TINY["llama-longrope"]["rope_parameters"] | {"original_max_position_embeddings": original}
    options: dict[str, Any] = {"rope_parameters": overrides, "max_position_embeddings": 4096}
    assert export_of("llama-longrope", tmp_path / "right", **options).manifest.verification.status == "passed"
    monkeypatch.setattr(rope._Rotary, "frequencies", always_short)
    with pytest.raises(VerificationError, match="disagree"):
        export_of("llama-longrope", tmp_path / "wrong", **options)


def test_factors_chosen_elsewhere_are_refused_by_name(tmp_path: Path) -> None:
    parameters = TINY["phi3-longrope"]["rope_parameters"] | {"short_mscale": 1.1, "long_mscale": 1.3}
    TINY["phimoe"] = {**TINY["phi3-longrope"], "num_local_experts": 4, "rope_parameters": parameters}
    try:
        with pytest.raises(UnsupportedModelError, match='rope_type "longrope"'):
            export_of("phimoe", tmp_path)
    finally:
        del TINY["phimoe"]


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, module in model.named_modules() for key, value in vars(module).items()}


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope", "llama"])
def test_probing_leaves_the_model_as_it_was(name: str) -> None:
    """Whatever a module keeps of a run under fake tensors is no value."""
    model = make_model(name)
    model.set_attn_implementation("llmx")

    def keep(module: Any, *_: Any) -> None:
        module.register_buffer("inv_freq", module.inv_freq * 2, persistent=False)
        module.original_inv_freq.mul_(3)
        module.kept = torch.ones(3)

    hook = model.model.rotary_emb.register_forward_hook(keep)
    buffers = {key: (buffer, buffer.clone()) for key, buffer in model.named_buffers()}
    before = state_of(model)
    probe_layers(model)
    hook.remove()
    after = state_of(model)
    assert after.keys() == before.keys()
    assert all(value is before[key] for key, value in after.items() if isinstance(value, torch.Tensor))
    for key, buffer in model.named_buffers():
        assert buffer is buffers[key][0] and torch.equal(buffer, buffers[key][1])


def test_a_reference_is_a_fresh_models() -> None:
    """Dynamic NTK keeps the factors of the longest sequence seen."""
    long, short = random_prompt(60), random_prompt(EDGE)
    model = make_model("llama-dynamic")
    fresh = greedy(model, short, 20)
    greedy(model, long, 20)
    assert greedy(model, short, 20) == fresh
    assert isinstance(model.model.rotary_emb.max_seq_len_cached, int)
