"""`--with-hidden-states`: what the output head reads, of packages that generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, FamilyError, RequestError, SamplingParams
from llmx.runtime.errors import ExportError
from zoo.models import VOCAB, greedy, make_model, make_seq2seq, save_checkpoint

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", "lfm2"])
def test_hidden_states_equal_pytorch(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    save_checkpoint(model, tmp_path / "checkpoint")
    options = ExportOptions(str(tmp_path / "checkpoint"), tmp_path / "package", with_hidden_states=True)
    texts = [np.random.default_rng(n).integers(1, VOCAB, n).tolist() for n in (1, 9, 40)]
    with LLM(export_model(options).path, slots=2, prefill_chunk=16) as llm:
        states = llm.hidden_states(texts)
        for ids, got in zip(texts, states, strict=True):
            with torch.no_grad():
                want = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].numpy()
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, float(np.abs(want).max())))
        assert llm.generate(texts[1], GREEDY)[0].outputs[0].token_ids == greedy(model, texts[1], 16)
        with pytest.raises(RequestError, match="empty"):
            llm.hidden_states([[]])


def test_without_them(demo: Path, tmp_path: Path) -> None:
    with LLM(demo) as llm, pytest.raises(FamilyError, match="--with-hidden-states"):
        llm.hidden_states("x")
    save_checkpoint(make_seq2seq("bart"), tmp_path / "checkpoint")
    options = ExportOptions(str(tmp_path / "checkpoint"), tmp_path / "package", with_hidden_states=True)
    with pytest.raises(ExportError, match="decoder-only"):
        export_model(options)
