"""Whether the graph by which prompts are computed, of integer products (llmx.export.integer_products), is right.

In two steps, as for every quantized graph: each integer form must lie near the matrix that it was made of, and PyTorch with
the integer forms must equal the graph but for what the digits of activations leave out.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from llmx.export.dequantized import StoredMatrix, array_of, exact_copy
from llmx.export.differences import Differences
from llmx.export.perplexity import perplexity
from llmx.runtime.backend import open_backend
from llmx.runtime.errors import VerificationError
from llmx.runtime.manifest import Manifest

#: Largest distance of an integer form from its matrix, as a part of the norm. One scale for an output costs 0.8 %, several
#: where a few values are far larger than the rest; a wrong matrix lies 1.4 apart.
_LARGEST_ERROR = 0.15
#: Logit difference that digits of 14 bits may make, as a part of the largest logit, but at a tenth of the positions: they may
#: make another expert the better one.
_TOLERANCE = 0.02
_LENGTHS, _CHUNK = (70, 45), 40  # tokens of the random prompts, cut after so many


def check_prompts(folder: Path, manifest: Manifest, model: Any, matrices: dict[str, StoredMatrix]) -> None:
    """Raises VerificationError where prompts are computed wrongly. `model`, PyTorch's in float32 with the package's `matrices`,
    is left with their integer forms.
    """
    forms = _integer_forms(folder, manifest)
    _check_forms(forms, matrices)
    _use_forms(model, forms)
    room = min(max(_LENGTHS), manifest.model.context_length)
    random = np.random.default_rng(0)
    highest = min(manifest.model.vocab_size, model.get_input_embeddings().weight.shape[0])
    differences = Differences(_TOLERANCE)
    with exact_copy(folder, manifest, prompts=True) as (copy, exact), torch.no_grad():
        backend = open_backend(copy, exact, device="cpu", max_length=room, mapped_cache=False)
        try:
            llm = SimpleNamespace(backend=backend, prefill_chunk=_CHUNK, max_length=room)
            for length in _LENGTHS:
                perplexity(llm, model, random.integers(0, highest, min(length, room)), differences)
        finally:
            backend.close()
    if differences.first is not None and differences.failed > differences.positions / 10:
        raise VerificationError(
            f"Prompts by integer products and PyTorch with the same weights disagree: {differences.first.sentence}."
        )


def _integer_forms(folder: Path, manifest: Manifest) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """int8 [columns, rows] and float32 [rows] of each form, by the names of the parameters below each other in it."""
    forms = {}
    for node in ir.load(folder / manifest.graphs["prefill"].file).graph:
        if node.op_type == "MatMulIntegerToFloat":
            codes = node.inputs[1]
            integers, scales = array_of(codes), array_of(node.inputs[3])
            assert codes is not None and codes.name is not None and integers is not None and scales is not None
            forms[codes.name.removesuffix(".int8")] = (integers, scales)
    return forms


def _rows(form: tuple[np.ndarray, np.ndarray], start: int, count: int) -> torch.Tensor:
    """float32 [n, columns]: the n <= count outputs from `start` on."""
    part = slice(start, start + count)
    return torch.from_numpy(form[0][:, part].T.astype(np.float32) * form[1][part, None])


def _check_forms(forms: dict[str, tuple[np.ndarray, np.ndarray]], matrices: dict[str, StoredMatrix]) -> None:
    left = dict(forms)
    for joined, matrix in matrices.items():
        members, first = joined.split("+"), 0
        places = {name: members.index(name.split("+")[0]) for name in left if set(name.split("+")) <= set(members)}
        for name in sorted(places, key=places.__getitem__):
            form = left.pop(name)
            difference = norm = 0.0
            for start, rows in matrix.rows(first, len(form[1])):
                difference += float((rows - _rows(form, start, len(rows))).double().square().sum())
                norm += float(rows.double().square().sum())
            first += len(form[1])
            if not difference**0.5 <= _LARGEST_ERROR * norm**0.5:
                raise VerificationError(
                    f"The int8 form of {name}, by which prompts are computed, is not the matrix: they lie "
                    f"{(difference / max(norm, 1e-30)) ** 0.5:.2g} of its norm apart (at most {_LARGEST_ERROR:g} is rounding); "
                    "--quantize-prompts same exports without it."
                )
    if left:
        raise VerificationError(f"{next(iter(left))} has an int8 form and no other in the package.")


def _use_forms(model: Any, forms: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Overwrite the matrices of PyTorch's `model` with their integer forms."""
    from transformers.pytorch_utils import Conv1D

    parameters = dict(model.named_parameters(remove_duplicate=False))
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for joined, form in forms.items():
        first = 0
        for name in joined.split("+"):
            target = parameters[name].data.T if name in turned else parameters[name].data
            target.copy_(_rows(form, first, len(target)))
            first += len(target)
