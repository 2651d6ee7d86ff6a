"""SentencePiece models whose ids a vocabulary file gives: what no `tokenizer.json` expresses (Marian, M2M-100, PLBart).

The package has the models as files, and `sentencepiece.json`: spelling -> id, the ids put around a text, special ids and
the spellings that may stand at a text's beginning (Marian's `>>fra<<`). Needs the `sentencepiece` extra.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmx.runtime.errors import MissingDependencyError, PackageError, RequestError
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.tokenizer import Tokenizer

SOURCE_FILE, TARGET_FILE = "source.spm", "target.spm"


class SpmTokenizer(Tokenizer):
    """Encodes with the source's model and decodes with the target's, as transformers' slow tokenizers do."""

    def __init__(self, source: Any, target: Any, facts: dict[str, Any], info: TokenizerInfo) -> None:
        self._source, self._target = source, target
        self._ids: dict[str, int] = facts["vocab"]
        self._spellings = {i: spelling for spelling, i in self._ids.items()}
        self._prefix, self._suffix, self._unknown = facts["prefix"], facts["suffix"], facts["unknown"]
        self._leading = frozenset(facts["leading"])
        self.info = info
        self.special_ids = frozenset(facts["special"])
        self.added_tokens = {i: self._spellings[i] for i in facts["special"] if i in self._spellings}
        self.cleans_up_spaces = info.clean_up_tokenization_spaces
        self.decoder_steps = ["SentencePiece"]
        self._byte_level = {}

    def source(self) -> str | None:
        return None

    @staticmethod
    def load(folder: Path, info: TokenizerInfo) -> SpmTokenizer:
        """Raises PackageError for a missing or damaged file, MissingDependencyError without sentencepiece."""
        try:
            import sentencepiece
        except ImportError:
            raise MissingDependencyError(
                'The package\'s tokenizer needs sentencepiece: pip install "llmx[sentencepiece]".'
            ) from None
        source = folder / SOURCE_FILE
        target = folder / TARGET_FILE if (folder / TARGET_FILE).is_file() else source
        try:
            facts = json.loads((folder / info.file).read_text(encoding="utf-8"))
            reads, writes = (sentencepiece.SentencePieceProcessor(model_file=str(file)) for file in (source, target))
            return SpmTokenizer(reads, writes, facts, info)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise PackageError(
                f"The tokenizer of {folder} is damaged ({reason}); copy or export the package again."
            ) from None

    @property
    def vocab_size(self) -> int:
        return max(self._spellings, default=-1) + 1

    def vocabulary(self) -> dict[str, int]:
        return dict(self._ids)

    def encode_batch(self, texts: Iterable[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [self._encode(text, add_special_tokens) for text in texts]

    def encode_plain(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)  # no spelling of a special token is looked for in a text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise RequestError("A prompt must be text in valid Unicode (no lone surrogates).")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError("A prompt must be text in valid Unicode (no lone surrogates).") from None
        pieces = []
        end = text.find("<<") + 2
        if self._leading and text.startswith(">>") and end > 1:
            pieces, text = [text[:end]], text[end:]
        pieces += self._source.encode(text, out_type=str)
        ids = [self._ids.get(piece, self._unknown) for piece in pieces]
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_pair(self, first: str, second: str | None, max_length: int | None) -> Any:
        raise RequestError("This package's tokenizer takes single texts.")

    def decode_raw(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        parts: list[str] = []
        pending: list[str] = []
        for token in ids:
            spelling = self._spellings.get(int(token), "")
            if token in self.special_ids:
                if not skip_special_tokens:
                    parts.append(self._target.decode_pieces(pending) + spelling + " ")
                    pending = []
            elif spelling:
                pending.append(spelling)
        parts.append(self._target.decode_pieces(pending))
        return "".join(parts).replace("▁", " ").strip()

    def token(self, token_id: int) -> str:
        return self._spellings.get(token_id, "")
