"""`llmx verify`: a package against its source, and against one that differs in a single layer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file


def verify(package: Path, model: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "llmx.cli", "verify", "--onnx", str(package), "--model", str(model), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout or done.stderr


def test_a_package_equals_its_source(demo: Path, demo_checkpoint: Path) -> None:
    code, out = verify(demo, demo_checkpoint)
    assert code == 0, out
    assert json.loads(out)["passed"] is True


def test_an_altered_layer_is_named(demo: Path, demo_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_checkpoint, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    name = next(n for n in weights if "layers.2." in n and "v_proj" in n)
    weights[name] = weights[name] * 1.5
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    code, out = verify(demo, tmp_path / "m")
    assert code == 1, out
    assert "layer 2" in out
    assert json.loads(out)["passed"] is False


def test_no_package(tmp_path: Path, demo_checkpoint: Path) -> None:
    code, out = verify(tmp_path / "none", demo_checkpoint)
    assert code == 1
    assert "no model package" in out
