"""Encoder packages at run time: embeddings, classification, reranking, filling masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llmx.runtime.dtypes import numpy_dtype
from llmx.runtime.errors import ContextLengthError, FamilyError, LlmxError, PackageError, RequestError
from llmx.runtime.manifest import EncoderInfo, Manifest
from llmx.runtime.providers import resolve_device
from llmx.runtime.sessions import SessionSettings, open_sessions
from llmx.runtime.tokenizer import Tokenizer
from llmx.runtime.tracing import span

Text = str | tuple[str, str]  # a text, or a pair that the tokenizer joins
Check = Callable[[], object]  # called now and then; what it raises ends the work

#: Padded tokens of one run: more gain nothing on a CPU and fall out of its caches (256-token texts, 2 cores: 4 a run
#: were 1.38 times as fast as 32).
_BATCH_TOKENS = 1024

#: Task -> what serves it.
COMMANDS = {
    "embed": "`llmx embed` (LLM.embed)",
    "classify": "`llmx classify` or `llmx rerank` (LLM.classify, LLM.rerank)",
    "token-classify": "`llmx classify` (LLM.classify_tokens)",
    "fill-mask": "`llmx fill-mask` (LLM.fill_mask)",
}


@dataclass(frozen=True)
class Label:
    """A label with its score: a probability after softmax or sigmoid, the raw value for a regression."""

    label: str
    score: float


@dataclass(frozen=True)
class TokenLabel:
    """The likeliest label of one token; `start` and `end` are character offsets into the text."""

    label: str
    score: float
    token: str
    start: int
    end: int


@dataclass(frozen=True)
class Ranked:
    """A document by its `index` among those given."""

    index: int
    score: float
    document: str


@dataclass(frozen=True)
class Filled:
    """A token for the mask, and the text with it in place."""

    token_id: int
    token: str
    score: float
    text: str


class Encoder:
    """One graph over right-padded batches. Safe to call from several threads: it keeps no state between calls.

    `check` of a call is called before each text is tokenised and before each batch is run; what it raises ends the call.
    """

    def __init__(self, folder: Path, manifest: Manifest, session: Any, tokenizer: Tokenizer) -> None:
        if manifest.encoder is None or "encoder" not in manifest.graphs:
            raise PackageError(f"{folder} lacks its encoder's description; export the model again.")
        self.folder, self.manifest, self.session, self.tokenizer = folder, manifest, session, tokenizer
        self.info: EncoderInfo = manifest.encoder
        self._graph = manifest.graphs["encoder"]
        self._inputs = {t.name for t in self._graph.inputs}
        self._outputs = [t.name for t in self._graph.outputs]
        self._pad = manifest.tokenizer.pad_token_id or 0

    # -- what users call ----------------------------------------------------------------------------------------------

    def embed(
        self,
        texts: Seq[Text | Seq[int]],
        dimensions: int | None = None,
        normalize: bool | None = None,
        prompt_name: str | None = None,
        truncate: bool = True,
        batch_size: int = 32,
        check: Check | None = None,
    ) -> np.ndarray:
        """float32 [n, dim]. `dimensions` keeps the first so many (Matryoshka) and normalises again where the package does."""
        self._need("embed")
        dim = self.info.dimension or 0
        if dimensions is not None and not 1 <= dimensions <= dim:
            raise RequestError(f"dimensions must lie between 1 and {dim}, and is {dimensions}.")
        prefix = self._prompt(prompt_name)
        rows = self._encode([prefix + t if prefix and isinstance(t, str) else t for t in texts], truncate, check)
        vectors = np.empty((len(rows), dim), np.float32)
        for index, output in self._run(rows, "embeddings", batch_size, check):
            vectors[index] = output
        if dimensions is not None:
            vectors = vectors[:, :dimensions]
        if normalize or (normalize is None and self.info.normalized and dimensions is not None):
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def hidden_states(
        self, texts: Seq[Text | Seq[int]], truncate: bool = True, batch_size: int = 32
    ) -> list[np.ndarray]:
        """The final hidden states of each text, float32 [tokens, hidden]."""
        self._need("embed")
        rows = self._encode(texts, truncate)
        states: list[np.ndarray] = [np.empty(0)] * len(rows)
        for index, output in self._run(rows, "last_hidden_state", batch_size):
            states[index] = output[: len(rows[index].ids)].astype(np.float32)
        return states

    def classify(
        self, texts: Seq[Text], truncate: bool = True, batch_size: int = 32, check: Check | None = None
    ) -> list[list[Label]]:
        """All labels of each text (or pair), the likeliest first."""
        self._need("classify")
        rows = self._encode(texts, truncate, check)
        results: list[list[Label]] = [[] for _ in rows]
        for index, output in self._run(rows, "logits", batch_size, check):
            scores = _activate(output.astype(np.float64), self.info.activation)
            order = np.argsort(-scores, kind="stable")
            results[index] = [Label(self.info.labels[i], float(scores[i])) for i in order]
        return results

    def rerank(
        self,
        query: str,
        documents: Seq[str],
        top_n: int | None = None,
        truncate: bool = True,
        batch_size: int = 32,
        check: Check | None = None,
    ) -> list[Ranked]:
        """Documents by how well they answer the query, best first; needs a cross-encoder (one label)."""
        self._need("classify")
        if len(self.info.labels) != 1:
            raise FamilyError(
                f"{self.folder} tells {len(self.info.labels)} labels apart, and a reranker has one score; use `llmx classify`."
            )
        if top_n is not None and top_n < 1:
            raise RequestError(f"top_n must be at least 1, and is {top_n}.")
        if not documents:
            raise RequestError("There is nothing to rank; give at least one document.")
        labels = self.classify([(query, d) for d in documents], truncate, batch_size, check)
        scores = [each[0].score for each in labels]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        return [Ranked(i, scores[i], documents[i]) for i in order[:top_n]]

    def classify_tokens(self, texts: Seq[str], truncate: bool = True, batch_size: int = 32) -> list[list[TokenLabel]]:
        """The likeliest label of every token that stands for text."""
        self._need("token-classify")
        rows = self._encode(texts, truncate)
        results: list[list[TokenLabel]] = [[] for _ in rows]
        for index, output in self._run(rows, "logits", batch_size):
            row, scores = rows[index], _activate(output.astype(np.float64), "softmax")
            best = scores.argmax(-1)
            results[index] = [
                TokenLabel(self.info.labels[best[i]], float(scores[i, best[i]]), row.tokens[i], *row.offsets[i])
                for i in range(len(row.ids))
                if not row.special[i]
            ]
        return results

    def fill_mask(
        self, texts: Seq[str], top_k: int = 5, truncate: bool = True, batch_size: int = 32
    ) -> list[list[list[Filled]]]:
        """For each text, for each mask token in it, the `top_k` likeliest tokens."""
        self._need("fill-mask")
        mask = self.info.mask_token_id
        rows = self._encode(texts, truncate)
        if not 1 <= top_k <= self.manifest.model.vocab_size:
            raise RequestError(f"top_k must lie between 1 and {self.manifest.model.vocab_size}, and is {top_k}.")
        for row in rows:
            if mask not in row.ids:
                name = self.tokenizer.token(mask) if mask is not None else "the mask token"
                raise RequestError(f"The text holds no {name} to fill; put one where a word is missing.")
        results: list[list[list[Filled]]] = [[] for _ in rows]
        for index, output in self._run(rows, "logits", batch_size):
            ids = rows[index].ids
            for place in [i for i, token in enumerate(ids) if token == mask]:
                scores = _activate(output[place].astype(np.float64), "softmax")
                best = np.argsort(-scores, kind="stable")[:top_k]
                results[index].append([self._filled(ids, place, int(t), float(scores[t])) for t in best])
        return results

    def _filled(self, ids: list[int], place: int, token: int, score: float) -> Filled:
        text = self.tokenizer.decode([*ids[:place], token, *ids[place + 1 :]], skip_special_tokens=True)
        return Filled(token, self.tokenizer.decode([token]).strip(), score, text)

    def num_tokens(self, text: Text | Seq[int]) -> int:
        """Tokens of a text, or of a pair, special tokens included and nothing cut."""
        return len(self._row(text, truncate=False).ids)

    def close(self) -> None:
        """Free the session; the encoder must not be used afterwards."""
        self.session = None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _need(self, task: str) -> None:
        if self.info.task != task:
            raise FamilyError(f"{self.folder} is for {self.info.task}, not for {task}: use {COMMANDS[self.info.task]}.")

    def _prompt(self, name: str | None) -> str:
        name = name or self.info.default_prompt
        if name is None:
            return ""
        if name not in self.info.prompts:
            known = ", ".join(self.info.prompts) or "none"
            raise RequestError(f"The package has no prompt named {name!r} (it has: {known}).")
        return self.info.prompts[name]

    def _encode(self, texts: Seq[Text | Seq[int]], truncate: bool, check: Check | None = None) -> list[_Row]:
        if isinstance(texts, str):
            raise RequestError("Give a list of texts, not one text.")
        longest = self.info.max_length
        rows = []
        with span("tokenise"):
            for text in texts:
                if check is not None:
                    check()
                rows.append(self._row(text, truncate))
        for row in rows:
            if not row.ids:
                raise RequestError("A text is empty; give at least one character.")
            if len(row.ids) > longest:
                raise ContextLengthError(f"A text has {len(row.ids)} tokens and the model takes {longest}; shorten it.")
            if min(row.ids) < 0 or max(row.ids) >= self.manifest.model.vocab_size:
                raise RequestError(f"Token ids must lie between 0 and {self.manifest.model.vocab_size - 1}.")
        return rows

    def _row(self, text: Text | Seq[int], truncate: bool) -> _Row:
        first: Any = text
        second: Any = None
        if isinstance(text, tuple) and len(text) == 2 and isinstance(text[0], str):
            first, second = text
        if isinstance(first, str):
            if self.info.lower_case:
                first, second = first.lower(), second.lower() if isinstance(second, str) else None
            return _Row(*self.tokenizer.encode_pair(first, second, self.info.max_length if truncate else None))
        try:
            ids = [int(token) for token in first]
        except (TypeError, ValueError):
            raise RequestError("A text must be a string, a pair of strings or a list of token ids.") from None
        ids = ids[: self.info.max_length] if truncate else ids
        return _Row(ids, [0] * len(ids), [""] * len(ids), [(0, 0)] * len(ids), [False] * len(ids))

    def _run(
        self, rows: list[_Row], output: str, batch_size: int, check: Check | None = None
    ) -> Iterable[tuple[int, np.ndarray]]:
        """(index, output of that row), computed in batches of similar length so that little is padding."""
        if batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, and is {batch_size}.")
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
        start = 0
        while start < len(order):
            longest = len(rows[order[start]].ids)
            chosen = order[start : start + max(1, min(batch_size, _BATCH_TOKENS // longest))]
            if not self.info.padding:
                chosen = [i for i in chosen if len(rows[i].ids) == longest]
            start += len(chosen)
            if check is not None:
                check()
            results = self.run(self._feeds([rows[i] for i in chosen]), [output])[output]
            yield from zip(chosen, results, strict=True)

    def _feeds(self, rows: list[_Row]) -> dict[str, np.ndarray]:
        longest = max(len(row.ids) for row in rows)
        ids = np.full((len(rows), longest), self._pad, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = row.ids
            types[i, : len(row.ids)] = row.type_ids
            mask[i, : len(row.ids)] = 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return {name: array for name, array in feeds.items() if name in self._inputs}

    def run(self, feeds: dict[str, np.ndarray], outputs: list[str] | None = None) -> dict[str, np.ndarray]:
        """The graph's outputs by name for int64 [batch, seq] inputs."""
        names = outputs or self._outputs
        feeds = {t.name: feeds[t.name].astype(numpy_dtype(t.dtype), copy=False) for t in self._graph.inputs}
        try:
            return dict(zip(names, self.session.run(names, feeds), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise LlmxError(f"onnxruntime failed to run the graph: {' '.join(str(error).split())[:300]}") from None


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    type_ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    special: list[bool]


def _activate(x: np.ndarray, kind: str | None) -> np.ndarray:
    if kind == "softmax":
        weights = np.exp(x - x.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)
    return 1 / (1 + np.exp(-x)) if kind == "sigmoid" else x


def open_encoder(
    folder: Path,
    manifest: Manifest,
    device: str = "auto",
    threads: int | None = None,
    spin: bool = True,
    mapped_cache: bool = True,
    cache_dir: Path | None = None,
) -> Encoder:
    """The session of an encoder package with its tokenizer."""
    settings = SessionSettings(threads, spin, mapped_cache, cache_dir)
    sessions = open_sessions(folder, manifest, resolve_device(device, manifest.target == "cuda"), settings)
    return Encoder(folder, manifest, sessions["encoder"], Tokenizer.load(folder, manifest.tokenizer))
