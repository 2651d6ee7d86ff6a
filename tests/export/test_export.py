"""What an export writes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmx.export import ExportOptions, Reporter, export_model
from llmx.runtime import LLM, SamplingParams, load_manifest
from llmx.runtime.errors import CheckpointError, ExportError, LlmxError, UnsupportedModelError, VerificationError
from llmx.runtime.manifest import MANIFEST_FILE, check_hashes
from zoo.models import greedy, make_model, save_checkpoint, write_tokenizer

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def export(model: Path | str, output: Path, **options: Any) -> Any:
    return export_model(ExportOptions(str(model), output, **options))


def nothing_left(folder: Path) -> bool:
    return [p.name for p in folder.iterdir()] == []


# -- the package ------------------------------------------------------------------------------------------------------


def test_manifest_follows_its_schema(package: Callable[[str], Path]) -> None:
    import jsonschema

    schema = json.loads((Path(__file__).parents[2] / "runtime" / "manifest.schema.json").read_text())
    for name in ("llama", "gemma3_text"):
        jsonschema.validate(json.loads((package(name) / MANIFEST_FILE).read_text()), schema)


def test_manifest_round_trip_and_hashes(package: Callable[[str], Path]) -> None:
    folder = package("llama")
    manifest = load_manifest(folder)
    assert manifest.to_json() == (folder / MANIFEST_FILE).read_text()
    check_hashes(folder, manifest)
    assert manifest.verification.status == "passed"
    assert manifest.verification.positions == 137
    assert set(manifest.files) == {p.name for p in folder.iterdir()} - {MANIFEST_FILE}


def test_tied_weights_once_and_aligned(package: Callable[[str], Path]) -> None:
    import onnx

    folder = package("llama-tied")
    parameters = load_manifest(folder).model.parameters
    graphs = {}
    for name in ("prefill.onnx", "decode.onnx"):
        graph = onnx.load(folder / name, load_external_data=False).graph
        graphs[name] = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    assert graphs["prefill.onnx"] == graphs["decode.onnx"]
    weights = {name: e for name, e in graphs["prefill.onnx"].items() if not name.startswith("rotary_")}
    entries = list(weights.values())
    assert all(int(e.get("offset", 0)) % 4096 == 0 and e["location"] == "weights.data" for e in entries)
    assert sum(int(e["length"]) for e in entries) <= parameters * 4
    embeddings = [name for name in weights if "embed_tokens" in name or "lm_head" in name]
    assert len(embeddings) == 1


def test_no_trace_of_the_exporting_machine(package: Callable[[str], Path]) -> None:
    for file in ("prefill.onnx", "decode.onnx", MANIFEST_FILE):
        text = (package("llama") / file).read_bytes()
        assert b"site-packages" not in text and b"/modeling_" not in text


def test_sharded_and_half_precision_checkpoints(tmp_path: Path) -> None:
    model = make_model("llama").to(torch.bfloat16)
    save_checkpoint(model, tmp_path / "sharded", max_shard_size="40KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    result = export(tmp_path / "sharded", tmp_path / "out")
    assert result.manifest.dtype == "float32"
    prompt = [5, 6, 7, 8]
    with LLM(result.path, slots=1) as llm:
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == greedy(model.float(), prompt, 24)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_float16(name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    result = export(checkpoint(name), tmp_path / "out", dtype="fp16")
    assert result.manifest.verification.status == "passed"
    assert {t.dtype for t in result.manifest.state} == {"float16"}


def test_bfloat16_and_cuda_are_written_unverified(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    result = export(checkpoint("llama"), tmp_path / "bf16", target="cuda", dtype="bf16")
    assert result.manifest.verification.status == "skipped"
    assert any("was not verified" in w for w in result.warnings)
    cuda = export(checkpoint("llama"), tmp_path / "cuda", target="cuda")
    assert cuda.manifest.graphs["prefill"].input_named("query_seqlens") is None
    assert cuda.manifest.verification.status == "passed"  # its operators run on the CPU provider too


def test_shorter_context(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert export(checkpoint("llama"), tmp_path / "out", max_length=100).manifest.model.context_length == 100
    with pytest.raises(ExportError, match="between 2 and the model's context of 512"):
        export(checkpoint("llama"), tmp_path / "bad", max_length=513)


def test_adapter_is_merged(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(
        make_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload().eval()
    result = export(checkpoint("llama"), tmp_path / "out", adapter=tmp_path / "lora")
    prompt = [9, 8, 7, 6, 5]
    with LLM(result.path, slots=1) as llm:
        got = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
    assert got == greedy(merged, prompt, 24) != greedy(make_model("llama"), prompt, 24)
    with pytest.raises(CheckpointError, match="not a PEFT adapter"):
        export(checkpoint("llama"), tmp_path / "bad", adapter=tmp_path)


def test_generation_defaults(tmp_path: Path) -> None:
    folder = save_checkpoint(make_model("llama"), tmp_path / "m")
    config = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 5], "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3, "bad_words_ids": [[7], [8, 9]], "typical_p": 0.8, "suppress_tokens": [4],
        "begin_suppress_tokens": [6, 5, 1_000_000], "top_h": 0.4,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(config))
    result = export(folder, tmp_path / "out", verify=False)
    assert result.manifest.generation == {
        "temperature": 0.6, "top_k": 50, "top_p": 0.9, "typical_p": 0.8, "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3, "bad_words_ids": [[7], [8, 9]], "suppress_tokens": [4], "begin_suppress_tokens": [5, 6],
    }  # fmt: skip
    assert result.manifest.tokenizer.eos_token_ids == [0, 5]
    assert any("top_h, which llmx does not apply" in w for w in result.warnings)


def test_slow_tokenizers_are_converted(tmp_path: Path) -> None:
    """GPT-2's vocab.json and merges.txt, without a tokenizer.json."""
    from transformers import AutoTokenizer

    folder = save_checkpoint(make_model("gpt2"), tmp_path / "m")
    raw = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(raw["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in raw["merges"]))
    special = dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<|end|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    result = export(folder, tmp_path / "out", verify=False)
    text = "the thin ant in the inn"
    with LLM(result.path, slots=1) as llm:
        assert llm.tokenizer.encode(text) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_progress_is_reported(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    class Recorder(Reporter):
        def __init__(self) -> None:
            self.stages: list[str] = []
            self.last = (0, 0)

        def stage(self, name: str) -> None:
            self.stages.append(name)

        def advance(self, done: int, total: int) -> None:
            assert 0 < done <= total
            self.last = (done, total)

    recorder = Recorder()
    export_model(ExportOptions(str(checkpoint("llama")), tmp_path / "out"), recorder)
    assert recorder.stages == ["load", "trace", "rewrite", "write", "verify"]
    assert recorder.last[0] == recorder.last[1]


# -- refusals: one sentence, nothing left behind ----------------------------------------------------------------------


def refuses(kind: type[LlmxError], message: str, work: Path, model: Path | str, **options: Any) -> None:
    out = work / "packages"
    out.mkdir(exist_ok=True)
    with pytest.raises(kind, match=message) as caught:
        export(model, out / "x", **options)
    assert "\n" not in str(caught.value)
    assert nothing_left(out)


def test_no_such_model(tmp_path: Path) -> None:
    refuses(CheckpointError, "no checkpoint at", tmp_path, tmp_path / "none")
    refuses(CheckpointError, "hub could not be reached", tmp_path, "some-org/some-model")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuses(CheckpointError, "no config.json", tmp_path, tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refuses(CheckpointError, "no model_type", tmp_path, tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    refuses(CheckpointError, "cannot be read", tmp_path, tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    refuses(CheckpointError, "no weights", tmp_path, tmp_path / "empty")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    return save_checkpoint(make_model("llama"), tmp_path / "model")


def test_damaged_weights(fresh: Path, tmp_path: Path) -> None:
    weights = fresh / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refuses(CheckpointError, "damaged", tmp_path, fresh)
    weights.write_bytes(b"\xff" * 100)
    refuses(CheckpointError, "damaged", tmp_path, fresh)


def test_missing_tensor(fresh: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(fresh / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    refuses(CheckpointError, "lacks weights for 1", tmp_path, fresh)


def test_missing_shard(tmp_path: Path) -> None:
    save_checkpoint(make_model("llama"), tmp_path / "m", max_shard_size="40KB")
    next((tmp_path / "m").glob("model-00002*")).unlink()
    refuses(CheckpointError, "lacks model-00002", tmp_path, tmp_path / "m")


def test_no_tokenizer(fresh: Path, tmp_path: Path) -> None:
    (fresh / "tokenizer.json").unlink()
    (fresh / "tokenizer_config.json").unlink()
    refuses(CheckpointError, "has no tokenizer", tmp_path, fresh)
    (fresh / "tokenizer.model").write_bytes(b"nonsense")
    refuses(CheckpointError, "cannot be converted", tmp_path, fresh)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_checkpoint(make_model("llama", vocab_size=100), tmp_path / "m")
    refuses(ExportError, "do not belong together", tmp_path, tmp_path / "m")


def test_encoders_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    small = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    save_checkpoint(BertForMaskedLM(BertConfig(**small)), tmp_path / "bert")
    refuses(
        UnsupportedModelError,
        "neither causal nor a sliding window",
        tmp_path,
        tmp_path / "bert",
        task="generate",
        verify=False,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [  # a prompt of its own before each sequence; numbers of another shape; what generate adds to the tokens
        (
            "cpmant",
            r"keeps keys \(modeling_cpmant\.py:\d+\), which is 1 x 4 x 43 x .* after 11 tokens .* would have to grow by",
        ),
        (
            "reformer",
            r"keeps buckets_cache \(modeling_reformer\.py:\d+\) in a form that .* would have to be one tensor a row",
        ),
        ("xlnet", r"gives it perm_mask, target_mapping \(modeling_xlnet\.py:\d+\)"),
    ],
)
def test_other_architectures_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    """With the place in the model's source, and what would have to change."""
    from transformers import AutoModelForCausalLM
    from zoo.shrink import shrink

    model = AutoModelForCausalLM.from_config(shrink(name))
    save_checkpoint(model, tmp_path / name)
    refused = rf"{type(model).__name__} cannot be exported: .*modeling_{name}\.py:\d+.*; as plain ONNX: .*{message}"
    refuses(UnsupportedModelError, refused, tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    ("method", "message"),
    [("gptq", r"quantized \(gptq\), and none of its tensors is"), ("bitsandbytes", "bitsandbytes")],
)
def test_quantized_checkpoints_are_refused(method: str, message: str, fresh: Path, tmp_path: Path) -> None:
    config = json.loads((fresh / "config.json").read_text())
    (fresh / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method, "bits": 4}})
    )
    refuses(UnsupportedModelError, message, tmp_path, fresh)


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    save_checkpoint(model, tmp_path / "m")
    refuses(ExportError, "overflows float16", tmp_path, tmp_path / "m", dtype="fp16")


def test_remote_code_needs_permission(fresh: Path, tmp_path: Path) -> None:
    config = json.loads((fresh / "config.json").read_text())
    (fresh / "config.json").write_text(
        json.dumps({**config, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
    )
    refuses(CheckpointError, "--trust-remote-code", tmp_path, fresh)


def test_wrong_graphs_do_not_get_past_verification(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost sliding window: right for short prompts, wrong past it."""
    from llmx.export import attention

    monkeypatch.setattr(attention, "classify_mask", lambda *_: attention.MaskSpec(None))
    refuses(
        VerificationError,
        r"disagree at row \d, prefill position \d+: logits differ by",
        tmp_path,
        checkpoint("mistral"),
    )


def test_existing_output(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("x")
    with pytest.raises(ExportError, match="already exists"):
        export(fresh, tmp_path / "taken")
    with pytest.raises(ExportError, match="not a model package"):
        export(fresh, tmp_path / "taken", force=True)
    assert (tmp_path / "taken" / "precious.txt").read_text() == "x"


def test_failed_force_keeps_the_old_package(fresh: Path, tmp_path: Path) -> None:
    export(fresh, tmp_path / "out", verify=False)
    before = (tmp_path / "out" / MANIFEST_FILE).read_bytes()
    (fresh / "tokenizer.json").unlink()
    (fresh / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError):
        export(fresh, tmp_path / "out", force=True)
    assert (tmp_path / "out" / MANIFEST_FILE).read_bytes() == before


def test_disk_full(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("llmx.export.folder.shutil.disk_usage", lambda _: usage._replace(free=1000))
    refuses(ExportError, "kB free, .* too little; free some space", tmp_path, fresh)
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmx.export.writer.os.fsync", full)
    refuses(ExportError, "No space left on device", tmp_path, fresh)


@pytest.mark.skipif(os.name == "nt", reason="POSIX paths")
def test_unwritable_output(fresh: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ExportError, match="Nothing can be written"):
        export(fresh, file / "out")


def test_unknown_names(fresh: Path, tmp_path: Path) -> None:
    refuses(ExportError, "no target 'tpu'", tmp_path, fresh, target="tpu")
    refuses(ExportError, "no dtype 'fp8'", tmp_path, fresh, dtype="fp8")
    refuses(CheckpointError, "--revision goes with a hub id", tmp_path, fresh, revision="main")


def test_hub_checkpoints_load_through_the_cache(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id resolves to a snapshot folder of symlinks, as the hub's cache makes them."""
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in fresh.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    result = export("some-org/tiny-llama", tmp_path / "out")
    assert result.manifest.source["revision"] == commit
    assert result.manifest.name == "tiny-llama"


# -- masks and passes -------------------------------------------------------------------------------------------------


def test_masks_are_told_apart() -> None:
    from llmx.export.attention import classify_mask
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        chunked_causal_mask_function,
        sliding_window_causal_mask_function,
    )

    assert classify_mask(causal_mask_function, None).window is None
    for window in (1, 2, 24, 4096):
        assert classify_mask(sliding_window_causal_mask_function(window), window).window == window
    with pytest.raises(UnsupportedModelError, match="bidirectional"):
        classify_mask(bidirectional_mask_function, None)
    with pytest.raises(UnsupportedModelError, match="chunked"):
        classify_mask(chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)), 8)
    with pytest.raises(UnsupportedModelError, match="neither"):
        classify_mask(sliding_window_causal_mask_function(8), 9)


def test_fusions_change_what_they_should(package: Callable[[str], Path]) -> None:
    from llmx.cli.inspect import operators

    llama = operators(package("llama") / "decode.onnx")
    assert llama["SkipSimplifiedLayerNormalization"] == 6 and llama["SimplifiedLayerNormalization"] == 1
    assert not {"Cos", "Neg", "Pow", "Slice", "Transpose"} & set(llama)
    assert llama["FusedMatMul"] == 3 * 4 + 1  # query, key and value are one product, gate and up another
    glm = operators(package("glm4") / "decode.onnx")  # partial rotary embedding stays in the graph
    assert glm["Cos"] == 1 and glm["Neg"] == 6
    gpt2 = operators(package("gpt2") / "decode.onnx")
    assert gpt2["LayerNormalization"] == 7 and "SimplifiedLayerNormalization" not in gpt2


def test_long_rotary_tables_are_left_in_the_graph(tmp_path: Path) -> None:
    from llmx.cli.inspect import operators

    save_checkpoint(make_model("llama", max_position_embeddings=100_000), tmp_path / "m")
    result = export(tmp_path / "m", tmp_path / "out")
    assert operators(result.path / "decode.onnx")["Cos"] == 1


def test_rms_norm_with_another_shape_is_left_alone() -> None:
    import onnx_ir as ir
    from llmx.export.fusions import RmsNorm

    def graph(axis: int, exponent: float) -> ir.Model:
        def constant(name: str, array: np.ndarray) -> ir.Value:
            return ir.Value(
                name=name,
                const_value=ir.Tensor(array),
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType(1 if array.dtype.kind == "f" else 7)),
            )

        x = ir.Value(name="x", shape=ir.Shape(["b", "s", 8]), type=ir.TensorType(ir.DataType.FLOAT))
        two, eps = constant("two", np.array(exponent, np.float32)), constant("eps", np.array(1e-5, np.float32))
        axes, weight = constant("axes", np.array([axis])), constant("weight", np.ones(8, np.float32))
        power = ir.node("Pow", [x, two])
        mean = ir.node("ReduceMean", [power.outputs[0], axes], {"keepdims": 1})
        add = ir.node("Add", [mean.outputs[0], eps])
        root = ir.node("Sqrt", [add.outputs[0]])
        reciprocal = ir.node("Reciprocal", [root.outputs[0]])
        normed = ir.node("Mul", [x, reciprocal.outputs[0]])
        normed.outputs[0].dtype = ir.DataType.FLOAT
        scaled = ir.node("Mul", [normed.outputs[0], weight])
        nodes = [power, mean, add, root, reciprocal, normed, scaled]
        return ir.Model(
            ir.Graph(
                [x], [scaled.outputs[0]], nodes=nodes, initializers=[two, eps, axes, weight], opset_imports={"": 21}
            ),
            ir_version=10,
        )

    assert RmsNorm()(graph(-1, 2.0)).modified
    assert not RmsNorm()(graph(1, 2.0)).modified
    assert not RmsNorm()(graph(-1, 3.0)).modified


def test_uninitialised_parameters_are_hidden_from_passes() -> None:
    """A zero bias must not be dropped, nor equal parameters merged: their values are not there yet."""
    import onnx_ir as ir
    from llmx.export.passes import DeduplicateConstants, hidden_parameters

    def parameter(name: str) -> ir.Value:
        value = ir.Value(
            name=name,
            const_value=ir.Tensor(np.zeros(4, np.float32)),
            shape=ir.Shape([4]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        value.metadata_props["pkg.torch.export.graph_signature.InputSpec.kind"] = "PARAMETER"
        return value

    left, right = parameter("left"), parameter("right")
    node = ir.node("Add", [left, right])
    model = ir.Model(
        ir.Graph([], [node.outputs[0]], nodes=[node], initializers=[left, right], opset_imports={"": 21}), ir_version=10
    )
    with hidden_parameters(model):
        assert left.const_value is None
        assert not DeduplicateConstants()(model).modified
    assert left.const_value is not None
    assert list(node.inputs) == [left, right]


def test_write_tokenizer_ids_fit(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert max(vocab.values()) < 300
