"""The engines, each as a class that runs greedy generations. `worker.py` serves one of them from its own process.

Only the standard library is imported at the top: each engine lives in an environment of its own.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any, Protocol

Timed = tuple[float, float, list[int]]  # prefill seconds, decode seconds, tokens


class Engine(Protocol):
    setting: str  # what the engine chose by itself, for the record

    def run(self, prompt: list[int], steps: int) -> Timed: ...

    def logits(self, prompt: list[int]) -> list[float]: ...


class Llmx:
    def __init__(self, options: dict[str, Any]) -> None:
        from llmx.runtime import LLM

        self.llm = LLM(
            options["model"],
            device="cpu",
            threads=options["threads"],
            max_length=options["context"],
            slots=1,
            cache_dir=options.get("cache"),
        )
        self.setting = f"prefill_chunk={self.llm.prefill_chunk}"

    def run(self, prompt: list[int], steps: int) -> Timed:
        from llmx.runtime import SamplingParams

        params = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
        [out] = self.llm.generate([prompt], params)
        metrics = out.metrics
        return metrics.ttft, metrics.last_token - metrics.first_token, list(out.outputs[0].token_ids)

    def logits(self, prompt: list[int]) -> list[float]:
        import numpy as np

        logits = self.llm.backend.prefill(0, np.array(prompt, np.int64), 0, np.array([len(prompt) - 1], np.int64))
        return [float(value) for value in logits[0]]


class LlamaCpp:
    """llama.cpp's C interface, a call for each step. With and without flash attention: the first run keeps the faster.

    The key-value cache is llama.cpp's default (fp16) also where the weights are f32.
    """

    BATCH = 512

    def __init__(self, options: dict[str, Any]) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            options["model"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            sys.exit(f"llama.cpp cannot load {options['model']}.")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        kinds = {"off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED}
        if options.get("one_setting"):
            del kinds["on"]  # slower on the CPUs that this was measured on
        self.contexts = {name: self._context(options, kind) for name, kind in kinds.items()}
        self.setting = f"n_ubatch={self.BATCH}, cache f16"

    def _context(self, options: dict[str, Any], flash_attention: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = options["context"]
        params.n_batch = params.n_ubatch = self.BATCH
        params.n_threads = params.n_threads_batch = options["threads"]
        params.flash_attn_type = flash_attention
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            sys.exit("llama.cpp cannot make a context.")
        return context

    def _decode(self, context: Any, tokens: list[int]) -> Any:
        """Run tokens after those before; the logits of the last, as an array over llama.cpp's memory."""
        import numpy as np

        for start in range(0, len(tokens), self.BATCH):
            piece = tokens[start : start + self.BATCH]
            array = (self.api.llama_token * len(piece))(*piece)
            if self.api.llama_decode(context, self.api.llama_batch_get_one(array, len(piece))):
                raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocab,))

    def _clear(self, context: Any) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)

    def _timed(self, context: Any, prompt: list[int], steps: int) -> Timed:
        self._clear(context)
        start = time.perf_counter()
        tokens = [int(self._decode(context, prompt).argmax())]
        middle = time.perf_counter()
        for _ in range(steps):
            tokens.append(int(self._decode(context, tokens[-1:]).argmax()))
        return middle - start, time.perf_counter() - middle, tokens

    def _keep_faster(self, prompt: list[int], steps: int) -> None:
        seconds: dict[str, float] = {}
        for _ in range(2):
            for name, context in self.contexts.items():
                prefill, decode, _ = self._timed(context, prompt, steps)
                seconds[name] = min(seconds.get(name, prefill + decode), prefill + decode)
        best = min(seconds, key=lambda name: seconds[name])
        for name in [name for name in self.contexts if name != best]:
            self.api.llama_free(self.contexts.pop(name))
        tried = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        self.setting += f", flash attention {best} (tried {tried})"

    def run(self, prompt: list[int], steps: int) -> Timed:
        if len(self.contexts) > 1:
            self._keep_faster(prompt, steps)
        return self._timed(next(iter(self.contexts.values())), prompt, steps)

    def logits(self, prompt: list[int]) -> list[float]:
        context = next(iter(self.contexts.values()))
        self._clear(context)
        return [float(value) for value in self._decode(context, prompt)]


class Genai:
    def __init__(self, options: dict[str, Any]) -> None:
        import onnxruntime_genai

        self.api: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(options["model"])
        session = {"intra_op_num_threads": options["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = onnxruntime_genai.Model(config)
        self.context = options["context"]
        self.setting = "builder's defaults"

    def _generator(self, shortest: int) -> Any:
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(max_length=self.context, min_length=shortest, do_sample=False)
        return self.api.Generator(self.model, params)

    def run(self, prompt: list[int], steps: int) -> Timed:
        import numpy as np

        generator = self._generator(len(prompt) + steps + 1)  # so long the end token is not chosen
        start = time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        end = time.perf_counter()
        return middle - start, end - middle, [int(token) for token in generator.get_sequence(0)[len(prompt) :]]

    def logits(self, prompt: list[int]) -> list[float]:
        import numpy as np

        generator = self._generator(0)
        generator.append_tokens(np.array([prompt], np.int32))
        logits = np.asarray(generator.get_logits())
        return [float(value) for value in logits.reshape(-1, logits.shape[-1])[-1]]


class Transformers:
    """Not compiled ("eager"), with the model's default attention and cache."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options["threads"])
        torch.set_grad_enabled(False)
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options["dtype"]]
        self.torch: Any = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).eval()
        self.setting = f"attention {self.model.config._attn_implementation}, not compiled"

    def _step(self, tokens: list[int], past: Any) -> Any:
        ids = self.torch.tensor([tokens])
        return self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)

    def run(self, prompt: list[int], steps: int) -> Timed:
        start = time.perf_counter()
        out = self._step(prompt, None)
        tokens = [int(out.logits[0, -1].argmax())]
        middle = time.perf_counter()
        for _ in range(steps):
            out = self._step(tokens[-1:], out.past_key_values)
            tokens.append(int(out.logits[0, -1].argmax()))
        return middle - start, time.perf_counter() - middle, tokens

    def logits(self, prompt: list[int]) -> list[float]:
        return [float(value) for value in self._step(prompt, None).logits[0, -1].float()]


class TransformersCompiled(Transformers):
    """The forward compiled by torch.compile, with a static cache as `generate(cache_implementation="static")` has it.

    One graph for each length of input: the prompt's, and a single token's. The first run of a length compiles.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        from transformers import StaticCache

        self.cache = StaticCache(config=self.model.config, max_cache_len=options["context"])
        self.model.forward = self.torch.compile(self.model.forward, dynamic=False)
        self.setting = f"attention {self.model.config._attn_implementation}, torch.compile, static cache"

    def _step(self, tokens: list[int], past: Any) -> Any:
        if past is None:
            self.cache.reset()
            self.position = 0
        places = self.torch.arange(self.position, self.position + len(tokens))[None]
        self.position += len(tokens)
        ids = self.torch.tensor([tokens])
        return self.model(
            input_ids=ids, position_ids=places, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )


class TransformersExporters:
    """The graphs of transformers.exporters, fused for onnxruntime, through its own runner (a cache that grows)."""

    def __init__(self, options: dict[str, Any]) -> None:
        import onnxruntime
        import torch
        from transformers.exporters.base import ExportedModel

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = options["threads"]
        torch.set_num_threads(options["threads"])
        torch.set_grad_enabled(False)
        self.torch: Any = torch
        exported: Any = ExportedModel.from_pretrained(options["model"], device="cpu", session_options=session)
        self.graphs = exported.runners
        self.setting = "ort_fusions=cpu, all logits in prefill"

    def _prefill(self, prompt: list[int]) -> Any:
        ids = self.torch.tensor([prompt])
        return self.graphs["prefill"](input_ids=ids, position_ids=self.torch.arange(len(prompt))[None])

    def run(self, prompt: list[int], steps: int) -> Timed:
        start = time.perf_counter()
        out = self._prefill(prompt)
        tokens = [int(out.logits[0, -1].argmax())]
        middle = time.perf_counter()
        for step in range(steps):
            ids, places = self.torch.tensor([tokens[-1:]]), self.torch.tensor([[len(prompt) + step]])
            out = self.graphs["decode"](input_ids=ids, position_ids=places, past_key_values=out.past_key_values)
            tokens.append(int(out.logits[0, -1].argmax()))
        return middle - start, time.perf_counter() - middle, tokens

    def logits(self, prompt: list[int]) -> list[float]:
        return [float(value) for value in self._prefill(prompt).logits[0, -1].float()]


class OpenvinoGenai:
    """openvino-genai's LLMPipeline with its defaults, in the weights' own precision of arithmetic."""

    def __init__(self, options: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        self.api, self.openvino, self.options = openvino_genai, openvino, options
        properties = {"INFERENCE_NUM_THREADS": options["threads"]}
        if options["dtype"] == "fp32":
            properties["INFERENCE_PRECISION_HINT"] = "f32"  # else bf16 where the CPU has it
        self.pipeline: Any = openvino_genai.LLMPipeline(options["model"], "CPU", **properties)
        self.model: Any = None  # for `logits`, compiled when it is first asked for
        self.setting = "LLMPipeline" + (", f32 arithmetic" if options["dtype"] == "fp32" else "")

    def run(self, prompt: list[int], steps: int) -> Timed:
        import numpy as np

        config = self.api.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = steps + 1, True, False
        ids, times, api = np.array([prompt], np.int64), [], self.api

        class Clock(api.StreamerBase):  # type: ignore[misc, name-defined]
            def write(self, _: Any) -> Any:
                times.append(time.perf_counter())
                return api.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        tensors = [self.openvino.Tensor(array) for array in (ids, np.ones_like(ids))]
        start = time.perf_counter()
        result = self.pipeline.generate(self.api.TokenizedInputs(*tensors), config, Clock())
        return times[0] - start, times[-1] - times[0], [int(token) for token in result.tokens[0]]

    def logits(self, prompt: list[int]) -> list[float]:
        import numpy as np

        if self.model is None:
            config = {"INFERENCE_PRECISION_HINT": "f32"} if self.options["dtype"] == "fp32" else {}
            path = self.options["model"] + "/openvino_model.xml"
            self.model = self.openvino.Core().compile_model(path, "CPU", config)
        ids = np.array([prompt], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": np.zeros(1, np.int32)}
        feeds["position_ids"] = np.arange(len(prompt), dtype=np.int64)[None]
        out = self.model.create_infer_request().infer(feeds)
        return [float(value) for value in out["logits"][0, -1]]


ENGINES: dict[str, type[Engine]] = {
    "llmx": Llmx,
    "llama.cpp": LlamaCpp,
    "onnxruntime-genai": Genai,
    "transformers": Transformers,
    "transformers-compiled": TransformersCompiled,
    "transformers.exporters": TransformersExporters,
    "openvino-genai": OpenvinoGenai,
}
