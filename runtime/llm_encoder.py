"""LLM's methods for encoders, and for what a model's layers say of a text."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import numpy as np
from llmx.runtime.errors import ContextLengthError, FamilyError
from llmx.runtime.llm_base import Loaded

if TYPE_CHECKING:
    from llmx.runtime.encoder import Encoder, Filled, Label, Ranked, Text, TokenLabel


class EncoderMethods(Loaded):
    """Embeddings, labels, ranks."""

    def embed(self, texts: str | Seq[Text | Seq[int]], **options: Any) -> np.ndarray:
        """Embeddings float32 [n, dimension] of texts (or lists of token ids); options as `Encoder.embed`'s:
        `dimensions`, `normalize`, `prompt_name`, `truncate`, `batch_size`. Raises FamilyError for another package.
        """
        return self._encoder("embed").embed([texts] if isinstance(texts, str) else texts, **options)

    def hidden_states(self, texts: str | Seq[Text | Seq[int]], **options: Any) -> list[np.ndarray]:
        """The final hidden states of each text, float32 [tokens, hidden]: an embedding model's, or, of a decoder exported
        with `--with-hidden-states`, what its output head reads. Raises FamilyError for another package.
        """
        if self.encoder is None and not options:
            return self._decoder_states([texts] if isinstance(texts, str) else texts)
        return self._encoder("embed").hidden_states([texts] if isinstance(texts, str) else texts, **options)

    def _decoder_states(self, texts: Seq[Any]) -> list[np.ndarray]:
        outputs = [t.role for graph in self.manifest.graphs.values() for t in graph.outputs]
        if "last_hidden_state" not in outputs:
            raise FamilyError(f"{self.folder} returns no hidden states; export it again with --with-hidden-states.")
        states = []
        for text in texts:
            ids = self._encode(text)
            self.engine.check_ids(ids)
            if len(ids) > self.max_length:
                raise ContextLengthError(
                    f"The text has {len(ids)} tokens and the context holds {self.max_length}; give shorter pieces."
                )
            with self._driver.at_rest():
                rows = []
                chunk = self.prefill_chunk if self.backend.chunked else self.max_length
                for start in range(0, len(ids), chunk):
                    piece = np.array(ids[start : start + chunk], np.int64)
                    self.backend.prefill(0, piece, start, np.arange(len(piece)), len(ids))
                    assert self.backend.last_hidden is not None
                    rows.append(self.backend.last_hidden.astype(np.float32))
            states.append(np.concatenate(rows))
        return states

    def classify(self, texts: str | Seq[Text], **options: Any) -> list[list[Label]]:
        """All labels of each text, or pair of texts, the likeliest first."""
        return self._encoder("classify").classify([texts] if isinstance(texts, str) else texts, **options)

    def rerank(self, query: str, documents: Seq[str], **options: Any) -> list[Ranked]:
        """Documents by how well they answer `query`, the best first (cross-encoders)."""
        return self._encoder("rerank").rerank(query, documents, **options)

    def classify_tokens(self, texts: str | Seq[str], **options: Any) -> list[list[TokenLabel]]:
        """The likeliest label of every token that stands for text."""
        return self._encoder("classify tokens").classify_tokens([texts] if isinstance(texts, str) else texts, **options)

    def fill_mask(self, texts: str | Seq[str], **options: Any) -> list[list[list[Filled]]]:
        """For each text, for each mask token in it, the likeliest tokens."""
        return self._encoder("fill masks").fill_mask([texts] if isinstance(texts, str) else texts, **options)

    def _encoder(self, what: str) -> Encoder:
        self._driver.check_usable()
        if self.encoder is None:
            seq2seq = self.manifest.seq2seq
            hears = seq2seq is not None and seq2seq.audio is not None
            command = "llmx run --audio FILE.wav" if hears else "llmx run"
            raise FamilyError(
                f"{self.folder} generates text and does not {what}; use `{command}`, or export an encoder "
                "(`llmx export --task embed` makes an embedding model of a decoder)."
            )
        return self.encoder
