"""What is compared, and what was found: the settings, the package beside its model, and the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llmx.export.checkpoint import Checkpoint
from llmx.export.differences import Differences, Spot
from llmx.export.parting import find_parting
from llmx.export.verify import TOLERANCE
from llmx.runtime.manifest import Manifest

#: Tokens of random rows; the last is longer than the blocks that recurrences work in.
LENGTHS = (5, 23, 61, 150)

Stage = Callable[[str], None]


@dataclass(frozen=True)
class CompareOptions:
    """What to compare and how. `tolerance` None: the export's for the package's dtype (`llmx.export.verify.TOLERANCE`), as
    a part of the largest reference value. `text`: what perplexity is computed on (its first `tokens` tokens).
    """

    onnx: str
    model: str
    adapter: Path | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    text: str | None = None
    tokens: int = 2048
    prompts: int = 5
    seed: int = 0
    tolerance: float | None = None
    threads: int | None = None
    integrity: bool = False


@dataclass
class Report:
    """What was found. `outputs`: `Differences.summary` of logits or embeddings; `generation`: free-running greedy tokens
    beside transformers'; `perplexity`: of both. `layer` (from 0) and `parting` say where the two part, `reason` why the
    comparison failed; all None where it passed. Of a quantized package, all these are beside the source as it is, and
    `graph` beside PyTorch with the package's own weights, which decides.
    """

    onnx: str
    model: str
    family: str
    dtype: str
    tolerance: float
    compared: str  # "logits" | "embeddings"
    outputs: dict[str, Any]
    generation: dict[str, Any] | None = None
    perplexity: dict[str, Any] | None = None
    graph: dict[str, Any] | None = None
    passed: bool = True
    reason: str | None = None
    layer: int | None = None
    parting: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data; numbers that JSON lacks (NaN, infinity) become null."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


@dataclass
class Pair:
    """A package and the model that it is compared with."""

    folder: Path
    manifest: Manifest
    checkpoint: Checkpoint
    model: Any
    options: CompareOptions

    @property
    def tolerance(self) -> float:
        given = self.options.tolerance
        return TOLERANCE[self.manifest.dtype] if given is None else given

    def report(self, differences: Differences, compared: str = "logits", **parts: Any) -> Report:
        names = (self.options.onnx, self.options.model, self.manifest.family, self.manifest.dtype)
        report = Report(*names, self.tolerance, compared, differences.summary(), **parts)
        if differences.first is not None:
            self.fail(report, f"{compared.capitalize()} differ: {differences.first.sentence}.")
        return report

    def fail(self, report: Report, reason: str) -> None:
        adapter = self.manifest.source.get("adapter")
        if adapter is not None and self.options.adapter is None:
            reason += (
                f" The package holds the adapter {adapter}: unless the checkpoint does too, give it with --adapter."
            )
        report.passed, report.reason = False, reason

    def part(self, report: Report, spot: Spot, graph: str, tokens: np.ndarray, run: Callable[[], np.ndarray]) -> None:
        """Say in `report` where the two part on `tokens`, which lead to `spot`."""
        threshold = min(self.tolerance, spot.difference / spot.scale / 4)
        parting = find_parting(
            self.folder, self.manifest, graph, self.model, tokens, run, self.tolerance, threshold, self.options.threads
        )
        report.layer, report.parting = parting.layer, parting.sentence


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
