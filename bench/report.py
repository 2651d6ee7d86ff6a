"""Everything that `llmx bench` measures of a package, as plain data."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from typing import Any

import numpy as np
from llmx.bench import coldstart, speed, traffic
from llmx.bench.memory import private_bytes, resident_peak
from llmx.runtime import LLM
from llmx.runtime.machine import usable_cpus
from llmx.runtime.tracing import Trace


@dataclass(frozen=True)
class Options:
    """What to measure; the lists are swept, every combination."""

    onnx: str
    prompt: list[int]
    steps: int
    depth: list[int]
    batch: list[int]
    repetitions: int = 5
    warmup: int = 1
    device: str = "auto"
    revision: str | None = None
    threads: int | None = None
    prefill_chunk: int | None = None
    cold_starts: int = 3
    seed: int = 0

    def load(self) -> dict[str, Any]:
        """What `LLM` takes of these."""
        found: dict[str, Any] = {"device": self.device, "threads": self.threads, "revision": self.revision}
        return found | ({"prefill_chunk": self.prefill_chunk} if self.prefill_chunk is not None else {})

    def points(self) -> list[speed.Point]:
        swept = product(self.depth, self.batch, self.prompt)
        return [speed.Point(prompt, self.steps, batch, depth) for depth, batch, prompt in swept]


def measure(options: Options, say: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """The report: `package`, `points`, `cold_start`, `memory`, `copy_bytes_per_s`, `machine`, `options`."""
    points = options.points()
    threads = options.threads or usable_cpus()
    start = time.perf_counter()
    with Trace() as trace, speed.open_for(options.onnx, points, **options.load()) as llm:
        load = time.perf_counter() - start
        speed.check(llm, points)
        found = []
        for number, point in enumerate(points, 1):
            say(f"{number} of {len(points)}: prompt {point.prompt:,}, batch {point.batch:,}, depth {point.depth:,}")
            found.append(_measure(llm, point, options))
        memory = {"private_bytes": private_bytes(), "resident_peak_bytes": resident_peak()}
        prompt = speed.random_ids(np.random.default_rng(options.seed), _vocab(llm), min(options.prompt))
        say("cold starts")
        cold = _cold_start(llm, options, prompt)
        on_cpu = llm.encoder is None and getattr(getattr(llm.backend, "_device", None), "kind", "cpu") == "cpu"
        package = _package(llm, threads, load)
    del trace
    copied = 0.0
    if on_cpu:
        say("memory bandwidth")
        copied = traffic.copy_bandwidth(threads)
        for point_facts in found:
            if point_facts["bytes_per_step"]:
                seconds = point_facts["tpot_s"]["median"]
                point_facts["bandwidth_share"] = point_facts["bytes_per_step"] / seconds / copied
    return {
        "package": package,
        "points": found,
        "cold_start": cold,
        "memory": memory,
        "copy_bytes_per_s": copied,
        "machine": {
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "system": platform.platform(),
            "cpus": usable_cpus(),
            "versions": {name: version(name) for name in ("llmx", "numpy")} | {"onnxruntime": _ort()},
        },
        "options": asdict(options),
    }


def _measure(llm: LLM, point: speed.Point, options: Options) -> dict[str, Any]:
    if llm.encoder is not None:
        return speed.texts_per_second(llm, point.prompt, point.batch, options.repetitions, options.warmup, options.seed)
    return speed.measure(llm, point, options.repetitions, options.warmup, options.seed)


def _vocab(llm: LLM) -> int:
    seq2seq = llm.manifest.seq2seq
    return seq2seq.source_vocab_size if seq2seq is not None else llm.manifest.model.vocab_size


def _cold_start(llm: LLM, options: Options, prompt: list[int]) -> dict[str, Any]:
    seq2seq = llm.manifest.seq2seq
    if not options.cold_starts or (seq2seq is not None and seq2seq.audio is not None):
        return {}
    asked = {"onnx": str(llm.folder), "prompt": prompt} | options.load()
    return coldstart.measure({key: value for key, value in asked.items() if key != "revision"}, options.cold_starts)


def _package(llm: LLM, threads: int, load: float) -> dict[str, Any]:
    m = llm.manifest
    return {
        "name": m.name,
        "family": m.family,
        "dtype": m.dtype,
        "quantization": m.quantization,
        "parameters": m.model.parameters,
        "vocab_size": m.model.vocab_size,
        "weights_bytes": m.files["weights.data"].size if "weights.data" in m.files else 0,
        "threads": threads,
        "load_s": load,
    }


def _ort() -> str:
    from llmx.runtime.providers import import_onnxruntime

    return str(import_onnxruntime().__version__)
