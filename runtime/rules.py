"""What a request's parameters come down to for one vocabulary: token ids and arrays, looked up once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
from llmx.runtime.errors import RequestError
from llmx.runtime.manifest import Seq2SeqInfo
from llmx.runtime.params import SamplingParams
from llmx.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class BadWord:
    """Tokens `ids`, the last of which may not follow the others; `in_prompt`: where they began in the prompt, too."""

    ids: tuple[int, ...]
    in_prompt: bool = False


@dataclass(frozen=True, eq=False)
class Rules:
    """Which tokens may come next, whatever the logits say. All ids lie in the vocabulary.

    `suppressed` never, `suppressed_first` not as the first, `ends` not before min_tokens; `allowed` int64 [k],
    ascending, is all that may come (None: everything). `bias` is (ids int64 [k], what is added to their logits float32
    [k]). `forced_last` is the last token of an output that max_tokens cuts.
    """

    ends: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    forced_last: int | None = None
    allowed: np.ndarray | None = None
    bias: tuple[np.ndarray, np.ndarray] | None = None
    bad_words: tuple[BadWord, ...] = ()


NO_RULES = Rules()


def make_rules(
    params: SamplingParams, tokenizer: Tokenizer, vocab_size: int, seq2seq: Seq2SeqInfo | None = None
) -> Rules:
    """The rules of a request. Raises RequestError for a token beyond the vocabulary, or a bad word without tokens."""
    bias = cast(tuple[tuple[int, float], ...], params.logit_bias)
    word_ids = cast(tuple[tuple[int, ...], ...], params.bad_words_ids or ())
    _check("stop_token_ids", params.stop_token_ids, vocab_size)
    _check("logit_bias", [token for token, _ in bias], vocab_size)
    _check("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check("bad_words_ids", [token for word in word_ids for token in word], vocab_size)
    _check("suppress_tokens", params.suppress_tokens or (), vocab_size)
    _check("begin_suppress_tokens", params.begin_suppress_tokens or (), vocab_size)
    ends = {token for token in tokenizer.info.eos_token_ids if token < vocab_size}
    words = [BadWord(ids) for text in params.bad_words for ids in _spellings(text, tokenizer)]
    # transformers lets a single end token pass
    words += [BadWord(ids, True) for ids in word_ids if len(ids) > 1 or ids[0] not in ends]
    suppressed = {word.ids[0] for word in words if len(word.ids) == 1}
    suppressed |= set(params.suppress_tokens or ())
    first = list(params.begin_suppress_tokens or ())
    if seq2seq is not None:
        suppressed |= set(seq2seq.suppress_tokens)
        first += [token for token in seq2seq.begin_suppress_tokens if token not in first]
    return Rules(
        ends=tuple(sorted(ends | set(params.stop_token_ids))),
        suppressed=tuple(sorted(token for token in suppressed if token < vocab_size)),
        suppressed_first=tuple(first),
        forced_last=seq2seq.forced_eos_token_id if seq2seq is not None and not params.ignore_eos else None,
        allowed=None if params.allowed_token_ids is None else np.unique(np.array(params.allowed_token_ids, np.int64)),
        bias=(np.array([t for t, _ in bias], np.int64), np.array([v for _, v in bias], np.float32)) if bias else None,
        bad_words=tuple(word for word in words if len(word.ids) > 1),
    )


def _check(name: str, ids: Iterable[int], vocab_size: int) -> None:
    if max(ids, default=0) >= vocab_size:
        raise RequestError(f"{name} must lie between 0 and {vocab_size - 1}.")


def _spellings(text: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """vLLM's: a word's tokens at the beginning of a text and, where as many and begun by another one, after a space."""
    plain, spaced = (tuple(tokenizer.encode(space + text.lstrip(), add_special_tokens=False)) for space in ("", " "))
    if not plain:
        raise RequestError(f"bad_words holds {text!r}, which has no tokens; leave it out.")
    return [plain] + ([spaced] if spaced and spaced[0] != plain[0] and len(spaced) == len(plain) else [])
