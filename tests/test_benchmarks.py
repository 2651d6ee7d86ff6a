"""The benchmarks' page: made of the results alone, and refused where it is not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MACHINE = {"date": "2026-01-02 03:04 UTC", "cpu": "X", "cpu_features": ["avx2"], "cpus": 2, "commit": "abc"}


@pytest.fixture(scope="module")
def page() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("page")
    finally:
        sys.path.remove(str(BENCHMARKS))


def stats(median: float, ratio: float) -> dict[str, Any]:
    return {"median": median, "min": median - 1, "max": median + 1, "values": [], "llmx_ratio": ratio}


def decode_result(ratio: float, speed: float = 50) -> dict[str, Any]:
    settings = {"model": "m", "dtype": "int4", "prompt": 512, "tokens": 128, "threads": 2}
    engines = {
        name: {
            "weights": "int4",
            "model_bytes": 1e6,
            "prefill_tokens_per_s": stats(100, 1.5 if name == "peer" else 1.0),
            "decode_tokens_per_s": stats(speed, ratio if name == "peer" else 1.0),
        }
        for name in ("llmx", "peer")
    }
    return {"machine": MACHINE, "settings": settings, "engines": engines}


def test_the_page_says_what_the_results_say_and_where_llmx_is_behind(page: Any) -> None:
    text, plots = page.build({"decode-m-int4": decode_result(0.8)})
    assert "| peer | int4 | 100.0 (99.0–101.0) | 1.50 | 50.0 (49.0–51.0) | 0.80 | 1 |" in text
    assert "- CPU, m, int4: peer decodes 1.25 times as fast." in text
    assert [plot["file"] for plot in plots] == ["decode-m-int4.png"]
    ahead, _ = page.build({"decode-m-int4": decode_result(1.2)})
    assert "- CPU, m, int4: peer" not in ahead and "Nowhere in what is measured here." in ahead


def test_results_of_other_kinds_are_shown_as_they_say(page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table = {"title": "t", "columns": ["a", "b"], "rows": [["1", "2"]]}
    result = {"machine": {**MACHINE, "gpu": "H200"}, "title": "Batches", "section": "CUDA", "tables": [table]}
    text, _ = page.build({"cuda-batch": {**result, "losses": ["The peer is faster."]}})
    assert text.index("## CUDA") < text.index("### Batches") < text.index("| 1 | 2 |") < text.index("H200")
    assert "- The peer is faster." in text
    with pytest.raises(SystemExit, match=r"cuda-batch\.json is of no kind"):
        page.build({"cuda-batch": {**result, "section": "elsewhere"}})


def test_a_stale_page_or_plot_is_found(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "docs" / "benchmarks.md")
    monkeypatch.setattr(page, "IMAGES", tmp_path / "docs" / "benchmarks")
    text, plots = page.build({"decode-m-int4": decode_result(0.8)})
    assert page.stale(text, plots) == ["docs/benchmarks.md", "docs/benchmarks/decode-m-int4.png"]
    page.write(text, plots)
    assert page.stale(text, plots) == []
    text, plots = page.build({"decode-m-int4": decode_result(0.8, speed=51)})
    assert page.stale(text, plots) == ["docs/benchmarks.md", "docs/benchmarks/decode-m-int4.png"]
    page.write("", [])
    assert not list((tmp_path / "docs" / "benchmarks").iterdir())


def test_engines_are_named_with_their_weights(page: Any) -> None:
    peers = importlib.import_module("peers")
    named = {"llama.cpp": "q4_0", "llmx-fp32": "fp32", "transformers-compiled": "fp32", "openvino-genai": "int4"}
    for name, kind in named.items():
        assert peers.parse_peer(name, "fp32" if name.startswith("tr") else "int4").kind == kind
    assert peers.parse_peer("transformers-compiled-bf16").engine == "transformers-compiled"
    with pytest.raises(SystemExit, match="not with q9"):
        peers.parse_peer("llama.cpp-q9")
    with pytest.raises(SystemExit, match="No engine is called vllm"):
        peers.parse_peer("vllm")
