"""Encoders: embeddings, classifiers, rerankers, masks; each row of a padded batch as PyTorch has it alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, ContextLengthError, FamilyError, RequestError
from zoo.models import VOCAB, widen, write_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
TEXTS = ["the sea", "", "another much longer sentence about the weather in the thin interior", "ein Fluß", "x"]
TEXTS[1] = "a"


def make(kind: str, auto: str, folder: Path, **config: Any) -> Any:
    """A small random model saved with a tokenizer; returns it."""
    import transformers

    torch.manual_seed(0)
    built = transformers.AutoConfig.for_model(kind, **{**SMALL, **config})
    model = getattr(transformers, auto).from_config(built, attn_implementation="eager").eval()
    widen(model, 0)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def add_pair_template(folder: Path) -> None:
    """[end] a [end] b [end], with type ids, as BERT's tokenizers do."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = "<|end|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{end} $A {end}", f"{end} $A {end} $B:1 {end}:1", [(end, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def modules(folder: Path, pooling: dict[str, Any], dense: int | None = None, normalize: bool = True) -> None:
    """sentence-transformers' files."""
    from safetensors.torch import save_file

    kinds = ["Transformer", "Pooling"] + (["Dense"] if dense else []) + (["Normalize"] if normalize else [])
    listed = []
    for i, kind in enumerate(kinds):
        path = "" if kind == "Transformer" else f"{i}_{kind}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
        if path:
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(pooling))
        if kind == "Dense":
            activation = "torch.nn.modules.activation.Tanh"
            (folder / path / "config.json").write_text(json.dumps({"activation_function": activation}))
            generator = torch.Generator().manual_seed(1)
            weight, bias = (
                torch.randn(dense or 0, 48, generator=generator),
                torch.randn(dense or 0, generator=generator),
            )
            save_file({"linear.weight": weight * 0.2, "linear.bias": bias}, folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(listed))


def reference(model: Any, ids: list[int], pool: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return pool(model(input_ids=torch.tensor([ids])).last_hidden_state[0]).numpy()


@pytest.mark.parametrize(
    ("kind", "mode", "pool"),
    [
        ("bert", "pooling_mode_mean_tokens", lambda h: h.mean(0)),
        ("bert", "pooling_mode_cls_token", lambda h: h[0]),
        ("roberta", "pooling_mode_max_tokens", lambda h: h.amax(0)),
        ("modernbert", "pooling_mode_mean_sqrt_len_tokens", lambda h: h.sum(0) / len(h) ** 0.5),
        ("qwen3", "pooling_mode_lasttoken", lambda h: h[-1]),
        (
            "distilbert",
            "pooling_mode_weightedmean_tokens",
            lambda h: (h * torch.arange(1, len(h) + 1)[:, None]).sum(0) / sum(range(1, len(h) + 1)),
        ),
    ],
)
def test_pooling(kind: str, mode: str, pool: Any, tmp_path: Path) -> None:
    more: dict[str, Any] = {}
    if kind == "distilbert":
        more = {"dim": 48, "hidden_dim": 96, "n_layers": 3, "n_heads": 4}
    if kind == "qwen3":
        more = {"head_dim": 16, "num_key_value_heads": 2}
    if kind == "modernbert":
        more = {"local_attention": 8, "global_attn_every_n_layers": 2}
    model = make(kind, "AutoModel", tmp_path / "model", **more)
    modules(tmp_path / "model", {mode: True, "word_embedding_dimension": 48}, normalize=False)
    package = export_model(ExportOptions(str(tmp_path / "model"), tmp_path / "package")).path
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in (5, 61, 17, 1)]
    with LLM(package) as llm:
        together = llm.embed(prompts)
        alone = np.concatenate([llm.embed([p]) for p in prompts])
        states = llm.hidden_states(prompts)
    for i, prompt in enumerate(prompts):
        expected = reference(model, prompt, pool)
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(together[i], expected, atol=1e-4 * scale)
        np.testing.assert_allclose(alone[i], expected, atol=1e-4 * scale)
        assert states[i].shape == (len(prompt), 48)


def test_dense_normalisation_matryoshka_and_prompts(tmp_path: Path) -> None:
    model = make("bert", "AutoModel", tmp_path / "model")
    modules(tmp_path / "model", {"pooling_mode_mean_tokens": True}, dense=20)
    (tmp_path / "model" / "config_sentence_transformers.json").write_text('{"prompts": {"query": "the: "}}')
    (tmp_path / "model" / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    package = export_model(ExportOptions(str(tmp_path / "model"), tmp_path / "package")).path
    weight = torch.randn(20, 48, generator=(g := torch.Generator().manual_seed(1))) * 0.2
    bias = torch.randn(20, generator=g)
    with LLM(package) as llm:
        ids = llm.tokenizer.encode(TEXTS[0])
        raw = torch.tanh(torch.tensor(reference(model, ids, lambda h: h.mean(0))) @ weight.T + bias)
        expected = (raw / raw.norm()).numpy()
        np.testing.assert_allclose(llm.embed(TEXTS[0])[0], expected, atol=1e-5)
        short = llm.embed(TEXTS, dimensions=8)
        assert short.shape == (5, 8)
        np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(short[0], expected[:8] / np.linalg.norm(expected[:8]), atol=1e-5)
        np.testing.assert_array_equal(llm.embed(TEXTS[0], prompt_name="query"), llm.embed("the: " + TEXTS[0]))
        assert llm.max_length == 16 and len(llm.hidden_states(TEXTS[2])[0]) == 16
        with pytest.raises(ContextLengthError, match="the model takes 16"):
            llm.embed(TEXTS[2], truncate=False)
        assert len(llm.tokenizer.encode(TEXTS[2])) > 16  # truncation is not left on the tokenizer
        with pytest.raises(RequestError, match="valid Unicode"):
            llm.embed(["half of a pair: \ud800"])
        with pytest.raises(RequestError, match="between 1 and 20"):
            llm.embed(TEXTS, dimensions=21)
        with pytest.raises(RequestError, match="no prompt named 'other'"):
            llm.embed(TEXTS, prompt_name="other")


@pytest.mark.parametrize("labels", [1, 3])
def test_classify_and_rerank_pairs(labels: int, tmp_path: Path) -> None:
    model = make("bert", "AutoModelForSequenceClassification", tmp_path / "model", num_labels=labels)
    add_pair_template(tmp_path / "model")
    package = export_model(ExportOptions(str(tmp_path / "model"), tmp_path / "package")).path
    with LLM(package) as llm:
        got = llm.classify([("the sea", text) for text in TEXTS])
        for text, row in zip(TEXTS, got, strict=True):
            first, second = llm.tokenizer.encode("the sea", False), llm.tokenizer.encode(text, False)
            ids = [0, *first, 0, *second, 0]
            types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0]
            scores = torch.sigmoid(logits) if labels == 1 else logits.softmax(-1)
            want = {model.config.id2label[i]: float(s) for i, s in enumerate(scores)}
            assert {r.label: r.score for r in row} == pytest.approx(want, abs=1e-4)
            assert [r.score for r in row] == sorted((r.score for r in row), reverse=True)
        if labels == 1:
            ranked = llm.rerank("the sea", TEXTS, top_n=3)
            assert [r.score for r in ranked] == pytest.approx(sorted((r[0].score for r in got), reverse=True)[:3])
            assert all(r.document == TEXTS[r.index] for r in ranked)
        else:
            with pytest.raises(FamilyError, match="one score"):
                llm.rerank("the sea", TEXTS)


def test_token_classification_and_masks(tmp_path: Path) -> None:
    model = make("bert", "AutoModelForTokenClassification", tmp_path / "tokens", num_labels=4)
    package = export_model(ExportOptions(str(tmp_path / "tokens"), tmp_path / "tokens-package")).path
    with LLM(package) as llm:
        for text, row in zip(TEXTS, llm.classify_tokens(TEXTS), strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([llm.tokenizer.encode(text)])).logits[0]
            assert [t.label for t in row] == [model.config.id2label[int(i)] for i in logits.argmax(-1)]
            assert row[0].start == 0 and row[-1].end == len(text) and all(t.start < t.end for t in row)

    masked = make("roberta", "AutoModelForMaskedLM", tmp_path / "masked")
    config = tmp_path / "masked" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mask_token": "<|mask|>"}))
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "masked" / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|mask|>")])
    tokenizer.save(str(tmp_path / "masked" / "tokenizer.json"))
    package = export_model(ExportOptions(str(tmp_path / "masked"), tmp_path / "masked-package")).path
    with LLM(package) as llm:
        [[found]] = llm.fill_mask("the <|mask|> sea", top_k=4)
        ids = llm.tokenizer.encode("the <|mask|> sea")
        place = ids.index(tokenizer.token_to_id("<|mask|>"))
        with torch.no_grad():
            scores = masked(input_ids=torch.tensor([ids])).logits[0, place].softmax(-1)
        assert [f.token_id for f in found] == scores.topk(4).indices.tolist()
        assert [f.score for f in found] == pytest.approx(scores.topk(4).values.tolist(), abs=1e-4)
        with pytest.raises(RequestError, match="to fill"):
            llm.fill_mask("no mask")


def test_wrong_family_and_wrong_options(tmp_path: Path, package: Callable[[str], Path]) -> None:
    from llmx.cli.main import main

    make("bert", "AutoModel", tmp_path / "model")
    run = CliRunner().invoke
    target = str(tmp_path / "package")
    refused = run(main, ["export", "--model", str(tmp_path / "model"), "--output", target, "--task", "generate"])
    assert refused.exit_code == 1 and "lacks weights" in refused.output and not Path(target).exists()
    made = run(main, ["export", "--model", str(tmp_path / "model"), "--output", target, "--pooling", "cls"])
    assert made.exit_code == 0 and "llmx embed" in made.output
    vectors = run(main, ["embed", "--onnx", target, "--text", "a", "--text", "b", "--json"])
    assert len(json.loads(vectors.stdout)["data"]) == 2
    saved = run(main, ["embed", "--onnx", target, "--output", str(tmp_path / "v.npy")], input="one\ntwo\n\nthree\n")
    assert saved.exit_code == 0 and np.load(tmp_path / "v.npy").shape == (3, 48)
    for command, needle in [
        (["run", "--onnx", target, "--prompt", "x"], "use `llmx embed`"),
        (["chat", "--onnx", target], "use `llmx embed`"),
        (["classify", "--onnx", target, "--text", "x"], "use `llmx embed`"),
        (["embed", "--onnx", str(package("llama")), "--text", "x"], "use `llmx run`"),
        (["embed", "--onnx", target, "--text", "x", "--dimensions", "99"], "between 1 and 48"),
        (["embed", "--onnx", target, "--text", " "], "empty"),
        (
            ["export", "--model", str(tmp_path / "model"), "--task", "classify", "--pooling", "cls"],
            "--pooling goes with",
        ),
        (["export", "--model", str(tmp_path / "model"), "--max-length", "64"], "--max-length goes with"),
    ]:
        result = run(main, command)
        assert result.exit_code in (1, 2) and needle in result.output, (command, result.output)
        assert "Traceback" not in result.output


def test_rows_are_not_padded_where_padding_shows(tmp_path: Path) -> None:
    """FNet mixes all positions and has no mask: rows of different length must not share a run."""
    model = make("fnet", "AutoModel", tmp_path / "model")
    package = export_model(ExportOptions(str(tmp_path / "model"), tmp_path / "package")).path
    prompts = [list(range(1, n + 1)) for n in (9, 4, 9, 30)]
    with LLM(package) as llm:
        assert llm.encoder is not None and not llm.encoder.info.padding
        vectors = llm.embed(prompts)
    for vector, prompt in zip(vectors, prompts, strict=True):
        expected = reference(model, prompt, lambda h: h.mean(0) / h.mean(0).norm())
        np.testing.assert_allclose(vector, expected, atol=1e-5)
