"""Calibrated rounding: GPTQ (Frantar et al., 2022, arXiv:2210.17323).

Columns are rounded one after another, and what a column's rounding loses is made up for in those that are not rounded yet,
weighted by how the layer's inputs vary together: the error of the layer's outputs shrinks, not that of its weights. Inputs are those of
a calibration text. The model runs once, the whole text at once; each matrix is rounded at the moment that its inputs
arrive, so that later layers see what the earlier ones became, and no layout of layers need be known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from llmx.export.blocks import Blocks, Scheme, block_parameters, encode
from llmx.export.quantization import Plan

_DAMPING = 0.01  # of the mean diagonal, added to it
_COLUMNS = 128  # rounded before the columns after them are updated


def calibrated(
    model: Any, plan: Plan, ids: torch.Tensor, progress: Callable[[int, int], None]
) -> tuple[Plan, list[str]]:
    """`plan` with codes chosen for the inputs that int64 [rows, length] `ids` give rise to, and the names of the matrices that
    they do not reach, which stay rounded to nearest. `model`, in float32, holds the rounded weights afterwards.

    The output head and the embedding stay as planned.
    """
    from transformers.pytorch_utils import Conv1D

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held: Plan = {}
    last: list[tuple[torch.Tensor, torch.Tensor]] = []  # the last input and its moments: query, key and value share one
    handles = []

    def hook(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        name = names[id(module.weight)]
        if name in held:
            return
        if not last or last[0][0] is not arguments[0]:
            last[:] = [(arguments[0], _moments(arguments[0]))]
        weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        blocks = gptq(weight, last[0][1], plan[name].scheme, plan[name].dtype)
        weight.copy_(blocks.dequantized())
        held[name] = replace(plan[name], blocks=lambda: iter([blocks]))
        progress(len(held), wanted)

    for module in model.modules():
        weight = getattr(module, "weight", None)
        layer = isinstance(module, (torch.nn.Linear, Conv1D)) and not any(module is end for end in ends)
        if layer and names.get(id(weight)) in plan:
            handles.append(module.register_forward_pre_hook(hook))
    wanted = len(handles)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    linear = [
        name
        for name, weight in plan.items()
        if not any(names.get(id(getattr(e, "weight", None))) == name for e in ends)
    ]
    return plan | held, [name for name in linear if name not in held]


def _moments(inputs: torch.Tensor) -> torch.Tensor:
    """float32 [columns, columns]: the mean outer product of inputs [..., columns]."""
    flat = inputs.reshape(-1, inputs.shape[-1]).float()
    return flat.T @ flat / len(flat)


def gptq(weight: torch.Tensor, moments: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Blocks:
    """float32 [rows, columns] rounded for inputs of these `moments` [columns, columns]. A block's scale is set when its first
    column's turn comes, from what the columns are by then.
    """
    weight = weight.clone()
    rows, columns = weight.shape
    upper = _cholesky_of_inverse(moments)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales: list[torch.Tensor] = []
    zero_points: list[torch.Tensor] = []
    for start in range(0, columns, max(_COLUMNS, scheme.block_size)):
        end = min(start + max(_COLUMNS, scheme.block_size), columns)
        errors = torch.zeros(rows, end - start)
        for column in range(start, end):
            if column % scheme.block_size == 0:
                block = weight[:, column : column + scheme.block_size]
                scale, zero_point = block_parameters(block, scheme, dtype)
                scales.append(scale)
                zero_points += [zero_point] if zero_point is not None else []
            one = weight[:, column : column + 1]
            codes[:, column : column + 1] = encode(one, scheme, scale, zero_point)
            rounded = Blocks(scheme, codes[:, column : column + 1], scale, zero_point).dequantized()
            error = (one - rounded) / upper[column, column]
            weight[:, column:end] -= error * upper[column, column:end]
            errors[:, column - start] = error[:, 0]
        weight[:, end:] -= errors @ upper[start:end, end:]
    return Blocks(scheme, codes, torch.cat(scales, 1), torch.cat(zero_points, 1) if zero_points else None)


def _cholesky_of_inverse(moments: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped `moments`; more damping where float32 finds them singular."""
    diagonal = moments.diagonal()
    damping = _DAMPING * float(diagonal.mean()) or 1.0
    for _ in range(6):
        damped = moments + damping * torch.eye(len(moments))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
        damping *= 10
    return torch.eye(len(moments))  # no second moments to speak of: rounding to nearest
