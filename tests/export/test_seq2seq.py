"""Encoder-decoders against transformers: greedy tokens, ragged batches, what generation forces and suppresses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.export.verify_seq2seq import greedy
from llmx.runtime import LLM, ContextLengthError, FamilyError, RequestError, SamplingParams, load_manifest
from llmx.runtime.errors import UnsupportedModelError
from zoo.models import SEQ2SEQ, VOCAB, make_seq2seq, save_checkpoint

NEW_TOKENS = 48
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)


@pytest.fixture
def package(seq2seq_package: Any) -> Any:
    return seq2seq_package


def sources(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, size).tolist() for size in (7, 61, 1, 23, 64)]


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_greedy_equals_transformers(name: str, package: Any) -> None:
    model = make_seq2seq(name)
    wanted = sources(1)
    expected = [greedy(model, torch.tensor([s]), [2], NEW_TOKENS)[0, 1:].tolist() for s in wanted]
    with LLM(package(name), slots=3) as llm:
        assert {t.layout for t in llm.manifest.state} == {"grow", "cross"}
        assert [llm.generate(s, GREEDY)[0].outputs[0].token_ids for s in wanted] == expected
        batch = llm.generate(wanted, GREEDY)
        assert [out.outputs[0].token_ids for out in batch] == expected
        assert [out.prompt_token_ids for out in batch] == wanted
        streamed = [i for piece in llm.stream(wanted[0], GREEDY) for i in piece.token_ids]
        assert streamed == expected[0]


def test_continuations_share_the_source(package: Any) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=4, ignore_eos=True)
    with LLM(package("t5"), slots=3) as llm:
        source = sources(2)[1]
        [together] = llm.generate(source, params)
        for index, output in enumerate(together.outputs):
            alone = SamplingParams(max_tokens=12, temperature=1.0, seed=5 + index, ignore_eos=True)
            assert llm.generate(source, alone)[0].outputs[0].token_ids == output.token_ids


def test_what_generation_forces_and_suppresses(tmp_path: Path) -> None:
    model = make_seq2seq("bart")
    plain = greedy(model, torch.tensor([sources(3)[0]]), [2, 5], 12)[0].tolist()
    config = model.generation_config
    config.forced_bos_token_id, config.forced_eos_token_id, config.eos_token_id = 5, 0, 0
    config.suppress_tokens, config.begin_suppress_tokens, config.bad_words_ids = [plain[4]], [plain[2]], [[plain[3]]]
    config.pad_token_id, config.decoder_start_token_id, config.num_beams, config.max_new_tokens = 1, 2, 1, 12
    save_checkpoint(model, tmp_path / "checkpoint")
    result = export_model(ExportOptions(str(tmp_path / "checkpoint"), tmp_path / "package"))
    assert result.warnings == []
    with LLM(result.path) as llm:
        for source in sources(3):
            with torch.no_grad():
                ids = torch.tensor([source])
                expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False)[0].tolist()
            [out] = llm.generate(source, SamplingParams(max_tokens=11, temperature=0.0))
            assert [2, 5, *out.outputs[0].token_ids] == expected
            assert expected[-1] == 0
            assert not {plain[3], plain[4]} & set(out.outputs[0].token_ids)
            assert out.outputs[0].token_ids[0] != plain[2]


def test_refusals(package: Any, tmp_path: Path) -> None:
    with LLM(package("bart")) as llm:
        with pytest.raises(ContextLengthError, match="encoder reads 128"):
            llm.generate([[5] * 129])
        with pytest.raises(RequestError, match="empty"):
            llm.generate([[]])
        with pytest.raises(RequestError, match="between 0 and"):
            llm.generate([[VOCAB + 7]])
        with pytest.raises(FamilyError, match="encoder-decoder"):
            llm.score("x")
        with pytest.raises(FamilyError, match="does not embed"):
            llm.embed("x")
        llm.warmup()
    save_checkpoint(make_seq2seq("bart"), tmp_path / "checkpoint")
    with pytest.raises(UnsupportedModelError, match="leave out --task"):
        export_model(ExportOptions(str(tmp_path / "checkpoint"), tmp_path / "package", task="embed"))


def test_run_from_the_command_line(package: Any) -> None:
    folder = package("t5")
    command = [
        sys.executable,
        "-m",
        "llmx.cli",
        "run",
        "--onnx",
        str(folder),
        "--prompt",
        "translate this",
        "-n",
        "8",
        "--json",
    ]
    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    with LLM(folder) as llm:
        [direct] = llm.generate("translate this", SamplingParams(max_tokens=8))
    assert out["token_ids"] == direct.outputs[0].token_ids
    assert out["text"] == direct.outputs[0].text == llm.tokenizer.decode(direct.outputs[0].token_ids)
    assert out["usage"]["prompt_tokens"] == len(direct.prompt_token_ids)
    assert load_manifest(folder).family == "encoder-decoder"
