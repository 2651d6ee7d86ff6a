"""Time from starting a process to its first token: what a user waits for, imports and loading included.

    python -m llmx.bench.coldstart OPTIONS_JSON

is the process; it writes one JSON line once it is loaded and one after its last token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from llmx.bench.memory import private_bytes, resident_peak
from llmx.bench.statistics import spread
from llmx.runtime.errors import LlmxError

_STEPS = 8  # decode steps after the first token: the decode graph's pages count too


def child(options: dict[str, Any]) -> None:
    """Load, answer one prompt, say what it took."""
    start = time.perf_counter()
    import numpy as np
    from llmx.runtime import LLM, SamplingParams

    prompt = options.pop("prompt")
    llm = LLM(options.pop("onnx"), slots=1, **options)
    print(json.dumps({"load_s": time.perf_counter() - start}), flush=True)
    for steps in (1, _STEPS):
        if llm.encoder is not None:
            ids = np.array([prompt], np.int64)
            llm.encoder.run({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": ids * 0})
        else:
            llm.generate([prompt], SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True))
        if steps == 1:
            print(json.dumps({"first": True}), flush=True)
    print(json.dumps({"private_bytes": private_bytes(), "resident_peak_bytes": resident_peak()}), flush=True)


def _start(options: dict[str, Any]) -> dict[str, float]:
    """One process; its times from before it was started, its memory at the end."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "llmx.bench.coldstart", json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            lines, times = [], []
            for line in process.stdout:
                times.append(time.perf_counter() - begin)
                lines.append(json.loads(line))
        except BaseException:
            process.kill()
            raise
        error = process.stderr.read().strip()
    if process.returncode or len(lines) != 3:
        last = error.splitlines()[-1] if error else "it printed nothing"
        raise LlmxError(f"The process that measures a cold start failed: {last}")
    return {"ready_s": times[0], "first_token_s": times[1], **lines[0], **lines[2]}


def measure(options: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """Statistics of `repetitions` fresh processes: load, ready, first token, memory. Files are in the page cache.

    `options`: `onnx`, `prompt` (token ids) and what `LLM` takes.
    """
    runs = [_start(options) for _ in range(repetitions)]
    return {key: spread([run[key] for run in runs]) for key in runs[0]}


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
