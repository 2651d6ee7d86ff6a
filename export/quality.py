"""What quantization costs: a quantized package beside its source in float32, for the manifest.

Decoders are compared on text: a given one, or one that the model itself writes (drawn at temperature 1 from its start
token), which is at hand for every model and is what it knows. Two numbers are kept apart: the whole difference to the source, and the part
of it that rounding activations to int8 makes, which must stay small for the graph to count as right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from llmx.export.checkpoint import Checkpoint
from llmx.export.dequantized import StoredMatrix, use_package_weights
from llmx.export.differences import Differences
from llmx.export.lowering import quiet
from llmx.export.perplexity import perplexity
from llmx.export.quantization import read_text
from llmx.export.rope import untouched
from llmx.export.tokenizer import load_tokenizer
from llmx.runtime.backend import Backend
from llmx.runtime.errors import ExportError, VerificationError
from llmx.runtime.manifest import Manifest
from llmx.runtime.tokenizer import Tokenizer

#: Logit difference that rounding activations to int8 may make at most positions, as a part of the largest logit. Not at all: where
#: it makes another expert the better one, or a token another neighbour's, a position differs by as much as two texts do.
COMPUTE_TOLERANCE = 0.1
_ROWS, _TOKENS = 4, 64  # of the text that the model writes
_CALIBRATION = (32, 128)  # rows and tokens of what it writes to calibrate on
_CALIBRATION_PIECES = (32, 256)  # and of pieces of a given text
_CHUNK = 192
_LONGEST = 1024  # tokens of a given text


def decoder_quality(
    backends: Sequence[Backend], model: Any, matrices: dict[str, StoredMatrix], texts: list[np.ndarray]
) -> list[dict[str, Any]]:
    """Of each backend, which run one package: KL(source ‖ package) in nats, agreement of best tokens and both perplexities on
    `texts` (int64 [n] each).

    `model`, the source in float32, is left with the package's `matrices`. Raises VerificationError where the package differs from
    PyTorch with those by more than `COMPUTE_TOLERANCE` at half of the positions.
    """
    llms = [
        SimpleNamespace(backend=backend, prefill_chunk=_CHUNK, max_length=backend.max_length) for backend in backends
    ]
    whole = [_compare(llm, model, texts, math.inf) for llm in llms]
    use_package_weights(model, matrices)
    return [
        _facts(*compared, _compare(llm, model, texts, COMPUTE_TOLERANCE)[0])
        for llm, compared in zip(llms, whole, strict=True)
    ]


def _facts(whole: Differences, pytorch: float, onnx: float, compute: Differences) -> dict[str, Any]:
    """The differences to the source, both perplexities, and the differences to PyTorch with the package's weights."""
    if compute.first is not None and compute.failed > compute.positions / 2:
        raise VerificationError(
            f"ONNX and PyTorch with the same quantized weights disagree by more than int8 activations explain: {compute.first.sentence}."
        )
    facts, noise = whole.summary(), compute.summary()
    return {
        "positions": facts["positions"],
        "mean_kl": facts["mean_kl"],
        "max_kl": facts["max_kl"],
        "argmax_agreement": facts["argmax_agreement"],
        "perplexity": onnx,
        "source_perplexity": pytorch,
        "compute_kl": noise["mean_kl"],
        "compute_max_abs_diff": noise["max_abs_diff"],
    }


def _compare(llm: Any, model: Any, texts: list[np.ndarray], tolerance: float) -> tuple[Differences, float, float]:
    """The differences, PyTorch's perplexity and the package's over all texts."""
    differences = Differences(tolerance)
    count, logs = 0, np.zeros(2)
    for ids in texts:
        found = perplexity(llm, model, ids, differences)
        count += found["tokens"]
        logs += found["tokens"] * np.log([found["pytorch"], found["onnx"]])
    pytorch, onnx = np.exp(logs / count).tolist()
    return differences, pytorch, onnx


def read_ids(folder: Path, manifest: Manifest, file: Path) -> np.ndarray:
    """The first tokens of a text file, int64 [n], as the package's tokenizer writes them. Raises ExportError."""
    ids = Tokenizer.load(folder, manifest.tokenizer).encode(read_text(file))[:_LONGEST]
    if len(ids) < 2:
        raise ExportError(f"{file} has {len(ids)} token(s), and quality needs at least 2; give a longer text.")
    return np.array(ids, np.int64)


def calibration_ids(model: Any, checkpoint: Checkpoint, file: Path | None) -> torch.Tensor:
    """int64 [rows, length] tokens to calibrate on: of a text file, cut into pieces, or what `model` writes.

    Raises ExportError where the text is too short for one piece.
    """
    if file is None:
        return torch.from_numpy(np.stack(written_by(model, _CALIBRATION[1] + 1, *_CALIBRATION, seed=1)))
    rows, length = _CALIBRATION_PIECES
    with quiet():
        ids = load_tokenizer(checkpoint)(read_text(file), add_special_tokens=False)["input_ids"]
    rows = min(rows, len(ids) // length)
    if not rows:
        raise ExportError(f"{file} has {len(ids)} tokens, and calibrating needs {length}; give a longer text.")
    starts = np.linspace(0, len(ids) - length, rows).astype(int)
    return torch.tensor([ids[start : start + length] for start in starts])


def written_by(
    model: Any, max_length: int, rows: int = _ROWS, tokens: int = _TOKENS, seed: int = 0
) -> list[np.ndarray]:
    """Texts int64 [n] that `model` draws from its start token (or from some token), the same for each seed."""
    from transformers import GenerationConfig

    start = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
    random = torch.Generator().manual_seed(seed)
    vocab = model.get_input_embeddings().weight.shape[0]
    first = (
        torch.full((rows, 1), start)
        if isinstance(start, int) and start < vocab
        else torch.randint(0, vocab, (rows, 1), generator=random)
    )
    count = max(1, min(tokens, max_length - 1))
    config = GenerationConfig(
        do_sample=True, top_k=0, temperature=1.0, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
    )
    with torch.no_grad(), quiet(), untouched(model, real=True), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        original, model.generation_config = model.generation_config, config
        try:
            drawn = model.generate(first, attention_mask=torch.ones_like(first), generation_config=config)
        finally:
            model.generation_config = original
    return [row.numpy() for row in drawn]
