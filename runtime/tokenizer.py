"""Text to token ids and back, whole and piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmx.runtime.errors import PackageError
from llmx.runtime.manifest import TokenizerInfo

REPLACEMENT = "\ufffd"


class Tokenizer:
    """`tokenizer.json` with the package's special tokens; decodes as transformers' fast tokenizers do."""

    def __init__(self, backend: object, info: TokenizerInfo) -> None:
        self._backend = backend
        self.info = info

    @staticmethod
    def load(folder: Path, info: TokenizerInfo) -> Tokenizer:
        """Raises PackageError where the file is damaged."""
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / info.file))
        except Exception as error:  # tokenizers raises bare Exception
            raise PackageError(f"{folder / info.file} is damaged ({error}); export the model again.") from None
        return Tokenizer(backend, info)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)  # type: ignore[attr-defined]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids  # type: ignore[attr-defined]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """transformers' `decode`, its optional clean-up of spaces before punctuation included."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)  # type: ignore[attr-defined]
        return clean_up_spaces(text) if self.info.clean_up_tokenization_spaces else text

    def token(self, token_id: int) -> str:
        """The vocabulary's spelling of a token, or "" for an id that has none (a padded embedding row)."""
        return self._backend.id_to_token(token_id) or ""  # type: ignore[attr-defined]


def clean_up_spaces(text: str) -> str:
    """transformers' `clean_up_tokenization`."""
    for before, after in _CLEAN_UP:
        text = text.replace(before, after)
    return text


_CLEAN_UP = [
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
]  # fmt: skip


class IncrementalDetokenizer:
    """Text of a growing list of tokens, emitted as soon as later tokens cannot change it.

    The output's text is what decoding prompt and output adds to decoding the prompt: so a word that continues the
    prompt keeps its leading space. Only a window of recent tokens is decoded at each push (vLLM's prefix and read
    offsets): `ids[prefix:read]` is text already shown, which tells where new text starts.
    """

    _CONTEXT = 6  # prompt tokens kept for context: enough for a split character and a word boundary

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids[-self._CONTEXT :])
        self._prefix, self._read = 0, len(self._ids)
        if tokenizer.decode(self._ids, skip_special_tokens).endswith(REPLACEMENT):
            # A prompt cut inside a character: its last tokens belong to text that is still to come.
            while self._read and tokenizer.decode(self._ids[: self._read], skip_special_tokens).endswith(REPLACEMENT):
                self._read -= 1

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, possibly ""."""
        self._ids.append(token_id)
        shown = self._tokenizer.decode(self._ids[self._prefix : self._read], self._skip)
        text = self._tokenizer.decode(self._ids[self._prefix :], self._skip)
        if len(text) <= len(shown) or text.endswith(REPLACEMENT):
            return ""  # nothing new, or perhaps the first bytes of a character
        self._prefix, self._read = self._read, len(self._ids)
        if self._read > 4096:  # keep the window's memory bounded: only ids from `prefix` on are read
            self._ids = self._ids[self._prefix :]
            self._read -= self._prefix
            self._prefix = 0
        return text[len(shown) :]

    def finish(self) -> str:
        """The end of the output: whatever was still held back, broken characters as U+FFFD."""
        shown = self._tokenizer.decode(self._ids[self._prefix : self._read], self._skip)
        text = self._tokenizer.decode(self._ids[self._prefix :], self._skip)
        self._prefix = self._read = len(self._ids)
        return text[len(shown) :]
