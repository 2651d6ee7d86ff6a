"""`llmx bench` on an encoder: texts a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from llmx.cli import main


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import transformers
    from llmx.export import ExportOptions, export_model
    from zoo.models import VOCAB, write_tokenizer

    torch.manual_seed(0)
    work = tmp_path_factory.mktemp("encoder")
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(work / "checkpoint")
    write_tokenizer(work / "checkpoint")
    return export_model(ExportOptions(str(work / "checkpoint"), work / "package")).path


def test_texts_per_second(encoder: Path) -> None:
    arguments = ["bench", "--onnx", str(encoder), "-p", "8,16", "--batch-size", "4", "-r", "2", "--cold-starts", "1"]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    points = json.loads(result.stdout)["points"]
    assert [p["prompt"] for p in points] == [8, 16]
    for p in points:
        assert p["tokens_per_s"]["median"] == pytest.approx(p["texts_per_s"]["median"] * p["prompt"])
        assert p["texts_per_s"]["values"] == pytest.approx([4 / s for s in p["seconds"]["values"]])
    shown = CliRunner().invoke(main, arguments)
    assert "texts/s" in shown.output
    refused = CliRunner().invoke(main, ["bench", "--onnx", str(encoder), "-p", "100"])
    assert refused.exit_code == 2 and "takes 64 tokens" in refused.output
