"""Mixtures of experts as one `com.microsoft::MoE` node a layer.

transformers lets the function that runs a layer's experts be replaced by name (`ExpertsInterface`). Ours emits the operator,
which visits the chosen experts alone; the alternative gathers their matrices for each token. Whether a layer's experts are
what the operator computes is found by evaluating the layer's own gating function, never from its name.

The operator chooses experts and weighs them by itself, from one number for each token and expert. It is given the
logarithm of the weights that the model chose, and -1e4 for the other experts: its softmax over them gives the weights back but
for their sum, which its output is multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from llmx.export.weights import SourceModel, StoredTensor, as_bytes
from transformers.integrations.moe import ExpertsInterface, batched_mm_experts_forward

IMPLEMENTATION = "llmx"
_MARK = "llmx_gate"  # attribute of the modules that are traced as the operator
_OTHERS = -1e4
_LEAST = 1e-30  # weight of an expert, whose logarithm is finite
_SAMPLE = 64


@dataclass(frozen=True)
class Gate:
    """`min(g, limit) * sigmoid(alpha * g) * (clamp(u, ±limit) + beta)` of gate g and up u, which lie one after the other in a
    row (`interleaved`) or in its halves.
    """

    alpha: float
    beta: float
    limit: float | None
    interleaved: bool

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows[..., ::2], rows[..., 1::2]) if self.interleaved else rows.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


def use_operator(source: SourceModel) -> None:
    """Have `source` traced with the operator, its experts' matrices brought into the operator's layout: [experts, 2 * inner,
    hidden] with gate and up row by row, and [experts, hidden, inner].

    Left alone: models with a layer of another kind.
    """
    layers = list(expert_layers(source.module))
    gates = [gate_of(layer) for layer in layers]
    if not layers or any(gate is None for gate in gates):
        return
    names = {id(parameter): name for name, parameter in source.module.named_parameters()}
    ExpertsInterface.register(IMPLEMENTATION, experts)
    for layer, gate in zip(layers, gates, strict=True):
        setattr(layer, _MARK, gate)
        for name in _PARAMETERS:
            parameter = getattr(layer, name, None)
            if parameter is None:
                continue
            stored = source.stored.get(names[id(parameter)])
            parameter.data = to_operator(layer, name, parameter.data)
            if stored is not None:
                assert isinstance(stored, StoredTensor)
                source.stored[names[id(parameter)]] = _Reordered(stored, layer, name)
    source.module.set_experts_implementation(IMPLEMENTATION)


_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


@dataclass(frozen=True)
class _Reordered:
    """A stored parameter of a layer, read in the operator's layout; all of it at once."""

    stored: StoredTensor
    layer: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values().shape)

    def values(self) -> torch.Tensor:
        raw = bytearray(b"".join(self.stored.chunks(self.stored.dtype)))
        return to_operator(
            self.layer, self.name, torch.frombuffer(raw, dtype=self.stored.dtype).view(self.stored.shape)
        )

    def rows(self) -> Iterator[torch.Tensor]:
        for expert in self.values():
            yield expert.reshape(-1, expert.shape[-1]).float()

    def chunks(self, dtype: torch.dtype) -> Iterator[bytearray | memoryview]:
        for expert in self.values():
            yield as_bytes(expert, dtype)


def expert_layers(model: torch.nn.Module) -> Iterator[Any]:
    """The modules that hold stacked experts."""
    for module in model.modules():
        if hasattr(module, "_apply_gate") and getattr(getattr(module, "down_proj", None), "ndim", 0) == 3:
            yield module


def is_operator(module: torch.nn.Module) -> bool:
    return getattr(module, _MARK, None) is not None


def gate_of(layer: Any) -> Gate | None:
    """The operator's parameters for `layer`, or None where it computes something else."""
    if not layer.has_gate or layer.has_post_expert_norm or layer.has_bias != hasattr(layer, "gate_up_proj_bias"):
        return None
    width = layer.gate_up_proj.shape[2 if layer.is_transposed else 1]
    rows = 4 * torch.randn(_SAMPLE, width, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            want = layer._apply_gate(rows)
    except Exception:  # a gating function of other arguments
        return None
    alpha, limit = getattr(layer, "alpha", None), getattr(layer, "limit", None)
    candidates: list[tuple[float, float, float | None]] = [(1.0, 0.0, None)]
    if isinstance(alpha, (int, float)):
        candidates += [(float(alpha), beta, float(limit) if limit is not None else None) for beta in (0.0, 1.0)]
    for numbers in candidates:
        for interleaved in (False, True):
            gate = Gate(*numbers, interleaved)
            if want.shape == (_SAMPLE, width // 2) and torch.allclose(gate(rows), want, rtol=1e-5, atol=1e-5):
                return gate
    return None


def to_operator(layer: Any, name: str, values: torch.Tensor) -> torch.Tensor:
    """A parameter of the layer in the operator's layout."""
    if values.ndim == 3 and layer.is_transposed:
        values = values.transpose(1, 2)
    if name.startswith("gate_up") and not gate_of_or_mark(layer).interleaved:
        halves = values.reshape(values.shape[0], 2, values.shape[1] // 2, *values.shape[2:])
        values = halves.transpose(1, 2).reshape(values.shape)
    return values.contiguous()


def from_operator(layer: Any, name: str, values: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_operator`."""
    if name.startswith("gate_up") and not gate_of_or_mark(layer).interleaved:
        pairs = values.reshape(values.shape[0], values.shape[1] // 2, 2, *values.shape[2:])
        values = pairs.transpose(1, 2).reshape(values.shape)
    return values.transpose(1, 2) if values.ndim == 3 and layer.is_transposed else values


def gate_of_or_mark(layer: Any) -> Gate:
    gate = getattr(layer, _MARK, None) or gate_of(layer)
    assert gate is not None
    return gate


def experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: [tokens, hidden], int64 and float [tokens, k] -> [tokens, hidden]."""
    gate = getattr(self, _MARK, None)
    if gate is None:  # the config's setting reaches the reference as well, which is no trace
        return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    weights = top_k_weights.float()
    router = torch.full((hidden_states.shape[0], self.gate_up_proj.shape[0]), _OTHERS, dtype=torch.float32)
    router = router.scatter(1, top_k_index, weights.clamp(min=_LEAST).log()).to(hidden_states.dtype)
    attributes: dict[str, Any] = {
        "k": top_k_index.shape[1], "activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 1,
        "activation_alpha": gate.alpha, "activation_beta": gate.beta,
    }  # fmt: skip
    if gate.limit is not None:
        attributes["swiglu_limit"] = gate.limit
    biases = [getattr(self, name, None) for name in _PARAMETERS[2:]]
    output = torch.onnx.ops.symbolic(
        "com.microsoft::MoE",
        [hidden_states, router, self.gate_up_proj, biases[0], self.down_proj, biases[1]],
        attributes,
        dtype=hidden_states.dtype,
        shape=hidden_states.shape,
        version=1,
    )
    return output * weights.sum(1, keepdim=True).to(hidden_states.dtype)
