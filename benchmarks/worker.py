"""One engine in one process: reads a JSON line a request, answers with one. `decode.py` starts one for each peer.

    python benchmarks/worker.py ENGINE MODEL THREADS     engines: llmx, llama.cpp, onnxruntime-genai, transformers

A request is {"prompt": [ids], "tokens": n}; the answer {"prefill_s", "decode_s", "tokens": [first ids]}. Prefill is the
time to the first token's logits and choice, decode that of the remaining n - 1 steps, greedy. A worker sleeps on its
input between requests, so that only one engine uses the CPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[list[int], int], tuple[float, float, list[int]]]


def llmx(model: str, threads: int) -> Run:
    from llmx.runtime import LLM, SamplingParams

    llm = LLM(model, "cpu", threads=threads, max_length=1024, slots=1)

    def run(prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
        [out] = llm.generate([prompt], SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        m = out.metrics
        return m.ttft, m.last_token - m.first_token, out.outputs[0].token_ids

    return run


def llama_cpp(model: str, threads: int) -> Run:
    import ctypes

    import llama_cpp
    import numpy as np

    llm = llama_cpp.Llama(
        model,
        n_ctx=1024,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=512,
        n_ubatch=512,
        flash_attn=True,
        verbose=False,
        logits_all=False,
    )
    vocab = llm.n_vocab()

    def best() -> int:
        logits = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocab,)).argmax())

    def run(prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
        llm.reset()
        llm._ctx.kv_cache_clear() if hasattr(llm._ctx, "kv_cache_clear") else None
        llm.n_tokens = 0
        start = time.perf_counter()
        llm.eval(prompt)
        out = [best()]
        middle = time.perf_counter()
        for _ in range(tokens - 1):
            llm.eval(out[-1:])
            out.append(best())
        return middle - start, time.perf_counter() - middle, out

    return run


def genai(model: str, threads: int) -> Run:
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(model)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    loaded = og.Model(config)

    def run(prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
        params = og.GeneratorParams(loaded)
        params.set_search_options(max_length=1024, min_length=len(prompt) + tokens, do_sample=False)
        generator = og.Generator(loaded, params)
        start = time.perf_counter()
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        end = time.perf_counter()
        return middle - start, end - middle, generator.get_sequence(0)[len(prompt) :].tolist()

    return run


def transformers(model: str, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def run(prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
        start = time.perf_counter()
        out = loaded(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        ids = [int(out.logits[0, -1].argmax())]
        middle = time.perf_counter()
        for _ in range(tokens - 1):
            out = loaded(input_ids=torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            ids.append(int(out.logits[0, -1].argmax()))
        return middle - start, time.perf_counter() - middle, ids

    return run


ENGINES = {"llmx": llmx, "llama.cpp": llama_cpp, "onnxruntime-genai": genai, "transformers": transformers}


def main() -> None:
    engine, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    run = ENGINES[engine](model, threads)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prefill, decode, ids = run(request["prompt"], request["tokens"])
        print(
            json.dumps({"prefill_s": prefill, "decode_s": decode, "tokens": [int(i) for i in ids[:16]]}),
            file=answers,
            flush=True,
        )


if __name__ == "__main__":
    main()
