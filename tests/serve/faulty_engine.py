"""What an engine's process loads in tests: prompts of three tokens get NaN logits, the choice "slow" takes a second."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from llmx.runtime import LLM


def load(folder: Path, device: str, **options: Any) -> LLM:
    llm = LLM(folder, device, **options)
    original = llm.engine.backend.prefill

    def prefill(slot: int, tokens: np.ndarray, *rest: Any) -> np.ndarray:
        logits = original(slot, tokens, *rest)
        return logits * np.float32(np.nan) if len(tokens) == 3 else logits

    compile_now = llm.engine.grammars.compile

    def compile_slowly(form: Any) -> Any:
        if form.choice == ("slow",):
            time.sleep(1.0)
        return compile_now(form)

    llm.engine.backend.prefill = prefill  # type: ignore[method-assign]
    llm.engine.grammars.compile = compile_slowly  # type: ignore[method-assign]
    return llm
