"""Tokenizers without tokenizer.json: SentencePiece models with ids of their own, beside transformers' slow ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, MissingDependencyError, RequestError, SamplingParams
from zoo.models import make_seq2seq

TEXTS = ["Hello there, good sir!", ">>fra<< what news", "  odd   spaces", "ünïcødé 日本", "x"]
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def train(file: Path, seed: int, size: int) -> None:
    """A unigram model of the demo's training text (another part for each seed)."""
    text = (Path(__file__).parents[2] / "artifacts" / "checkpoints" / "train.py").read_text()
    lines = [line for line in text.splitlines() if line.strip()][seed::2]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(file.with_suffix("")), vocab_size=size, hard_vocab_limit=False,
        minloglevel=2, character_coverage=0.99,
    )  # fmt: skip
    file.with_suffix(".model").rename(file)


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(model, transformers' tokenizer, package)."""
    from transformers import MarianTokenizer

    work = tmp_path_factory.mktemp("marian")
    folder = work / "checkpoint"
    folder.mkdir()
    train(folder / "source.spm", 0, 160)
    train(folder / "target.spm", 1, 160)
    pieces: list[str] = []
    for name in ("source.spm", "target.spm"):
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
        pieces += [model.id_to_piece(i) for i in range(model.get_piece_size())]
    pieces = [p for p in dict.fromkeys(pieces) if p not in ("<unk>", "<s>", "</s>")]
    special = ["</s>", "<pad>", "<unk>", ">>fra<<"]
    spellings = [*special, *pieces, *(f"▁filler{i}" for i in range(300))][:300]
    vocab = {spelling: i for i, spelling in enumerate(spellings)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = MarianTokenizer(
        str(folder / "source.spm"),
        str(folder / "target.spm"),
        str(folder / "vocab.json"),
        source_lang="en",
        target_lang="fr",
    )
    model = make_seq2seq("marian")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, export_model(ExportOptions(str(folder), work / "package")).path


def test_texts_and_translations_equal_transformers(marian: tuple[Any, Any, Path]) -> None:
    model, tokenizer, package = marian
    from llmx.export.verify_seq2seq import greedy

    with LLM(package) as llm:
        assert llm.manifest.tokenizer.kind == "sentencepiece"
        for text in TEXTS:
            ids = list(tokenizer(text)["input_ids"])
            assert llm.tokenizer.encode(text) == ids
            assert llm.tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
            expected = greedy(model, torch.tensor([ids]), [2], 20)[0, 1:].tolist()
            [out] = llm.generate(text, GREEDY)
            assert out.outputs[0].token_ids == expected
            assert out.outputs[0].text.strip() == tokenizer.decode(expected, skip_special_tokens=True)
            streamed = "".join(piece.text for piece in llm.stream(text, GREEDY))
            assert streamed == out.outputs[0].text
        with pytest.raises(RequestError, match="Unicode"):
            llm.generate("\ud800")


def test_without_sentencepiece(marian: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingDependencyError, match=r"llmx\[sentencepiece\]"):
        LLM(marian[2])
