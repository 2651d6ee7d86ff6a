"""What the parts of `LLM` share: what a package was loaded into."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmx.runtime.backend import Backend
from llmx.runtime.driver import Driver
from llmx.runtime.errors import FamilyError, RequestError
from llmx.runtime.manifest import Manifest
from llmx.runtime.prompts import Prompt, is_token
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import span

if TYPE_CHECKING:
    from llmx.runtime.encoder import Encoder
    from llmx.runtime.engine import Engine


class Loaded:
    """A loaded package. An encoder has `encoder`; `backend`, `engine` and `prefill_chunk` are of models that generate."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    encoder: Encoder | None
    backend: Backend
    engine: Engine
    prefill_chunk: int
    _driver: Driver

    @property
    def max_length(self) -> int:
        """Positions that a request may take, prompt and output together."""
        return self.backend.max_length if self.encoder is None else self.encoder.info.max_length

    def need_generation(self) -> None:
        """Raises FamilyError where the package does not generate text."""
        if self.encoder is not None:
            from llmx.runtime.encoder import COMMANDS

            raise FamilyError(
                f"{self.folder} is an encoder for {self.encoder.info.task} and does not generate text; "
                f"use {COMMANDS[self.encoder.info.task]}."
            )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            with span("tokenise"):
                return self.tokenizer.encode(prompt)
        if isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, bytearray, memoryview, Mapping)):
            tokens = list(prompt)
            if all(is_token(token) for token in tokens):
                return [operator.index(token) for token in tokens]
        raise RequestError("A prompt must be text or a list of token ids.")
