"""A graph is for lengths that take its example's branches: what guards say of others, and what packages do with that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.export.known import KnownValues
from llmx.export.lengths import GUARDS, joined, longest_right, shortest_right, wrong_block
from llmx.export.lowering import lower
from llmx.runtime import LLM, ContextLengthError, SamplingParams
from llmx.runtime.errors import UnsupportedModelError
from zoo.models import VOCAB, save_checkpoint, widen


class Branch(torch.nn.Module):
    def __init__(self, body: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body, self.config = body, None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.body(x)}


def traced(body: Callable[[torch.Tensor], torch.Tensor], length: int) -> ir.Model:
    return lower(Branch(body), {"x": torch.ones(1, length)}, {"x": {1: torch.export.Dim.DYNAMIC}})


def short_or_long(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[1] <= 40 else x + 1


def padded(x: torch.Tensor) -> torch.Tensor:
    more = (8 - x.shape[1] % 8) % 8
    return torch.nn.functional.pad(x, (0, more))[:, :-more] if more > 0 else x * 1


def test_branches_on_the_length() -> None:
    short, long, plain = traced(short_or_long, 7), traced(short_or_long, 90), traced(lambda x: x * 2, 7)
    assert (
        longest_right(short, 2, 5000) == 40 and longest_right(long, 2, 5000) == 1 and shortest_right(long, 5000) == 41
    )
    assert longest_right(plain, 2, 1 << 20) == 1 << 20 and shortest_right(plain, 5000) == 2
    assert longest_right(short, 2, 30) == 30
    assert longest_right(short, 2, 5000, lambda name, axis: 7 if (name, axis) == ("x", 1) else None) == 5000
    assert not joined(long, short) and longest_right(long, 2, 5000) == 1


def test_blocks() -> None:
    graph = traced(padded, 11)
    assert wrong_block(graph, 500) == 8
    assert wrong_block(traced(short_or_long, 7), 500) is None and wrong_block(traced(lambda x: x * 2, 7), 500) is None


def test_the_same_graph_is_right_for_the_lengths_of_both_traces() -> None:
    def same(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] <= 40 else x.mul(2)

    graph, other = traced(same, 90), traced(same, 7)
    assert longest_right(graph, 2, 500) == 1
    assert joined(graph, other) and len(graph.meta[GUARDS]) == 2
    assert longest_right(graph, 2, 500) == 500
    for different in (lambda x: x * 3, lambda x: x + 2, lambda x: (x * 2)[:, 1:]):
        assert not joined(traced(lambda x: x * 2, 7), traced(different, 7))


def test_values_that_no_input_reaches_are_known() -> None:
    def asks(x: torch.Tensor, whom: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with KnownValues():
            return x * 2 if (whom(x) > 1).any().item() else x + 1

    def ones(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(torch.ones_like(x), (0, 3))

    def written(x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(1, x.shape[1] + 3)
        mask[:, :2] = 5
        return mask

    def lost(x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(x)
        mask[:, :2] = x[:, :2]
        return mask

    assert "Add" in {node.op_type for node in traced(lambda x: asks(x, ones), 9).graph}
    assert "Mul" in {node.op_type for node in traced(lambda x: asks(x, written), 9).graph}
    for unknown in (lost, lambda x: x, lambda x: torch.ones_like(x) * x):
        with pytest.raises(UnsupportedModelError, match="a branch by a value of its input"):
            traced(lambda x, unknown=unknown: asks(x, unknown), 9)


def test_a_source_that_takes_another_way_is_refused(tmp_path: Path) -> None:
    """BigBird attends to everything in short sources and to some blocks of long ones."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes: dict[str, Any] = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 2}
    config = AutoConfig.for_model(
        "bigbird_pegasus", vocab_size=VOCAB, **sizes, **heads, **special, max_position_embeddings=256, block_size=16,
        num_random_blocks=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    widen(model, 0)
    save_checkpoint(model, tmp_path / "checkpoint")
    result = export_model(ExportOptions(str(tmp_path / "checkpoint"), tmp_path / "package"))
    assert result.manifest.seq2seq is not None and result.manifest.seq2seq.max_source_length == 112  # 7 blocks
    assert any("sources of more than 112 tokens" in warning for warning in result.warnings)
    with LLM(result.path, slots=1) as llm, pytest.raises(ContextLengthError, match="encoder reads 112"):
        llm.generate([[5] * 113], SamplingParams(max_tokens=2))
