"""`llmx verify`: right packages pass, wrong ones fail at the layer that was altered, bad input is one sentence."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from llmx.cli import main
from llmx.export import ExportOptions, export_model
from llmx.export.perplexity import windows
from zoo.models import make_model, make_seq2seq, save_checkpoint, write_tokenizer

Get = Callable[[str], Path]
TEXT = "To be, or not to be, that is the question: " * 8


def verify(package: Path, model: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", "--onnx", str(package), "--model", str(model), *map(str, arguments)])


def numbers(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def altered(checkpoint: Path, folder: Path, weight: str) -> Path:
    """A copy of `checkpoint` whose tensor `weight` has other values."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[weight] = tensors[weight] * 1.1 + 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refused(result: Result, message: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    [last] = result.stderr.strip().splitlines()
    assert last.startswith("Error: ") and message in last and last.endswith(".")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bloom", "mamba"])
def test_right_packages_pass(name: str, package: Get, checkpoint: Get) -> None:
    report = numbers(verify(package(name), checkpoint(name), "--prompts", 6, "--seed", 3, "--json"))
    assert report["passed"] and report["reason"] is None and report["layer"] is None
    assert report["family"] == "decoder" and report["dtype"] == "float32" and report["tolerance"] == 1e-4
    found = report["outputs"]
    assert 0 < found["mean_abs_diff"] < found["max_abs_diff"] < found["allowed"]
    assert 0 <= found["mean_kl"] <= found["max_kl"] < 1e-8
    assert found["argmax_agreement"] == 1.0 and found["positions_past_tolerance"] == 0
    made = report["generation"]
    assert made["agreement"] == 1.0 and made["identical_rows"] == 6 and made["first_difference"] is None
    assert len(set(made["prompt_lengths"])) > 3
    assert found["positions"] == sum(made["prompt_lengths"]) + 6 * made["tokens_per_row"]
    assert report["perplexity"] is None


def test_a_prompt_crosses_the_window(package: Get, checkpoint: Get) -> None:
    report = numbers(verify(package("gemma3_text"), checkpoint("gemma3_text"), "--prompts", 1, "--json"))
    assert report["generation"]["prompt_lengths"] == [33]  # the window of 24, and 9


@pytest.mark.parametrize(
    ("name", "weight", "layer"),
    [
        ("llama", "model.layers.1.self_attn.v_proj.weight", 1),
        ("llama", "model.layers.2.mlp.down_proj.weight", 2),
        ("llama", "model.embed_tokens.weight", None),
        ("llama", "model.norm.weight", None),
        ("gemma3_text", "model.layers.1.self_attn.k_proj.weight", 1),
        ("bloom", "transformer.h.1.self_attention.dense.weight", 1),
        ("mamba", "backbone.layers.1.mixer.out_proj.weight", 1),
    ],
)
def test_altered_weights_fail_at_their_layer(
    name: str, weight: str, layer: int | None, package: Get, checkpoint: Get, tmp_path: Path
) -> None:
    other = altered(checkpoint(name), tmp_path / "other", weight)
    report = numbers(verify(package(name), other, "--prompts", 2, "--json"), code=1)
    assert not report["passed"] and "Logits differ" in report["reason"]
    assert report["layer"] == layer
    place = {"model.norm.weight": "after the last layer", "model.embed_tokens.weight": "before layer 0"}
    assert place.get(weight, f"in layer {layer} of 0 …") in report["parting"]
    assert report["outputs"]["max_abs_diff"] > report["outputs"]["allowed"]


def test_table_and_verdict(package: Get, checkpoint: Get, tmp_path: Path) -> None:
    good = verify(package("llama"), checkpoint("llama"), "--prompts", 2, "--integrity", "--threads", 1)
    assert good.exit_code == 0, good.output
    assert "KL(PyTorch‖ONNX)\tmean " in good.stdout and "100.00%" in good.stdout
    assert good.stdout.splitlines()[-1].startswith("Passed: ")
    other = altered(checkpoint("llama"), tmp_path / "other", "model.layers.0.mlp.up_proj.weight")
    bad = verify(package("llama"), other, "--prompts", 2)
    assert bad.exit_code == 1
    assert bad.stdout.splitlines()[-1].startswith("Failed: Logits differ: prefill position ")
    assert "They part in layer 0 of 0 … 2: the embeddings still agree." in bad.stdout


def test_tolerance_is_what_was_asked(package: Get, checkpoint: Get) -> None:
    strict = numbers(verify(package("llama"), checkpoint("llama"), "--tolerance", "1e-9", "--json"), code=1)
    assert strict["tolerance"] == 1e-9 and strict["outputs"]["positions_past_tolerance"] > 0


@pytest.mark.parametrize("tokens", [40, 2048])
def test_perplexity_equals_pytorch(tokens: int, demo: Path, demo_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "text").write_text(TEXT)
    report = numbers(verify(demo, demo_checkpoint, "--text-file", tmp_path / "text", "--tokens", tokens, "--json"))
    ids = AutoTokenizer.from_pretrained(demo_checkpoint)(TEXT, return_tensors="pt").input_ids[:, :tokens]
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint).eval()
    with torch.no_grad():
        expected = math.exp(model(ids, labels=ids).loss.item())
    found = report["perplexity"]
    assert found["tokens"] == ids.shape[1] - 1 < found["window"] == 2 * found["stride"]
    assert found["pytorch"] == pytest.approx(expected, rel=1e-3)
    assert found["onnx"] == pytest.approx(expected, rel=1e-3)


def test_perplexity_of_many_windows(tmp_path: Path) -> None:
    """A context of 64 tokens, so that the text takes several windows."""
    model = make_model("llama", max_position_embeddings=64)
    source = save_checkpoint(model, tmp_path / "checkpoint")
    made = export_model(ExportOptions(str(source), tmp_path / "package")).path
    (tmp_path / "text").write_text(TEXT)
    report = numbers(verify(made, source, "--text-file", tmp_path / "text", "--tokens", 150, "--json"))
    from tokenizers import Tokenizer

    ids = torch.tensor(Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids[:150])
    total = 0.0
    for position in range(1, 150):  # the window that scores it: the first to reach it
        start = max(0, math.ceil((position - 63) / 32)) * 32
        with torch.no_grad():
            logits = model(ids[None, start:position]).logits[0, -1]
        total -= logits.log_softmax(-1)[ids[position]].item()
    assert report["perplexity"]["window"] == 64 and report["perplexity"]["stride"] == 32
    assert report["perplexity"]["onnx"] == pytest.approx(math.exp(total / 149), rel=1e-3)
    assert report["perplexity"]["pytorch"] == pytest.approx(math.exp(total / 149), rel=1e-3)


def test_windows_score_every_token_once() -> None:
    for count, length in ((2, 64), (64, 64), (65, 64), (200, 64), (7, 3), (5, 2)):
        scored = [token for _, first, end in windows(count, length) for token in range(first, end)]
        assert scored == list(range(1, count))
        assert all(start < first and end - start <= length for start, first, end in windows(count, length))


def test_encoders(tmp_path: Path) -> None:
    import transformers
    from zoo.models import widen

    sizes = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, num_hidden_layers=3, max_position_embeddings=128)
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    widen(model, 0)
    model.save_pretrained(tmp_path / "bert")
    write_tokenizer(tmp_path / "bert")
    made = export_model(ExportOptions(str(tmp_path / "bert"), tmp_path / "package", task="embed", pooling="cls")).path
    report = numbers(verify(made, tmp_path / "bert", "--json"))
    assert report["passed"] and report["compared"] == "embeddings" and report["generation"] is None
    assert report["outputs"]["min_cosine"] == pytest.approx(1, abs=1e-5)
    other = altered(tmp_path / "bert", tmp_path / "other", "encoder.layer.1.output.dense.weight")
    report = numbers(verify(made, other, "--json"), code=1)
    assert report["layer"] == 1 and report["reason"].startswith("Embeddings differ: ")
    (tmp_path / "text").write_text(TEXT)
    refused(
        verify(made, tmp_path / "bert", "--text-file", tmp_path / "text"), "Perplexity is for models that generate", 2
    )


PAIRS = "translate this\tin other words\n\nto be or not\tthat is the question: whether\n"
PARTS = {
    "encoder.block.1.layer.1.DenseReluDense.wo.weight": (1, "the encoder's layer 1 of 0 … 2"),
    "decoder.block.0.layer.1.EncDecAttention.k.weight": (0, "the decoder's layer 0 of 0 … 2"),
    "decoder.block.2.layer.2.DenseReluDense.wo.weight": (2, "the decoder's layer 2 of 0 … 2"),
    "decoder.final_layer_norm.weight": (None, "after the decoder's last layer"),
}


def test_encoder_decoders(tmp_path: Path) -> None:
    model = make_seq2seq("t5")
    model.generation_config.suppress_tokens = [7, 9]
    model.generation_config.num_beams, model.generation_config.repetition_penalty = 2, 1.3  # of no matter here
    source = save_checkpoint(model, tmp_path / "t5")
    made = export_model(ExportOptions(str(source), tmp_path / "package")).path
    (tmp_path / "pairs").write_text(PAIRS)
    report = numbers(verify(made, source, "--json", "--text-file", tmp_path / "pairs", "--prompts", 3))
    assert report["passed"] and report["family"] == "encoder-decoder" and report["layer"] is None
    generation, perplexity = report["generation"], report["perplexity"]
    assert generation["agreement"] == 1 and generation["identical_rows"] == 3
    assert perplexity["tokens"] > 20 and perplexity["targets"] == 2
    assert perplexity["onnx"] == pytest.approx(perplexity["pytorch"], rel=1e-5)
    assert perplexity["pytorch"] == pytest.approx(of_targets(model, source), rel=1e-5)
    assert "of 2 targets" in verify(made, source, "--text-file", tmp_path / "pairs", "--prompts", 1).output
    for index, (weight, (layer, words)) in enumerate(PARTS.items()):
        other = altered(source, tmp_path / f"other{index}", weight)
        report = numbers(verify(made, other, "--json", "--prompts", 2), code=1)
        assert report["layer"] == layer and words in report["parting"], (weight, report["parting"])
    (tmp_path / "pairs").write_text("no target here")
    refused(verify(made, source, "--text-file", tmp_path / "pairs"), "Line 1 of the text is not a source", 2)


def of_targets(model: Any, source: Path) -> float:
    """Perplexity of PAIRS by transformers' own loss."""
    from transformers import AutoTokenizer

    tokenizer, loss, count = AutoTokenizer.from_pretrained(source), 0.0, 0
    for line in filter(None, PAIRS.splitlines()):
        text, target = line.split("\t")
        labels = tokenizer(text_target=target, return_tensors="pt").input_ids
        with torch.no_grad():
            loss += float(model(**tokenizer(text, return_tensors="pt"), labels=labels).loss) * labels.shape[1]
        count += labels.shape[1]
    return math.exp(loss / count)


def test_a_wrong_runtime_is_told_from_a_wrong_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmx.runtime.engine import Engine

    source = save_checkpoint(make_seq2seq("bart"), tmp_path / "bart")
    made = export_model(ExportOptions(str(source), tmp_path / "package")).path
    add = Engine.add
    other = np.random.default_rng(0).integers(3, 300, 9)
    monkeypatch.setattr(Engine, "add", lambda *a, **k: add(*a[:-1], other, **k))
    report = numbers(verify(made, source, "--json", "--prompts", 2), code=1)
    assert report["outputs"]["positions_past_tolerance"] == 0 and "the runtime, not the graph" in report["reason"]


def test_bad_input_is_one_sentence(package: Get, checkpoint: Get, demo_checkpoint: Path, tmp_path: Path) -> None:
    made, source = package("llama"), checkpoint("llama")
    refused(verify(tmp_path / "none", source), "There is no model package at")
    refused(verify(made, tmp_path / "none"), "There is no checkpoint at")
    refused(verify(made, checkpoint("bloom")), "was exported from a model of type llama")
    refused(verify(made, demo_checkpoint), "its hidden size is 48")
    refused(verify(made, checkpoint("llama-tied")), "its parameters is")
    refused(verify(made, source, "--text-file", tmp_path / "none"), "cannot be read as text: No such file", 2)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused(verify(made, source, "--text-file", tmp_path / "binary"), "byte 0 is not UTF-8", 2)
    (tmp_path / "short").write_text("a")
    refused(verify(made, source, "--text-file", tmp_path / "short"), "perplexity needs at least 2", 2)
    refused(verify(made, source, "--adapter", tmp_path), "is not a PEFT adapter")
    assert "--tolerance" in verify(made, source, "--tolerance", 0).stderr


def test_integrity(package: Get, checkpoint: Get, tmp_path: Path) -> None:
    shutil.copytree(package("llama"), tmp_path / "copy")
    weights = tmp_path / "copy" / "weights.data"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    refused(verify(tmp_path / "copy", checkpoint("llama"), "--integrity"), "was altered")


def test_without_torch(package: Get, checkpoint: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmx.runtime import providers

    installed = providers.is_installed
    monkeypatch.setattr(providers, "is_installed", lambda name: name != "torch" and installed(name))
    monkeypatch.delitem(sys.modules, "llmx.export.compare", raising=False)
    result = verify(package("llama"), checkpoint("llama"))
    refused(result, 'Verifying needs torch: pip install "llmx[export]"')


def test_a_package_that_cannot_be_written_to(package: Get, checkpoint: Get, tmp_path: Path) -> None:
    """The layer is found without writing beside the package."""
    shutil.copytree(package("llama"), tmp_path / "copy")
    other = altered(checkpoint("llama"), tmp_path / "other", "model.layers.1.self_attn.o_proj.weight")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "copy").iterdir()}
    (tmp_path / "copy").chmod(0o555)
    try:
        report = numbers(verify(tmp_path / "copy", other, "--prompts", 1, "--json"), code=1)
    finally:
        (tmp_path / "copy").chmod(0o755)
    assert report["layer"] == 1
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "copy").iterdir()}
