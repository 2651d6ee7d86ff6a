"""What benchmarks/gpu_decode.py measures: llmx, onnxruntime-genai and transformers on a GPU, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

_PIECE = 1 << 28


class Prepare:
    """What is done before anything is measured, in a process of its own: it leaves nothing on the device."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.versions: dict[str, str] = {}

    def prepare(self, package: str, genai: str | None) -> dict[str, Any]:
        import torch

        manifest = fill_weights(Path(package), Path(genai) if genai else None)
        kept = {key: manifest[key] for key in ("name", "dtype")}
        return {"gpu": torch.cuda.get_device_name(), "manifest": kept, "copy_bytes_per_s": copy_speed()}


def copy_speed() -> float:
    """Bytes a second of a large copy on the device, read and written."""
    import torch

    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            target.copy_(source)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 4)
    return float(2 * source.nbytes / statistics.median(seconds[2:]))


def fill_weights(package: Path, genai: Path | None) -> dict[str, Any]:
    """Random weights where they are missing; the package's manifest."""
    manifest: dict[str, Any] = json.loads((package / "llmx.json").read_text())
    dtype = manifest["dtype"] if manifest.get("quantization") is None else "any"
    _fill(package / "weights.data", manifest["files"]["weights.data"]["size"], dtype)
    if genai is not None:
        size = max((span.stop for span in _external(genai / "model.onnx")), default=0)
        _fill(genai / "model.onnx.data", size, dtype)
    return manifest


def _external(model: Path) -> list[range]:
    import onnx

    spans = []
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if "length" in entries:
            start = int(entries.get("offset", 0))
            spans.append(range(start, start + int(entries["length"])))
    return spans


def _fill(file: Path, size: int, dtype: str) -> None:
    """Normal values of a trained model's scale; for quantized weights ("any"), bytes of which every reading is small."""
    if file.exists() and file.stat().st_size == size:
        return
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    with file.open("wb", buffering=0) as out:
        for start in range(0, size, _PIECE):
            count = min(_PIECE, size - start)
            if dtype == "any":
                values = torch.randint(0, 65536, ((count + 1) // 2,), device="cuda", generator=generator)
                piece = (values & 0xA7FF).to(torch.int32).to(torch.int16)
            else:
                drawn = torch.randn((count + 1) // 2, device="cuda", generator=generator) * 0.02
                piece = drawn.to(getattr(torch, dtype))
            out.write(piece.view(torch.uint8)[:count].cpu().numpy().tobytes())


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _prompt(count: int, seed: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(seed).integers(1, 1000, count).tolist()
    return drawn


class Llmx:
    """The whole runtime: `LLM.generate`, and the backend alone for batches."""

    def __init__(self, options: dict[str, Any]) -> None:
        import onnxruntime
        from llmx.runtime import LLM

        self.versions = {"onnxruntime-gpu": onnxruntime.__version__, **_versions("numpy")}
        self._used_before = _memory_used()
        start = time.perf_counter()
        slots = options.get("slots", 1)
        self.llm = LLM(options["model"], "cuda", max_length=options["length"], slots=slots)
        self.open_s = time.perf_counter() - start

    def run(self, prompt: int, steps: int, seed: int) -> dict[str, float]:
        from llmx.runtime import SamplingParams

        params = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
        [out] = self.llm.generate([_prompt(prompt, seed)], params)
        metrics = out.metrics
        return {"first_token_s": metrics.ttft, "decode_s": metrics.last_token - metrics.first_token}

    def batches(self, rows: list[int], context: int) -> dict[str, Any]:
        """Steps of so many rows, each after `context` positions; the memory that all of it takes."""
        backend: Any = self.llm.backend
        manifest = self.llm.manifest
        for slot in range(max(rows)):
            backend.prefill_last(slot, np.array(_prompt(context, slot)), 0)
        made = {str(count): self._steps(backend, count, context) for count in rows}
        weights, embedding = manifest.files["weights.data"].size, self._lookup_bytes()
        state = manifest.state_bytes_per_token() * backend.slots * backend.max_length
        used = _memory_used() - self._used_before
        facts = {"weights": weights, "state": state, "beyond": used - weights - state, "open_s": self.open_s}
        return {"batches": made, "read": weights - embedding, **facts}

    def _lookup_bytes(self) -> int:
        """Of tables that a step reads a row of: rotary ones, and an embedding that is not the head's too."""
        skipped = [w for w in self.llm.manifest.weights if w.name.startswith("rotary_")]
        tables = [w for w in self.llm.manifest.weights if "embed_tokens" in w.name]
        tied = not any("lm_head" in w.name for w in self.llm.manifest.weights) or not tables
        return sum(w.nbytes for w in [*skipped, *([] if tied else tables)])

    def _steps(self, backend: Any, rows: int, context: int, steps: int = 64) -> dict[str, float]:
        from llmx.runtime import SamplingParams

        step = _greedy_steps(backend, rows, context, steps, ahead=True)
        alone = _launches(backend, rows, context, steps)
        sampled = _sampled_steps(
            backend, rows, context, steps // 2, SamplingParams(temperature=0.8, top_k=40).resolved({})
        )
        return {
            "step_ms": 1e3 * step,
            "tokens_per_s": rows / step,
            "launch_ms": 1e3 * alone,
            "host_us": max(0.0, 1e6 * (step - alone)),
            "sampled_ms": 1e3 * sampled,
        }


def _greedy_steps(backend: Any, rows: int, context: int, steps: int, ahead: bool) -> float:
    """Median seconds of a step whose tokens the host reads."""
    tokens, lengths, asks = np.arange(1, rows + 1), np.full(rows, context), np.zeros(rows, np.float32)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        made = backend.decode(tokens, lengths, None, asks)
        tokens, lengths = np.array([made.greedy(row) for row in range(rows)]), lengths + 1
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[8:])


def _launches(backend: Any, rows: int, context: int, steps: int) -> float:
    """Mean seconds of the captured step alone, launched back to back."""
    step, memory = backend._steps[next(size for size in backend._buckets if size >= rows)], backend._memory
    step.upload(np.ones(step.rows, np.int64), np.full(step.rows, context))
    memory.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        memory.launch(step._launch)
    memory.synchronize()
    seconds = (time.perf_counter() - start) / steps
    step.tokens = None
    return seconds


def _sampled_steps(backend: Any, rows: int, context: int, steps: int, params: Any) -> float:
    """Median seconds of a step, each row's token drawn on the host from the top of its logits."""
    from llmx.runtime.candidate_rows import Rows
    from llmx.runtime.candidates import asked, choose_from_step
    from llmx.runtime.sampling import make_generator

    ask = asked(params)
    generators = [make_generator(row) for row in range(rows)]
    batch = Rows(range(rows), [params] * rows, generators, [ask] * rows)
    tokens, lengths = np.arange(1, rows + 1), np.full(rows, context)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        made = backend.decode(tokens, lengths, None, np.full(rows, ask, np.float32))
        for row, chosen in enumerate(batch.choose(made)):
            if isinstance(chosen, int):
                tokens[row] = chosen
                continue
            choice = choose_from_step(made, row, params, generators[row], ask) if chosen is None else chosen()
            tokens[row] = choice.token if choice is not None else int(made.row(row).argmax())
        lengths = lengths + 1
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[8:])


def _memory_used() -> int:
    """Bytes in use on the device, by whomever."""
    import subprocess

    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


class Genai:
    def __init__(self, options: dict[str, Any]) -> None:
        import onnxruntime_genai as og

        self.versions = {"onnxruntime-genai-cuda": og.__version__}
        folder = Path(options["model"])
        config = json.loads((folder / "genai_config.json").read_text())
        provider = config["model"]["decoder"]["session_options"]["provider_options"][0]["cuda"]
        provider["enable_cuda_graph"] = "1" if options["graph"] else "0"
        (folder / "genai_config.json").write_text(json.dumps(config))
        self.api, self.model, self.length = og, og.Model(str(folder)), options["length"]

    def run(self, prompt: int, steps: int, seed: int) -> dict[str, float]:
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(max_length=self.length, min_length=prompt + steps + 1, do_sample=False)
        generator = self.api.Generator(self.model, params)
        ids = np.array([_prompt(prompt, seed)], np.int32)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        generator.get_next_tokens()
        middle = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
            generator.get_next_tokens()
        return {"first_token_s": middle - start, "decode_s": time.perf_counter() - middle}


class Transformers:
    """`generate` with its static cache, which compiles the step."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        import transformers

        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        config = transformers.AutoConfig.from_pretrained(options["model"])
        dtype = getattr(torch, options["dtype"])
        with torch.device("cuda"):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.torch = torch

    def run(self, prompt: int, steps: int, seed: int) -> dict[str, float]:
        ids = self.torch.tensor([_prompt(prompt, seed)], device="cuda")
        seconds = []
        for count in (1, steps + 1):
            self.torch.cuda.synchronize()
            start = time.perf_counter()
            self.model.generate(
                ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, cache_implementation="static"
            )
            self.torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return {"first_token_s": seconds[0], "decode_s": seconds[1] - seconds[0]}


ENGINES: dict[str, Any] = {"prepare": Prepare, "llmx": Llmx, "genai": Genai, "transformers": Transformers}
