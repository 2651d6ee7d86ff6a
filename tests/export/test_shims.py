"""What stands in for Python that a tracer cannot follow: the graph says what eager PyTorch says, for any number of hits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from llmx.export.lowering import lower
from llmx.export.passes import encoder_graph
from llmx.export.shims import EveryIndex, shimmed


class LoopedExperts(torch.nn.Module):
    """A mixture that loops over the experts that were hit, as transformers' own do."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config: Any = None
        self.gate = torch.nn.Linear(8, experts, bias=False)
        self.experts = torch.nn.ModuleDict({f"expert_{i}": torch.nn.Linear(8, 8) for i in range(experts)})

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        weights, chosen = torch.topk(self.gate.to(torch.float32)(hidden[0]).softmax(-1), 2, dim=-1)
        mask = torch.nn.functional.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        total = torch.zeros_like(hidden[0])
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            index, token = torch.where(mask[expert].squeeze(0))
            if token.numel() == 0:
                continue
            out = self.experts[f"expert_{expert[0]}"](hidden[0][token]) * weights[token, index, None]
            total.index_add_(0, token, out)
        return {"out": total[None]}


@pytest.mark.parametrize("symbolic", [True, False])
def test_loops_over_experts(symbolic: bool) -> None:
    """Traced for any number of tokens, and for a single one, whose experts have one hit or none."""
    module = LoopedExperts().eval()
    example = torch.randn(1, 7 if symbolic else 1, 8)
    with torch.no_grad():
        traced = lower(module, {"hidden": example}, {"hidden": {1: torch.export.Dim.DYNAMIC} if symbolic else None})
    graph = encoder_graph(traced)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    for tokens in (1, 2, 40) if symbolic else (1, 1, 1, 1):
        hidden = torch.randn(1, tokens, 8)
        [got] = session.run(["out"], {"hidden": hidden.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, module(hidden)["out"].numpy(), atol=1e-5)


def test_hits_can_be_looped_over_and_nothing_else() -> None:
    hits = torch.tensor([True, False, True])
    with shimmed():
        every = hits.nonzero()
        assert isinstance(every, EveryIndex) and [int(index.item()) for index in every] == [0, 1, 2]
        with pytest.raises(IndexError):
            torch.ones(3)[every]
        with pytest.raises(TypeError):
            every + 1  # type: ignore[operator]
        assert hits[None].nonzero().tolist() == [[0, 0], [0, 2]] and hits.nonzero(as_tuple=True)[0].tolist() == [0, 2]
        assert torch.ones(2, 3).squeeze(0).shape == (2, 3) and torch.ones(1, 3).squeeze(0).shape == (3,)
    assert hits.nonzero().tolist() == [[0], [2]]
