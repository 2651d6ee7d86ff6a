"""One engine in one process: reads a JSON line a request, answers with one. `peers.Worker` starts and drives it.

Example:
    echo '{"do": "run", "prompt": [5, 6, 7], "steps": 8}' | python benchmarks/worker.py \\
        '{"engine": "transformers", "model": "CHECKPOINT", "threads": 2, "context": 64, "dtype": "fp32"}'

Requests: {"do": "run", "prompt": [ids], "steps": n} is a greedy generation; its answer has `prefill_s`, the time from
the prompt to the choice of the first token (the last position's logits included), `decode_s`, that of the n steps
after it, and the tokens. {"do": "logits", "prompt": [ids]} answers with the last position's logits.

Only the standard library is imported at the top: each engine lives in an environment of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engines import ENGINES

PACKAGES = {
    "llmx": ("llmx", "onnxruntime", "numpy"),
    "llama.cpp": ("llama_cpp_python", "numpy"),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime", "numpy"),
    "transformers": ("transformers", "torch"),
    "transformers-compiled": ("transformers", "torch"),
    "transformers.exporters": ("transformers", "torch", "onnxruntime", "onnxscript"),
    "openvino-genai": ("openvino-genai", "openvino", "optimum-intel", "nncf"),
}


def die_with_parent() -> None:
    """On Linux, have the kernel end this process with its parent: stopped between requests, it could not see that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def versions(engine: str) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES[engine]:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    die_with_parent()
    options = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    engine = ENGINES[options["engine"]](options)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({"ready": True, "versions": versions(options["engine"])})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "logits":
            answer({"logits": engine.logits(request["prompt"])})
            continue
        prefill, decode, tokens = engine.run(request["prompt"], request["steps"])
        answer({"prefill_s": prefill, "decode_s": decode, "tokens": tokens, "setting": engine.setting})


if __name__ == "__main__":
    main()
