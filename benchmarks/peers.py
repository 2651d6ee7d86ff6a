"""The peers' environments, each in its own venv, and the models they read.

python benchmarks/peers.py setup            # into .peers/: llama-cpp-python builds for some minutes
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent
DEFAULT = ROOT / ".peers"
_PACKAGES = {
    "llama": ["llama-cpp-python", "gguf", "numpy"],
    "genai": ["torch==2.13.0", "onnxruntime-genai", "transformers==5.23.0", "onnx", "onnx-ir", "onnxruntime", "psutil"],
}
ENVIRONMENT = {"llama.cpp": "llama", "onnxruntime-genai": "genai"}


def python_of(peer: str, peers: Path) -> str:
    """The interpreter that has `peer`. Exits with one sentence where it was not set up."""
    if peer not in ENVIRONMENT:
        return sys.executable
    python = peers / ENVIRONMENT[peer] / "bin" / "python"
    if not python.is_file():
        sys.exit(f"{peer} is not set up in {peers}; run `python benchmarks/peers.py setup`.")
    return str(python)


def model_for(peer: str, checkpoint: Path, work: Path, peers: Path) -> Path:
    """What the peer reads, made from `checkpoint` once: GGUF, a genai folder, a package, or the checkpoint itself."""
    work.mkdir(parents=True, exist_ok=True)
    engine, _, kind = peer.partition("-") if peer.startswith("llama.cpp") else (peer, "", "")
    if engine == "llama.cpp":
        target = work / f"{checkpoint.name}-{kind or 'f32'}.gguf"
        if not target.is_file():
            subprocess.run(
                [
                    python_of("llama.cpp", peers),
                    str(HERE / "gguf_writer.py"),
                    str(checkpoint),
                    str(target),
                    "--type",
                    kind or "f32",
                ],
                check=True,
                capture_output=True,
            )
        return target
    if peer == "onnxruntime-genai":
        target = work / f"{checkpoint.name}-genai-fp32"
        if not (target / "model.onnx").is_file():
            subprocess.run(genai_builder(checkpoint, target, peers), check=True, capture_output=True)
        return target
    if peer == "llmx":
        target = work / f"{checkpoint.name}-llmx-fp32"
        if not target.is_dir():
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "llmx.cli",
                    "export",
                    "--model",
                    str(checkpoint),
                    "--output",
                    str(target),
                    "--no-verify",
                ],
                check=True,
            )
        return target
    return checkpoint


def genai_builder(checkpoint: Path, target: Path, peers: Path, precision: str = "fp32") -> list[str]:
    """The command line of onnxruntime-genai's model builder."""
    return [
        python_of("onnxruntime-genai", peers), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(target),
        "-p", precision, "-e", "cpu", "-c", str(target.parent / "hf-cache"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["setup"])
    parser.add_argument("--peers-dir", type=Path, default=DEFAULT)
    args = parser.parse_args()
    for name, packages in _PACKAGES.items():
        folder = args.peers_dir / name
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in packages:  # in order: torch before what would pull another
            subprocess.run([str(folder / "bin" / "pip"), "install", package], check=True)


if __name__ == "__main__":
    main()
