"""Recurrences as operators: the graph says what transformers' PyTorch code says, for prompts of any length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from llmx.export.lowering import lower
from llmx.export.passes import encoder_graph
from llmx.export.recurrences import recurrences_as_operators
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

LENGTHS = (1, 5, 64, 70, 200)  # around blocks of 64


class Recurrence(torch.nn.Module):
    """One of the functions above on made-up queries, keys, values and decays, each made of a line of `x`."""

    def __init__(self, kind: str, state: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config: Any = None
        self.kind, self.start = kind, torch.randn(2, 4, 6, 5) if state else None
        self.mix = torch.nn.Linear(8, 2 * 12 + 20 + 24 + 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, seq, _ = x.shape
        q, k, v, g, b = self.mix(x).split([12, 12, 20, 24, 4], dim=-1)
        q, k, v = q.view(batch, seq, 2, 6), k.view(batch, seq, 2, 6), v.view(batch, seq, 4, 5)
        more: dict[str, Any] = {
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
            "initial_state": self.start,
        }
        if self.kind == "delta":
            out, state = torch_chunk_gated_delta_rule(q, k, v, g=-g[..., :4].exp(), beta=b.sigmoid(), **more)
        elif self.kind == "kda":
            q, k = q.repeat_interleave(2, dim=2), k.repeat_interleave(2, dim=2)
            decay = -g.view(batch, seq, 4, 6).exp()
            out, state = chunk_kimi_delta_attention(q, k, v, g=decay, beta=b.sigmoid(), **more)
        else:
            bias = torch.linspace(-1, 1, 4)
            start = None if self.start is None else self.start.transpose(2, 3)
            steps: dict[str, Any] = {"dt_bias": bias, "dt_softplus": True, "dt_limit": (0.1, 2.0), "D": bias + 3}
            out, state = mamba2_chunk_scan(
                v, b, -bias.exp(), k, q, chunk_size=16, initial_states=start, return_final_states=True, **steps
            )
        assert state is not None
        return {"out": out, "state": state}


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("kind", ["delta", "kda", "space"])
def test_prompts_of_any_length(kind: str, state: bool) -> None:
    module = Recurrence(kind, state).eval()
    with torch.no_grad(), recurrences_as_operators(module):
        traced = lower(module, {"x": torch.randn(2, 11, 8)}, {"x": {1: torch.export.Dim.DYNAMIC}})
    graph = encoder_graph(traced)
    assert Counter(node.op_type for node in graph.graph)["LinearAttention"] == 1
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    for length in LENGTHS:
        x = torch.randn(2, length, 8)
        with torch.no_grad():
            want = module(x)
        got = dict(zip(("out", "state"), session.run(["out", "state"], {"x": x.numpy()}), strict=True))
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value.numpy(), atol=2e-5 * float(value.abs().max()), err_msg=name)


def test_packages_take_prompts_whole(package: Callable[[str], Path]) -> None:
    found = Counter(node.op_type for node in ir.load(package("mamba2") / "prefill.onnx").graph)
    assert found["LinearAttention"] == 3
    assert "LinearAttention" not in {node.op_type for node in ir.load(package("mamba2") / "decode.onnx").graph}
