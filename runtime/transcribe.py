"""Speech to text: sound in windows of the encoder's length, one request for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from llmx.runtime.audio import load_audio, log_mel, resample
from llmx.runtime.errors import FamilyError, RequestError
from llmx.runtime.manifest import AudioInfo
from llmx.runtime.outputs import RequestOutput
from llmx.runtime.params import SamplingParams

if TYPE_CHECKING:
    from llmx.runtime.llm import LLM


@dataclass(frozen=True)
class Transcript:
    """`text` of the whole; `language` as given or detected (None: the model knows one alone); one output a window."""

    text: str
    language: str | None
    outputs: list[RequestOutput]


Generate = Callable[[list[np.ndarray], list[int], SamplingParams], list[RequestOutput]]


def transcribe(
    llm: LLM,
    audio: str | Path | np.ndarray,
    sampling_rate: int | None,
    language: str | None,
    task: str,
    params: SamplingParams,
    generate: Generate,
) -> Transcript:
    """As LLM.transcribe. `generate` runs feature windows, all after the same decoder prompt."""
    info = audio_info(llm)
    samples = _mono(audio, sampling_rate, info)
    step = info.chunk_seconds * info.sampling_rate
    windows = [log_mel(samples[start : start + step], info) for start in range(0, len(samples), step)]
    code = _language(language, info)
    if task not in (info.tasks or {"transcribe": 0}):
        raise RequestError(f"task must be one of {', '.join(info.tasks or {'transcribe': 0})}, and is {task!r}.")
    if code is None and info.languages:
        code = _detect(llm, windows[0], info)
    assert llm.manifest.seq2seq is not None
    prompt = list(llm.manifest.seq2seq.decoder_prompt)
    if code is not None:
        prompt += [info.languages[code], *([info.tasks[task]] if info.tasks else [])]
    if info.no_timestamps_token_id is not None:
        prompt.append(info.no_timestamps_token_id)
    outputs = generate(windows, prompt, params)
    texts = [output.outputs[0].text.strip() for output in outputs]
    return Transcript(" ".join(text for text in texts if text), code, outputs)


def audio_info(llm: LLM) -> AudioInfo:
    """Raises FamilyError where the package hears nothing."""
    seq2seq = llm.manifest.seq2seq
    if seq2seq is None or seq2seq.audio is None:
        raise FamilyError(f"{llm.folder} is no speech model and takes no audio; use --prompt (LLM.generate).")
    return seq2seq.audio


def _mono(audio: str | Path | np.ndarray, sampling_rate: int | None, info: AudioInfo) -> np.ndarray:
    if isinstance(audio, (str, Path)):
        samples = load_audio(audio, info.sampling_rate)
    else:
        array = np.asarray(audio)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.floating):
            raise RequestError("audio must be a file or a float array [samples] of mono sound in -1 … 1.")
        samples = resample(array, sampling_rate or info.sampling_rate, info.sampling_rate)
    if len(samples) == 0:
        raise RequestError("The audio is empty; give at least one sample.")
    if not np.isfinite(samples).all():
        raise RequestError("The audio holds values that are not finite.")
    return samples


def _language(language: str | None, info: AudioInfo) -> str | None:
    if language is None:
        return None
    if language not in info.languages:
        known = ", ".join(sorted(info.languages)) or "its own alone"
        raise RequestError(f"The model does not know the language {language!r}; it knows {known}.")
    return language


def _detect(llm: LLM, window: np.ndarray, info: AudioInfo) -> str:
    """The likeliest language token after the start token (Whisper's own way)."""
    assert llm.manifest.seq2seq is not None
    start = llm.manifest.seq2seq.decoder_prompt[:1]
    with llm._driver.at_rest():
        llm.backend.encode(0, window)
        logits = llm.backend.prefill(0, np.array(start, np.int64), 0, np.zeros(1, np.int64))[0]
        return max(info.languages, key=lambda code: float(logits[info.languages[code]]))
