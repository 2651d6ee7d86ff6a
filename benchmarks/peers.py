"""The engines that llmx is measured beside: their environments, the models they read, their worker processes.

Examples:
    python benchmarks/peers.py setup                         # venvs in .peers/; llama.cpp builds for some minutes
    python benchmarks/peers.py check --shape smollm2-135m    # do all engines compute the same model?

An engine is named with its weights: llama.cpp-f32, llama.cpp-q8_0, llama.cpp-q4_0, onnxruntime-genai-int4,
openvino-genai-int8, transformers-bf16, transformers-compiled, transformers.exporters, llmx-int4. Without: --dtype's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    HERE,
    ROOT,
    add_model_arguments,
    add_peers_argument,
    checkpoint_for,
    common_prefix,
    cpu_facts,
    fail,
    make_parser,
    print_table,
    run_quietly,
    short_error,
)

#: Engines beside which each of llmx's weights is measured where none are named.
DEFAULT = {
    "fp32": "llama.cpp-f32,onnxruntime-genai,openvino-genai,transformers,transformers-compiled,transformers.exporters",
    "fp16": "transformers-fp32,onnxruntime-genai-fp32",
    "bf16": "transformers,transformers-compiled,openvino-genai",
    "int8": "llama.cpp-q8_0,openvino-genai,llmx-fp32",
    "int4": "llama.cpp-q4_0,onnxruntime-genai,openvino-genai,llmx-int4-head4,llmx-fp32",
}
PACKAGES = {
    "llama": ["numpy", "gguf==0.19.0", "llama-cpp-python==0.3.36"],
    "genai": ["torch==2.13.0", "transformers==5.23.0", "onnxruntime==1.32.0", "onnx-ir", "onnxruntime-genai==0.18.0"],
    "openvino": [
        "torch==2.13.0", "openvino==2026.4.1", "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0", "nncf==3.4.0", "optimum-intel==2.2.0",
    ],
}  # fmt: skip
#: What is taken out again: a dependency by name alone, whose wheels do not always fit torch's and then fail on import.
REMOVED = {"openvino": "torchvision"}
#: Where each engine is installed; those not named run where the benchmark does.
VENV = {"llama.cpp": "llama", "onnxruntime-genai": "genai", "openvino-genai": "openvino"}
#: Engines and the weights they can be given, the longest names first.
KINDS = {
    "llmx": ("fp32", "fp16", "bf16", "int8", "int4", "int4-head4", "int8-same", "int4-same"),
    "llama.cpp": ("f32", "q8_0", "q4_0"),
    "onnxruntime-genai": ("fp32", "fp16", "int4"),
    "openvino-genai": ("fp32", "bf16", "int8", "int4"),
    "transformers.exporters": ("fp32",),
    "transformers-compiled": ("fp32", "fp16", "bf16"),
    "transformers": ("fp32", "fp16", "bf16"),
}
#: CMake's name of what llama.cpp can use of a CPU, by the name in /proc/cpuinfo.
GGML_FEATURES = {
    "avx512f": "AVX512",
    "avx512vbmi": "AVX512_VBMI",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
}
GGUF_KIND = {"fp32": "f32", "int8": "q8_0", "int4": "q4_0"}


@dataclass(frozen=True)
class Peer:
    """An engine and the weights it is given."""

    name: str
    engine: str
    kind: str


def parse_peer(name: str, dtype: str = "fp32") -> Peer:
    """`llama.cpp-q8_0` → engine and kind; without a kind, `dtype` (llama.cpp: what comes next to it)."""
    for engine, kinds in KINDS.items():
        if name == engine or name.startswith(engine + "-"):
            kind = name[len(engine) + 1 :].lower() or (GGUF_KIND.get(dtype, "f32") if engine == "llama.cpp" else dtype)
            if kind not in kinds:
                fail(f"{engine} is measured with {', '.join(kinds)}, not with {kind}.")
            return Peer(name, engine, kind)
    fail(f"No engine is called {name}; choose from {', '.join(KINDS)}.")


def chosen_peers(args: argparse.Namespace, default: dict[str, str]) -> list[Peer]:
    """llmx, then the engines of --peers, or those of `default` for --dtype."""
    named = default.get(args.dtype, "") if args.peers is None else args.peers
    names = dict.fromkeys(["llmx", *(name for name in named.split(",") if name)])
    return [parse_peer(name, args.dtype) for name in names]


def python_of(engine: str, peers: Path) -> str:
    """The interpreter that has `engine`. Exits with one sentence where it was not set up."""
    if engine not in VENV:
        return sys.executable
    python = peers / VENV[engine] / "bin" / "python"
    if not python.is_file():
        fail(f"{engine} is not set up in {peers}: run `python benchmarks/peers.py setup`, or name another --peers-dir.")
    return str(python.absolute())


def llmx_export(checkpoint: Path, output: Path, dtype: str) -> list[str]:
    """The command line of `llmx export`."""
    command = [sys.executable, "-m", "llmx.cli", "export", "--model", str(checkpoint), "--output", str(output)]
    weights = ["--quantize", dtype] if dtype.startswith("int") else ["--dtype", dtype]
    if dtype == "int4-head4":  # the output head and the embedding too, as onnxruntime-genai's builder does
        weights = ["--quantize", "int4", "--quantize-head", "int4"]
    elif dtype.endswith("-same"):  # prompts by the products that decoding has
        weights = ["--quantize", dtype.removesuffix("-same"), "--quantize-prompts", "same"]
    return [*command, *weights, "--no-verify"]


def genai_builder(checkpoint: Path, output: Path, peers: Path, precision: str = "fp32") -> list[str]:
    """The command line of onnxruntime-genai's model builder."""
    command = [python_of("onnxruntime-genai", peers), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    cache = output.parent / "genai-cache"
    return [*command, "-o", str(output), "-p", precision, "-e", "cpu", "-c", str(cache)]


def openvino_export(checkpoint: Path, output: Path, peers: Path, kind: str) -> list[str]:
    """The command line of optimum-intel, which makes what openvino-genai reads. int4: groups of 32, all layers."""
    optimum = python_of("openvino-genai", peers).replace("bin/python", "bin/optimum-cli")
    command = [optimum, "export", "openvino", "--model", str(checkpoint), "--task", "text-generation-with-past"]
    whole = ["--group-size", "32", "--ratio", "1.0"] if kind == "int4" else []
    return [*command, "--weight-format", "fp32" if kind == "bf16" else kind, *whole, str(output)]


def model_for(peer: Peer, checkpoint: Path, work: Path, peers: Path, rebuild: bool = False) -> Path:
    """What the engine reads, made from `checkpoint` once: GGUF, a genai folder, a package; transformers reads it as is.

    It is made anew where the checkpoint, or what makes it, has changed since.
    """
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if peer.engine in ("transformers", "transformers-compiled"):
        return checkpoint
    facts = {"checkpoint": _checkpoint_facts(checkpoint), "kind": peer.kind}
    python = python_of(peer.engine, peers)
    if peer.engine == "llama.cpp":
        facts["writer"] = _hash([HERE / "gguf_writer.py"])
        source = checkpoint
        if peer.kind != "f32":
            source = model_for(parse_peer("llama.cpp-f32"), checkpoint, work, peers)
        writer = [python, str(HERE / "gguf_writer.py"), "--type", peer.kind, str(source)]
        target = work / f"{checkpoint.name}-{peer.kind}.gguf"
        return _made(target, facts, rebuild, lambda partial: [*writer, str(partial)])
    target = work / f"{checkpoint.name}-{peer.engine}-{peer.kind}"
    if peer.engine == "onnxruntime-genai":
        installed = (peers / VENV[peer.engine]).glob("lib/python*/site-packages/onnxruntime_genai-*.dist-info")
        facts["builder"] = ",".join(path.name for path in installed)
        return _made(target, facts, rebuild, lambda partial: genai_builder(checkpoint, partial, peers, peer.kind))
    if peer.engine == "openvino-genai":
        return _made(target, facts, rebuild, lambda partial: openvino_export(checkpoint, partial, peers, peer.kind))
    if peer.engine == "transformers.exporters":
        command = [python, str(HERE / "exporters_export.py"), str(checkpoint)]
        return _made(target, facts, rebuild, lambda partial: [*command, str(partial)])
    facts["exporter"] = _hash([*(ROOT / "export").rglob("*.py"), ROOT / "runtime" / "manifest.py"])
    return _made(target, facts, rebuild, lambda partial: llmx_export(checkpoint, partial, peer.kind))


def _made(target: Path, facts: dict[str, str], rebuild: bool, command: Callable[[Path], list[str]]) -> Path:
    """`target`, made by `command` unless its stamp says that it was made of the same `facts`."""
    stamp = target.with_name(target.name + ".stamp.json")
    if not rebuild and target.exists() and stamp.is_file() and json.loads(stamp.read_text()) == facts:
        return target
    print(f"making {target}", file=sys.stderr)
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    for path in (stamp, partial, target):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    run_quietly(command(partial), f"Making {target.name}")
    partial.rename(target)
    stamp.write_text(json.dumps(facts, indent=1))
    return target


def _checkpoint_facts(checkpoint: Path) -> str:
    files = sorted(checkpoint.glob("*.safetensors"))
    sizes = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join([(checkpoint / "config.json").read_text(), *sizes]).encode()).hexdigest()[:16]


def _hash(files: list[Path]) -> str:
    return hashlib.sha256(b"\n".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


class Worker:
    """An engine's process. Stopped (SIGSTOP) between requests, so that no thread of it spins while another is measured."""

    def __init__(
        self,
        peer: Peer,
        model: Path,
        threads: int,
        context: int,
        work: Path,
        peers: Path,
        one_setting: bool = False,
    ) -> None:
        """`one_setting`: the engine tries no settings of its own against each other at its first run."""
        options = {"engine": peer.engine, "model": str(model), "threads": threads, "context": context}
        options |= {"one_setting": one_setting, "dtype": peer.kind, "cache": str(work.resolve() / "cache")}
        command = [python_of(peer.engine, peers), str(HERE / "worker.py"), json.dumps(options)]
        self.peer = peer
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close())
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True
        )
        self.versions: dict[str, str] = self._answer()["versions"]
        self._pause()

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, **request: Any) -> dict[str, Any]:
        """Wake the process, have it answer, put it to sleep."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._pause()
        return answer

    def _pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            fail(f"{self.peer.name} stopped: {short_error(self._stderr.read())}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


def llama_options() -> str:
    """CMake's options that build llama.cpp for this CPU, but without AMX: its kernels for it end with a segmentation fault on
    quantized weights (ggml-org/llama.cpp issue 20824; seen here with Q8_0 and Q4_0).
    """
    flags = set(cpu_facts().get("flags", "").split())
    if "amx_tile" not in flags:
        return "-DGGML_NATIVE=on"
    features = " ".join(f"-DGGML_{name}=on" for flag, name in GGML_FEATURES.items() if flag in flags)
    return f"-DGGML_NATIVE=off {features}"


def setup(args: argparse.Namespace) -> None:
    """A venv for each peer that needs its own; those that are there stay."""
    args.peers_dir.mkdir(parents=True, exist_ok=True)
    (args.peers_dir / ".gitignore").write_text("*\n")
    for name, packages in PACKAGES.items():
        folder = args.peers_dir / name
        stamp = folder / "packages.txt"
        if stamp.is_file() and stamp.read_text().split() == packages:
            continue
        print(f"{folder}: {' '.join(packages)}")
        run_quietly([sys.executable, "-m", "venv", str(folder)], f"Making {folder}")
        environment = {**os.environ, "CMAKE_ARGS": os.environ.get("CMAKE_ARGS", llama_options())}
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", *packages]
        start = time.perf_counter()
        if subprocess.run(command, env=environment, check=False).returncode:
            fail(f"pip could not install {', '.join(packages)} into {folder}; its message is above.")
        if name in REMOVED:
            removal = [str(folder / "bin" / "python"), "-m", "pip", "uninstall", "-y", REMOVED[name]]
            run_quietly(removal, f"Removing {REMOVED[name]}")
        stamp.write_text("\n".join(packages) + "\n")
        print(f"{folder} is ready ({time.perf_counter() - start:.0f} s).")


def check(args: argparse.Namespace) -> None:
    """Logits and greedy tokens of every engine beside transformers in fp32, on one short prompt."""
    checkpoint = checkpoint_for(args)
    config = json.loads((checkpoint / "config.json").read_text())
    rng = random.Random(args.seed)
    prompt = [rng.randrange(1, config["vocab_size"]) for _ in range(args.prompt)]
    names = ["transformers-fp32", *(name for name in args.peers.split(",") if name)]
    reference: dict[str, Any] = {}
    rows, wrong = [], []
    for name in dict.fromkeys(names):
        peer = parse_peer(name, args.dtype)
        model = model_for(peer, checkpoint, args.work, args.peers_dir)
        context = args.prompt + args.tokens + 16
        with closing(Worker(peer, model, args.threads, context, args.work, args.peers_dir)) as worker:
            logits = worker.request(do="logits", prompt=prompt)["logits"]
            tokens = worker.request(do="run", prompt=prompt, steps=args.tokens - 1)["tokens"]
        if not reference:
            reference = {"logits": logits, "tokens": tokens, "scale": _deviation(logits)}
        worst = max(abs(a - b) for a, b in zip(logits, reference["logits"], strict=True)) / reference["scale"]
        same = common_prefix(tokens, reference["tokens"])
        full = peer.kind in ("f32", "fp32")
        if full and worst > args.tolerance:
            wrong.append(name)
        verdict = ("NO" if name in wrong else "yes") if full else ""
        rows.append([name, f"{worst:.2e}", f"{same} of {len(tokens)}", verdict])
    title = f"{checkpoint.name}, prompt {args.prompt}: beside transformers in fp32"
    columns = [
        "engine",
        "largest logit error / deviation of logits",
        "equal tokens before the first other",
        "same model",
    ]
    print_table(title, columns, rows)
    if wrong:
        fail(f"{', '.join(wrong)} computes another model: its logits are off by more than {args.tolerance} deviations.")


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5)


def main() -> None:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("setup", help="make the peers' environments")
    add_peers_argument(making)
    checking = commands.add_parser("check", help="compare every engine's logits and tokens with transformers'")
    add_model_arguments(checking)
    add_peers_argument(checking)
    checking.add_argument("--peers", default="llmx,llama.cpp-f32,onnxruntime-genai", help="engines, by commas")
    checking.add_argument("--prompt", type=int, default=48, help="tokens of the prompt [default: 48]")
    checking.add_argument("--tokens", type=int, default=16, help="tokens to compare [default: 16]")
    checking.add_argument("--threads", type=int, default=2)
    checking.add_argument("--seed", type=int, default=0)
    checking.add_argument("--tolerance", type=float, default=0.02, help="in deviations of the logits [default: 0.02]")
    args = parser.parse_args()
    {"setup": setup, "check": check}[args.command](args)


if __name__ == "__main__":
    main()
