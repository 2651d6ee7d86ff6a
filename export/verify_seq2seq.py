"""Encoder-decoders beside PyTorch: its greedy path, and the package's logits along it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llmx.export.lowering import quiet
from llmx.export.seq2seq import Sources
from llmx.export.verify import Progress, check_logits, fitting
from llmx.runtime.manifest import Seq2SeqInfo, Verification
from transformers import DynamicCache, EncoderDecoderCache

_NEW_TOKENS = 16
_SOURCE_LENGTHS = (5, 23, 64)


def output_logits(model: Any, arguments: dict[str, torch.Tensor], tokens: torch.Tensor) -> np.ndarray:
    """float32 [n, vocab] after each of int64 [1, n] `tokens`, taken one by one with a cache as `generate` does. A pass over
    all of them at once says the same in most models, and not in ProphetNet, whose streams see other positions then.
    """
    mask = {name: value for name, value in arguments.items() if name == "attention_mask"}
    cache, rows = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
    with torch.no_grad():
        encoded = model.get_encoder()(**arguments, return_dict=True)
        for at in range(tokens.shape[1]):
            step = {"decoder_input_ids": tokens[:, at : at + 1], "past_key_values": cache, "use_cache": True}
            rows.append(model(encoder_outputs=encoded, **mask, **step, return_dict=True).logits[0, -1].float().numpy())
    return np.array(rows)


def greedy(
    model: Any, source: torch.Tensor, prompt: list[int], new_tokens: int, info: Seq2SeqInfo | None = None
) -> torch.Tensor:
    """transformers' greedy `generate` for exactly `new_tokens` tokens after the decoder's `prompt`: [1, all tokens]. With
    `info`, tokens are suppressed as it says.
    """
    from transformers import GenerationConfig

    suppressed = {} if info is None else _suppressed(info)
    settings = GenerationConfig(
        **suppressed,
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        decoder_start_token_id=prompt[0],
    )
    with torch.no_grad(), quiet():
        original, model.generation_config = model.generation_config, settings
        try:
            tokens: torch.Tensor = model.generate(
                source,
                attention_mask=torch.ones_like(source),
                decoder_input_ids=torch.tensor([prompt]),
                generation_config=settings,
            )
        finally:
            model.generation_config = original
    return tokens


def _suppressed(info: Seq2SeqInfo) -> dict[str, list[int]]:
    return {
        name: tokens
        for name in ("suppress_tokens", "begin_suppress_tokens")
        if (tokens := getattr(info, name))  # an empty list is an error to transformers
    }


def speech_greedy(
    model: Any, features: torch.Tensor, prompt: list[int], new_tokens: int, info: Seq2SeqInfo
) -> torch.Tensor:
    """Greedy tokens after `prompt` for float32 [1, mels, frames], suppressed as `info` says: [1, all tokens]. Without
    Whisper's own `generate`, which cuts sound and prompts itself.
    """
    with torch.no_grad():
        encoded, ids = model.get_encoder()(features), torch.tensor([prompt])
        for step in range(new_tokens):
            logits = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits[0, -1].float()
            logits[info.suppress_tokens + (info.begin_suppress_tokens if step == 0 else [])] = -torch.inf
            ids = torch.cat([ids, logits.argmax().reshape(1, 1)], dim=1)
    return ids


def verify_seq2seq(
    backend: Any, load: Callable[[], Any], info: Seq2SeqInfo, dtype: str, progress: Progress
) -> Verification:
    """Compare the package with PyTorch on sources of several lengths, teacher-forced along PyTorch's greedy path.

    Raises VerificationError as `llmx.export.verify.verify`.
    """
    model = load()
    worst, positions, tolerance = 0.0, 0, 0.0
    lengths = [min(length, info.max_source_length) for length in _SOURCE_LENGTHS]
    for row, length in enumerate(lengths):
        random = torch.Generator().manual_seed(row)
        steps = min(_NEW_TOKENS, backend.max_length - 3)
        if info.audio is None:
            source = torch.randint(0, info.source_vocab_size, (1, length), generator=random)
            tokens = greedy(model, source, info.decoder_prompt, steps)
            arguments = {"input_ids": source, "attention_mask": torch.ones_like(source)}
        else:
            source = torch.randn(
                Sources(info.audio).example(0, torch.float32)["input_features"].shape, generator=random
            )
            arguments = {"input_features": source}
            tokens = torch.randint(0, backend.vocab_size, (1, steps), generator=random)
        with fitting(model, dtype):
            want, path = output_logits(model, arguments, tokens), tokens[0].numpy()
        backend.encode(row, source[0].numpy())
        got = backend.prefill(row, path, 0, np.arange(len(path)))
        difference, allowed = check_logits(got, want, dtype, f"source of {length} tokens, position", 0)
        if difference >= worst:
            worst, tolerance = difference, allowed
        positions += len(path)
        progress(row + 1, len(lengths))
    return Verification("passed", max_abs_diff=worst, tolerance=tolerance, positions=positions)
