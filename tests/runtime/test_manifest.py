"""Damaged and altered packages: one sentence each, before anything runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llmx.runtime import LLM, PackageError
from llmx.runtime.mapped_cache import MappedCache


@pytest.fixture
def copy(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "copy"))


def _rename(raw: dict[str, Any]) -> None:
    raw["graphs"]["decode"]["inputs"][0]["name"] = "tokens"


def _drop_state(raw: dict[str, Any]) -> None:
    del raw["state"][0]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no decode graph": (lambda raw: raw["graphs"].pop("decode"), "graphs.decode is missing"),
    "unknown dimension": (lambda raw: raw["state"][0]["shape"].__setitem__(0, "rows"), "dimension 'rows'"),
    "negative dimension": (lambda raw: raw["state"][0]["shape"].__setitem__(1, -3), "dimension -3"),
    "unknown dtype": (lambda raw: raw["state"][0].__setitem__("dtype", "float8"), "dtype 'float8'"),
    "unknown layout": (lambda raw: raw["state"][0].__setitem__("layout", "paged"), "layout 'paged'"),
    "renamed input": (_rename, "disagree on the input"),
    "lost state": (_drop_state, "past_key_values.0.key is in the graph or in state"),
    "no context": (lambda raw: raw["model"].__setitem__("context_length", 0), "context_length must be at least 1"),
    "file elsewhere": (
        lambda raw: raw["files"].__setitem__("../x", {"size": 1, "sha256": ""}),
        "no file of the package",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_manifests(copy: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    raw = json.loads((copy / "llmx.json").read_text())
    damage(raw)
    (copy / "llmx.json").write_text(json.dumps(raw))
    with pytest.raises(PackageError, match=message):
        LLM(copy)


def test_not_text(copy: Path) -> None:
    (copy / "llmx.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(PackageError, match="not UTF-8"):
        LLM(copy)


@pytest.mark.parametrize("file", ["weights.data", "decode.onnx", "tokenizer.json", "chat_template.jinja"])
def test_altered_files_of_the_same_size(copy: Path, file: str) -> None:
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / file).write_bytes(content)
    with pytest.raises(PackageError, match=f"{file} was altered"):
        LLM(copy)


def test_large_weights_are_hashed_when_they_are_cached(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmx.runtime.manifest.HASHED_AT_LOAD", 1 << 20)
    monkeypatch.setattr("llmx.runtime.mapped_cache.MIN_WEIGHTS", 1)
    content = bytearray((copy / "weights.data").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "weights.data").write_bytes(content)
    with pytest.raises(PackageError, match=r"weights\.data was altered"):
        LLM(copy, cache_dir=tmp_path / "cache")
    assert not any(MappedCache(tmp_path / "cache").folder.glob("*"))
