"""What callers may give as a prompt."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

import numpy as np
from llmx.runtime.errors import ContextLengthError, RequestError

Prompt = str | Seq[int]  # text, or token ids taken as they are


def as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """One prompt or many, as many: a flat list of integers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray, memoryview, Mapping)):
        raise RequestError(f"A prompt must be text or a list of token ids, and is of type {type(prompts).__name__}.")
    many = list(prompts)
    if many and all(is_token(item) for item in many):
        return [many]  # type: ignore[list-item]
    return many  # type: ignore[return-value]


def check_fits(count: int, longest: int) -> None:
    """Raises ContextLengthError unless a prompt of `count` tokens leaves one of `longest` positions to the answer."""
    if count >= longest:
        raise ContextLengthError(
            f"The prompt has {count} tokens and the context holds {longest}, one of them for the answer; "
            "shorten the prompt or raise max_length."
        )


def is_token(item: object) -> bool:
    """Whether `item` is one integer, Python's or of an array library's, and no truth value."""
    if isinstance(item, (bool, np.bool_)) or getattr(item, "ndim", 0) != 0:
        return False
    try:
        operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
