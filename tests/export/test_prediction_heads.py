"""Heads that predict several tokens ahead: checkpoints carry them, transformers' models have no place for them, and the
package is the one that is made without them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, SamplingParams
from safetensors.torch import load_file, save_file
from zoo.models import VOCAB

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def with_heads(checkpoint: Path, folder: Path, prefix: str) -> Path:
    """A copy of `checkpoint` with one more block, of its last layer's tensors, under `prefix`, and the block's own."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    width = config["hidden_size"]
    block = {prefix + name.removeprefix(last): value + 1 for name, value in tensors.items() if name.startswith(last)}
    assert len(block) > 5
    own = {
        "eh_proj.weight": torch.randn(width, 2 * width),
        "enorm.weight": torch.ones(width),
        "hnorm.weight": torch.ones(width),
        "shared_head.norm.weight": torch.ones(width),
        "shared_head.head.weight": torch.randn(VOCAB, width),
        "embed_tokens.weight": torch.randn(VOCAB, width),
    }
    block |= {prefix + name: value for name, value in own.items()}
    save_file({**tensors, **block}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("qwen3", "model.layers.3."),
        ("qwen3", "mtp.layers.0."),
        ("deepseek_v3", "model.layers.3."),  # loaded by transformers, which merges experts
        pytest.param("qwen3_next", "mtp.layers.0.", marks=pytest.mark.slow),
    ],
)
def test_they_are_left_out(
    name: str, prefix: str, checkpoint: Callable[[str], Path], package: Callable[[str], Path], tmp_path: Path
) -> None:
    source = with_heads(checkpoint(name), tmp_path / "checkpoint", prefix)
    result = export_model(ExportOptions(str(source), tmp_path / "package"))
    assert result.manifest.verification.status == "passed"
    assert not [warning for warning in result.warnings if "token by token" not in warning]
    plain = package(name)
    for file in ("weights.data", "decode.onnx"):
        assert (result.path / file).read_bytes() == (plain / file).read_bytes(), file
    prompt = np.random.default_rng(0).integers(1, VOCAB, 20).tolist()
    with LLM(result.path, slots=1) as llm, LLM(plain, slots=1) as other:
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == (
            other.generate(prompt, GREEDY)[0].outputs[0].token_ids
        )
