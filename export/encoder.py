"""Encoder-only models, and decoders used as embedders: one graph, tokens in, vectors or label logits out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch
from llmx.export.carried import longest_block
from llmx.export.checkpoint import Checkpoint
from llmx.export.lengths import USEFUL, joined, longest_right
from llmx.export.lowering import lower
from llmx.export.rope import by_length
from llmx.export.verify import TOLERANCE, fitting
from llmx.export.weights import StoredTensor, read_index
from llmx.runtime.errors import CheckpointError, UnsupportedModelError, VerificationError
from llmx.runtime.manifest import EncoderInfo, Verification

_BATCH, _SEQ = 3, 7  # differ, and are not 0 or 1, which tracing would specialise away
_LENGTHS = (4, 23, 61)
_ASKED = 3  # the shortest length that is asked of the guards: two tokens are run, as the tracer marks sizes of one

#: sentence-transformers' pooling modes: config field -> name.
POOLING_FIELDS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Pooling(torch.nn.Module):
    """[batch, seq, hidden] and its mask to [batch, hidden × modes], as sentence-transformers pools; rows right-padded."""

    def __init__(self, modes: list[str]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.to(hidden.dtype)[..., None]
        count = weights.sum(1).clamp(min=1e-9 if hidden.dtype == torch.float32 else 1e-4)
        pooled = []
        for mode in self.modes:
            if mode == "cls":
                pooled.append(hidden[:, 0])
            elif mode == "mean":
                pooled.append((hidden * weights).sum(1) / count)
            elif mode == "mean_sqrt_len":
                pooled.append((hidden * weights).sum(1) / count.sqrt())
            elif mode == "max":
                pooled.append(hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).amax(1))
            elif mode == "weightedmean":
                place = weights * torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[None, :, None]
                pooled.append((hidden * place).sum(1) / place.sum(1))
            else:  # lasttoken
                last = (mask.sum(1) - 1).clamp(min=0)
                index = last[:, None, None].expand(-1, 1, hidden.shape[-1])
                pooled.append(hidden.gather(1, index)[:, 0])
        return torch.cat(pooled, -1)


class Dense(torch.nn.Module):
    """sentence-transformers' Dense. Its weights are buffers: values of their own, not parameters of the checkpoint."""

    _ACTIVATIONS: ClassVar[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "Identity": lambda x: x,
        "Tanh": torch.tanh,
        "ReLU": torch.relu,
        "GELU": torch.nn.functional.gelu,
        "Sigmoid": torch.sigmoid,
    }

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        config = _json(folder / "config.json")
        name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
        if name not in self._ACTIVATIONS:
            raise UnsupportedModelError(f"its Dense module uses the activation {name}, which llmx does not know")
        self.activation = self._ACTIVATIONS[name]
        tensors = read_index(folder)
        if "linear.weight" not in tensors:
            raise CheckpointError(f"{folder} lacks linear.weight (model.safetensors); download the checkpoint again.")
        self.register_buffer("weight", _read(tensors["linear.weight"], dtype))
        self.register_buffer("bias", _read(tensors["linear.bias"], dtype) if "linear.bias" in tensors else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(torch.nn.functional.linear(x, self.weight, self.bias))


class Head(torch.nn.Module):
    """What sentence-transformers' modules.json puts after the transformer: pooling, dense layers, normalisation."""

    def __init__(self, pooling: Pooling, after: list[Dense | None]) -> None:
        super().__init__()
        self.pooling = pooling
        self.after = torch.nn.ModuleList(module for module in after if module is not None)
        self.steps = ["normalize" if module is None else "dense" for module in after]

    @property
    def normalized(self) -> bool:
        return bool(self.steps) and self.steps[-1] == "normalize"

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x, dense = self.pooling(hidden, mask), iter(self.after)
        for step in self.steps:
            x = torch.nn.functional.normalize(x, dim=-1) if step == "normalize" else next(dense)(x)
        return x


class EncoderModule(torch.nn.Module):
    """The traced function, with the model's parameters under their own names (prefix `model.`)."""

    def __init__(self, model: torch.nn.Module, head: Head | None) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.config = model.config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """`embeddings` [batch, dim] and `last_hidden_state` [batch, seq, hidden], or a head's `logits`."""
        more: dict[str, Any] = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if _takes(self.model, "use_cache"):
            more["use_cache"] = False
        with by_length(self.model, attention_mask.sum(-1, keepdim=True)):
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **more)
        if self.head is None:
            return {"logits": output.logits}
        hidden = output.last_hidden_state
        return {"embeddings": self.head(hidden, attention_mask), "last_hidden_state": hidden}


def _lower(module: EncoderModule, length: int) -> ir.Model:
    ids = torch.ones(_BATCH, length, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": ids.clone()}
    if takes_token_types(module.model):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    symbolic = torch.export.Dim.DYNAMIC
    return lower(module, inputs, {name: {0: symbolic, 1: symbolic} for name in inputs})


def _size(_: str, axis: int) -> int | None:
    return _BATCH if axis == 0 else None


def _takes(model: torch.nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def build_module(checkpoint: Checkpoint, model: Any, dtype: torch.dtype, pooling: str | None) -> EncoderModule:
    """`model` with the head that its task needs."""
    head = read_head(checkpoint.path, dtype, pooling) if checkpoint.task == "embed" else None
    return EncoderModule(model, head).eval()


def read_head(folder: Path, dtype: torch.dtype, pooling: str | None = None) -> Head:
    """The head that modules.json describes; mean pooling and normalisation where there is none."""
    listed = folder / "modules.json"
    if not listed.is_file() or pooling is not None:
        return Head(Pooling([pooling or "mean"]), [None])
    modules = sorted(_json(listed), key=lambda module: module["idx"])
    pool: Pooling | None = None
    after: list[Dense | None] = []
    for module in modules:
        kind, path = str(module["type"]).rpartition(".")[2], folder / module["path"]
        if kind == "Transformer":
            continue
        if kind == "Pooling" and pool is None:
            pool = Pooling(_pooling_modes(_json(path / "config.json")))
        elif kind == "Normalize":
            after.append(None)
        elif kind == "Dense":
            after.append(Dense(path, dtype))
        else:
            raise UnsupportedModelError(f"its modules.json lists a {kind} module, which llmx does not know")
    if pool is None:
        raise UnsupportedModelError("its modules.json lists no Pooling module")
    return Head(pool, after)


def _pooling_modes(config: dict[str, Any]) -> list[str]:
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else [mode for field, mode in POOLING_FIELDS.items() if config.get(field)]
    unknown = set(modes) - set(POOLING_FIELDS.values())
    if unknown or not modes:
        raise UnsupportedModelError(f"its pooling mode {', '.join(sorted(unknown)) or '(none)'} is not known to llmx")
    return modes


def trace_encoder(module: EncoderModule, longest: int) -> ir.Model:
    """The graph of `module`, unoptimised, batch and sequence symbolic; for texts of up to `longest` tokens where one graph
    is right for all of them.
    """
    model = _lower(module, _SEQ)
    if longest_right(model, _ASKED, longest, _size) < longest:
        try:
            other = _lower(module, min(2 * longest_block(module.config) + 5, longest))
        except UnsupportedModelError:
            return _named(model)  # which `longest_text` limits to the lengths it is right for
        if joined(other, model) or longest_right(other, _ASKED, longest, _size) == longest:
            model = other
    return _named(model)


def _named(model: ir.Model) -> ir.Model:
    """The package format's shapes of inputs and outputs."""
    for value in model.graph.inputs:
        value.shape = ir.Shape(["batch", "seq"])
    for value in model.graph.outputs:
        assert value.shape is not None
        value.shape = ir.Shape(
            ["batch", "seq", *value.shape[2:]] if len(value.shape) == 3 else ["batch", *value.shape[1:]]
        )
    return model


def longest_text(traced: ir.Model, longest: int) -> int:
    """The longest text, up to `longest` tokens, that the graph is right for. Raises UnsupportedModelError where that is too
    short to be of use.
    """
    found = longest_right(traced, _ASKED, longest, _size)
    if found < min(longest, USEFUL):
        raise UnsupportedModelError(
            f"its code takes another way for texts of {found + 1} tokens than for those of {_SEQ}, and a graph has no branches"
        )
    return found


def takes_token_types(model: Any) -> bool:
    return _takes(model, "token_type_ids") and int(getattr(model.config, "type_vocab_size", 0) or 0) > 1


def describe_encoder(checkpoint: Checkpoint, module: EncoderModule, graph: ir.Model, tokenizer: Any) -> EncoderInfo:
    """The manifest's entry: what the outputs mean, and what sentence-transformers' files ask for."""
    config, folder = checkpoint.config, checkpoint.path
    bert = _optional_json(folder / "sentence_bert_config.json")
    prompts = _optional_json(folder / "config_sentence_transformers.json")
    labels: list[str] = []
    activation = None
    if checkpoint.task in ("classify", "token-classify"):
        labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        activation = _activation(config)
    head = module.head
    return EncoderInfo(
        task=checkpoint.task,
        max_length=longest_input(checkpoint, module.model, tokenizer),
        pooling=list(head.pooling.modes) if head is not None else [],
        normalized=head.normalized if head is not None else False,
        dimension=int(graph.graph.outputs[0].shape[1]) if head is not None and graph.graph.outputs[0].shape else None,
        labels=labels,
        activation=activation,
        mask_token_id=tokenizer.mask_token_id,
        prompts={k: v for k, v in (prompts.get("prompts") or {}).items() if isinstance(v, str)},
        default_prompt=prompts.get("default_prompt_name"),
        lower_case=bool(bert.get("do_lower_case", False)),
    )


def _activation(config: Any) -> str:
    """transformers' text-classification pipeline's rule; sentence-transformers' own setting goes first."""
    own = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn") or getattr(
        config, "sbert_ce_default_activation_function", None
    )
    if own is not None:
        name = str(own).rpartition(".")[2]
        if name not in ("Identity", "Sigmoid"):
            raise UnsupportedModelError(f"its scores pass through {name}, which llmx does not know")
        return "none" if name == "Identity" else "sigmoid"
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


def longest_input(checkpoint: Checkpoint, model: Any, tokenizer: Any) -> int:
    """How many tokens the model, its tokenizer and sentence-transformers' files allow."""
    bert = _optional_json(checkpoint.path / "sentence_bert_config.json")
    limits = [bert.get("max_seq_length"), getattr(tokenizer, "model_max_length", None)]
    positions = getattr(checkpoint.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        for name, part in model.named_modules():  # a table whose rows start after the padding index
            if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
                positions = part.weight.shape[0] - part.padding_idx - 1
                break
        limits.append(positions)
    known = [n for n in limits if isinstance(n, int) and 0 < n < 10**8]
    return min(known) if known else 512


Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def verify_encoder(
    run: Run, load: Callable[[], Any], checkpoint: Checkpoint, dtype: str, pooling: str | None, max_length: int
) -> tuple[Verification, bool]:
    """Each row alone in PyTorch against all rows in one right-padded batch of the graph, and against each row alone.

    Returns what was compared, and whether rows may be padded: some models (convolutions over tokens, no mask) let padding
    into a row's output, in PyTorch as well. Raises VerificationError where a row alone differs by more than the tolerance.
    """
    model = load()
    module = build_module(checkpoint, model, torch.float32, pooling)
    lengths = [n for n in _LENGTHS if n <= max_length] or [max_length]
    feeds = _verification_feeds(checkpoint, model, lengths)
    with fitting(model, dtype):
        wanted = [_reference(module, feeds, row, length) for row, length in enumerate(lengths)]
        pair = _reference(module, feeds, 0, 2) if max_length > 1 else None
    if pair is not None:
        _compare([pair], [_row(run({name: value[:1, :2] for name, value in feeds.items()}), 0, 2)], dtype)
    batch = run(feeds)
    try:
        worst, tolerance, pads = *_compare(wanted, [_row(batch, i, n) for i, n in enumerate(lengths)], dtype), True
    except VerificationError:
        alone = [
            _row(run({name: value[i : i + 1, :n] for name, value in feeds.items()}), 0, n)
            for i, n in enumerate(lengths)
        ]
        worst, tolerance, pads = *_compare(wanted, alone, dtype), False
    return Verification("passed", max_abs_diff=worst, tolerance=tolerance, positions=sum(lengths)), pads


def _verification_feeds(checkpoint: Checkpoint, model: Any, lengths: list[int]) -> dict[str, np.ndarray]:
    vocab = model.get_input_embeddings().weight.shape[0]
    pad = getattr(checkpoint.config, "pad_token_id", None)
    ids = torch.randint(0, vocab, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    if isinstance(pad, int):  # models that count positions by padding tokens: none among the words
        ids[ids == pad] = (pad + 1) % vocab
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask == 1, ids, pad if isinstance(pad, int) else 0)
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    if takes_token_types(model):
        feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
    return feeds


def _reference(module: EncoderModule, feeds: dict[str, np.ndarray], row: int, length: int) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = module(*(torch.from_numpy(value[row : row + 1, :length]) for value in feeds.values()))
    return {name: value[0].numpy() for name, value in output.items()}


def _row(outputs: dict[str, np.ndarray], row: int, length: int) -> dict[str, np.ndarray]:
    """One row's outputs, those per token cut to its length."""
    return {k: v[row, :length] if v.ndim == 3 else v[row] for k, v in outputs.items()}


def _compare(wanted: list[dict[str, np.ndarray]], got: list[dict[str, np.ndarray]], dtype: str) -> tuple[float, float]:
    """(largest difference, its tolerance); raises VerificationError past it."""
    worst, tolerance = 0.0, 0.0
    for want_row, got_row in zip(wanted, got, strict=True):
        for name, want in want_row.items():
            allowed = TOLERANCE[dtype] * max(1.0, float(np.abs(want).max()))
            difference = float(np.abs(got_row[name].astype(np.float32) - want).max())
            if not difference <= allowed:  # NaN is wrong too
                raise VerificationError(
                    f"ONNX and PyTorch disagree on {name}: they differ by {difference:.3g} (tolerance {allowed:.3g})."
                )
            if difference >= worst:
                worst, tolerance = difference, allowed
    return worst, tolerance


def _read(stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    raw = bytearray(b"".join(stored.chunks(dtype)))
    return torch.frombuffer(raw, dtype=dtype).reshape(stored.shape)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download the checkpoint again.") from None


def _optional_json(path: Path) -> dict[str, Any]:
    return dict(_json(path)) if path.is_file() else {}
