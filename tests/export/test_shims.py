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


class StackedExperts(torch.nn.Module):
    """The same with stacked matrices, and a mask that has a place more than there are experts."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config: Any = None
        self.gate = torch.nn.Linear(8, experts, bias=False)
        self.stack = torch.nn.Parameter(torch.randn(experts, 8, 8))

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        weights, chosen = torch.topk(self.gate(hidden[0]).softmax(-1), 2, dim=-1)
        mask = torch.nn.functional.one_hot(chosen, num_classes=len(self.stack) + 1).permute(2, 1, 0)
        total = torch.zeros_like(hidden[0])
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            index, token = torch.where(mask[expert[0]])
            out = hidden[0][token] @ self.stack[expert[0]]
            total.index_add_(0, token, out * weights[token, index, None])
        return {"out": total[None]}


@pytest.mark.parametrize("kind", [LoopedExperts, StackedExperts])
@pytest.mark.parametrize("symbolic", [True, False])
def test_loops_over_experts(symbolic: bool, kind: type[torch.nn.Module]) -> None:
    """Traced for any number of tokens, and for a single one, whose experts have one hit or none."""
    module = kind().eval()
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


class WholeNumbers(torch.nn.Module):
    """Sizes made integers by `int` and `torch.div`, which would fix them at the example's."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = None

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        length = int(hidden.shape[1] + 3)
        half = torch.div(hidden.shape[1], 2, rounding_mode="trunc")
        assert isinstance(length, int) or isinstance(length, torch.SymInt)  # noqa: SIM101
        return {"out": hidden[:, :half] * length + int("2") + int(1.5)}


def test_sizes_stay_sizes() -> None:
    module = WholeNumbers().eval()
    traced = lower(module, {"hidden": torch.ones(1, 7, 8)}, {"hidden": {1: torch.export.Dim.DYNAMIC}})
    raw = ir.to_proto(encoder_graph(traced)).SerializeToString()
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    for length in (2, 7, 30):
        hidden = torch.randn(1, length, 8)
        [got] = session.run(["out"], {"hidden": hidden.numpy()})
        np.testing.assert_allclose(got, (hidden[:, : length // 2] * (length + 3) + 3).numpy(), rtol=1e-6)
    assert "int" not in globals()
