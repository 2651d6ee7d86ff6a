"""Whether the graph by which prompts are computed, of integer products (llmx.export.integer_products), is right.

In two steps, as for every quantized graph: each integer form must lie near the matrix that it was made of, and PyTorch with
the integer forms must equal the graph but for what the digits of activations leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from llmx.export.dequantized import array_of, exact_copy, overwritten
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


def check_prompts(folder: Path, manifest: Manifest, model: Any) -> None:
    """Raises VerificationError where prompts are computed wrongly. `model`, PyTorch's in float32 with the package's matrices,
    is left with their integer forms.
    """
    for name, _, error in overwritten(model, _integer_forms(folder, manifest)):
        if not error <= _LARGEST_ERROR:
            raise VerificationError(
                f"The int8 form of {name}, by which prompts are computed, is not the matrix: they lie {error:.2g} of its norm "
                f"apart (at most {_LARGEST_ERROR:g} is rounding); --quantize-prompts same exports without it."
            )
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


@dataclass(frozen=True)
class _Form:
    """A matrix as products of integers have it: int8 [columns, rows] and float32 [rows]."""

    codes: np.ndarray
    scales: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scales), len(self.codes)

    def rows(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """`Matrix.rows`."""
        part = slice(first, None if count is None else first + count)
        yield 0, torch.from_numpy(self.codes[:, part].T.astype(np.float32) * self.scales[part, None])


def _integer_forms(folder: Path, manifest: Manifest) -> dict[str, _Form]:
    """By the names of the parameters below each other in it, joined by `+`."""
    forms = {}
    for node in ir.load(folder / manifest.graphs["prefill"].file).graph:
        if node.op_type == "MatMulIntegerToFloat":
            value = node.inputs[1]
            codes, scales = array_of(value), array_of(node.inputs[3])
            assert value is not None and value.name is not None and codes is not None and scales is not None
            forms[value.name.removesuffix(".int8")] = _Form(codes, scales)
    return forms
