"""Recurrences over a prompt as one operator each: com.microsoft::LinearAttention (CPU, onnxruntime 1.32).

transformers marks the functions that kernels may stand in for with the kernel's name (`use_kernel_func_from_hub_with_fallback`:
flash-linear-attention's `chunk_gated_delta_rule` and `chunk_kda`, mamba_ssm's `mamba_chunk_scan_combined`). Their PyTorch code
works through a prompt in blocks, whose number a trace would fix; the operator takes prompts of any length. All of them are

    S_t = exp(g_t) S_{t-1} + k_t (x) v_t,  or with b_t (v_t - k_t^T exp(g_t) S_{t-1}) in v_t's place (delta rule);  o_t = q_t^T S_t

with a state S [batch, heads, size of keys, size of values] in float32, as PyTorch computes them too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from llmx.export.shims import replaced
from torch import Tensor


@contextmanager
def recurrences_as_operators(model: torch.nn.Module) -> Iterator[None]:
    """While `model` is traced, the kernels' stand-ins in its source are LinearAttention nodes."""
    with ExitStack() as stack:
        for name in {type(module).__module__ for module in model.modules()} & set(sys.modules):
            source = sys.modules[name]
            for function_name, function in list(vars(source).items()):
                made = _KERNELS.get(_kernel(function))
                if made is not None:
                    stack.enter_context(replaced(source, function_name, made))
        yield


def _kernel(function: Any) -> str:
    """The kernel that transformers would put in a function's place; "" for any other object."""
    if not inspect.isfunction(function) or function.__module__ is None or not hasattr(function, "__wrapped__"):
        return ""
    return str(inspect.getclosurevars(function).nonlocals.get("func_name", ""))


def _linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [batch, seq, heads, v], state [batch, heads, k, v]) of float32 [batch, seq, heads, k or v]; `decay` in log
    space [batch, seq, heads] or [batch, seq, heads, k], `beta` [batch, seq, heads] for the delta rule.
    """
    batch, seq, heads, width = value.shape
    attributes = {
        "q_num_heads": heads,
        "kv_num_heads": heads,
        "scale": scale,
        "update_rule": "gated" if beta is None else "gated_delta",
    }
    packed = [tensor.reshape(batch, seq, -1) for tensor in (query, key, value)]
    output, last = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        [*packed, state, decay.reshape(batch, seq, -1), beta],
        attributes,
        dtypes=[torch.float32, torch.float32],
        shapes=[packed[2].shape, (batch, heads, key.shape[-1], width)],
        version=1,
    )
    return output.reshape(batch, seq, heads, width), last


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """flash-linear-attention's chunk_gated_delta_rule (a decay for each head) and chunk_kda (one for each key dimension)."""
    dtype = query.dtype
    query, key, value, g, beta = (tensor.float() for tensor in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    shared = value.shape[2] // key.shape[2]
    if shared > 1:
        query, key = (x.repeat_interleave(shared, dim=2) for x in (query, key))
    output, state = _linear_attention(query, key, value, g, beta, initial_state, key.shape[-1] ** -0.5)
    return output.to(dtype), state if output_final_state else None


def _state_space(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803  (mamba_ssm's names)
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    D: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """mamba_ssm's mamba_chunk_scan_combined: Mamba 2, whose keys are B, queries C and values dt x, shared by groups of heads."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1]).float()
    values, shared = hidden_states.float(), hidden_states.shape[2] // B.shape[2]
    keys, queries = (x.float().repeat_interleave(shared, dim=2) for x in (B, C))
    state = None if initial_states is None else initial_states.float().transpose(2, 3)
    output, last = _linear_attention(queries, keys, values * dt[..., None], A.float() * dt, None, state, 1.0)
    if D is not None:
        output = output + D[..., None] * values
    return (output, last.transpose(2, 3)) if return_final_states else output


_KERNELS: dict[str, Callable[..., Any]] = {
    "chunk_gated_delta_rule": _delta_rule,
    "chunk_kda": _delta_rule,
    "mamba_chunk_scan_combined": _state_space,
}
