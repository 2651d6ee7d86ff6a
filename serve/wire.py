"""Parts of answers: token texts, log-probabilities, usage."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from llmx.runtime import Logprob
from llmx.runtime.outputs import TokenLogprobs
from llmx.runtime.remote import AnyRequest
from llmx.runtime.tokenizer import Tokenizer


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token stands for, which may be a part of a character."""
    if "ByteLevel" in tokenizer.decoder_steps:
        return tokenizer.byte_level(token)
    byte = tokenizer.byte_fallback(token)
    if byte is not None:
        return bytes([byte])
    # Decoders strip a leading space that stands for the text's beginning; the vocabulary's spelling keeps it.
    spelling = tokenizer.token(token)
    if spelling.startswith("\u2581"):
        return spelling.replace("\u2581", " ").encode()
    return tokenizer.decode_raw([token], skip_special_tokens=False).encode()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Text of a token; `bytes:\\xe2` for a part of a character, as OpenAI writes it."""
    raw = token_bytes(tokenizer, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(value: float) -> float:
    return max(value, -9999.0)  # JSON has no -Infinity; OpenAI's own number for it


def chat_logprobs(tokenizer: Tokenizer, ids: list[int], entries: list[TokenLogprobs], top: int) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat answer: one entry for each token."""
    content = []
    for token, entry in zip(ids, entries, strict=True):
        best = [t for t, p in entry.items() if p.rank is not None and p.rank <= top] if top else []
        content.append(
            {
                **_one(tokenizer, token, entry[token]),
                "top_logprobs": [
                    _one(tokenizer, t, entry[t]) for t in sorted(best, key=lambda t: entry[t].rank or 0)[:top]
                ],
            }
        )
    return content


def _one(tokenizer: Tokenizer, token: int, logprob: Logprob) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token),
        "logprob": _finite(logprob.logprob),
        "bytes": list(token_bytes(tokenizer, token)),
    }


class LegacyLogprobs:
    """`logprobs` of completions, whose text offsets go on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer, self._offset = tokenizer, offset

    def add(self, ids: list[int], entries: list[TokenLogprobs | None]) -> dict[str, Any]:
        tokens, offsets, logprobs, tops = [], [], [], []
        for token, entry in zip(ids, entries, strict=True):
            text = token_text(self._tokenizer, token)
            tokens.append(text)
            offsets.append(self._offset)
            logprobs.append(None if entry is None else _finite(entry[token].logprob))
            tops.append(
                None
                if entry is None
                else {token_text(self._tokenizer, t): _finite(p.logprob) for t, p in entry.items()}
            )
            self._offset += len(text) if not text.startswith("bytes:") else 0
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def prompt_logprobs(request: AnyRequest) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: token id -> log-probability, rank and text, for each prompt token but the first."""
    if request.params.prompt_logprobs is None or request.prompt_logprobs is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": _finite(p.logprob), "rank": p.rank, "decoded_token": p.decoded_token}
            for token, p in entry.items()
        }
        for entry in request.prompt_logprobs
    ]


def usage(requests: Sequence[AnyRequest], hidden: int = 0) -> dict[str, Any]:
    """Token counts of an answer; `hidden` tokens were generated and not shown. Guesses of speculative decoding are told as
    OpenAI tells those of its predicted outputs.
    """
    prompt = sum(r.metrics.num_prompt_tokens for r in requests)
    output = sum(_num_output(r) for r in requests) - hidden
    cached = sum(r.metrics.num_cached_tokens for r in requests)
    accepted = sum(r.metrics.num_accepted for r in requests)
    rejected = sum(r.metrics.num_drafted for r in requests) - accepted
    guessed = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
        **({"completion_tokens_details": guessed} if accepted or rejected else {}),
    }


def _num_output(request: AnyRequest) -> int:
    """Tokens that an answer counts: with `best_of` those of all outputs that were drawn, as OpenAI counts them."""
    if request.params.num_samples > request.params.n:
        return request.metrics.num_output_tokens
    return sum(s.num_output for s in request.sequences)
