"""The manifest `llmx.json`: everything that the runtime needs to know of a package.

The exporter builds a `Manifest` and writes it; the runtime reads it and never looks at a model's name. The format is
versioned as `major.minor`: an unknown major is refused, a newer minor only adds fields that may be ignored. The JSON
Schema beside this file (`manifest.schema.json`) describes the same format for other tools.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from llmx.runtime.errors import PackageError
from llmx.runtime.manifest_check import check_parts

MANIFEST_FILE = "llmx.json"
FORMAT_MAJOR, FORMAT_MINOR = 1, 0

#: Roles of graph inputs and outputs, with dtype and shape.
#: - `input_ids`              int64 [batch, seq]
#: - `position_ids`           int64 [batch, seq], absolute
#: - `seqlens_k`              int32 [batch], tokens in the cache after the call, minus one (GroupQueryAttention)
#: - `total_sequence_length`  int32 scalar on the CPU, the batch's maximum of `seqlens_k + 1`
#: - `query_seqlens`          int32 [batch], valid tokens of each right-padded row
#: - `logits_positions`       int64 [batch, asked], columns of `input_ids` whose logits are wanted
#: - `rope_lengths`           int64 [batch, seq], the length that decides each token's rotary factors: the whole prompt's
#:                            for a token of the prompt, its position + 1 for a generated one
#: - `input_features`         float [batch, n_mels, frames], log-mel features (speech)
#: - `state`                  a past or present tensor, described in `Manifest.state`
#: - `logits`                 [batch, asked, vocab]; of an encoder [batch, labels] or [batch, seq, labels or vocab]
#: - `temperature`            float32 [batch], what the candidates' logits are divided by
#: - `next_input_ids`         int64 [batch, 1], the most likely tokens; with `next_position_ids`, `next_seqlens_k` and
#:                            `next_rope_lengths`, what the next step's inputs are if they are taken
#: - `greedy_logits`          [batch, 1, 1], their logits
#: - `top_logits`, `top_ids`  float32 and int64 [batch, 64], the largest logits; `log_sum` float32 [batch] (TopLogits)
#: - `attention_mask`         int64 [batch, seq], 1 for tokens, 0 for the padding on their right (encoders)
#: - `token_type_ids`         int64 [batch, seq], which of a pair's texts a token belongs to (encoders)
#: - `embeddings`             [batch, dimension]; `last_hidden_state` [batch, seq, hidden] (encoders)
INPUT_ROLES = (
    "input_ids",
    "position_ids",
    "seqlens_k",
    "total_sequence_length",
    "query_seqlens",
    "logits_positions",
    "input_features",
    "rope_lengths",
    "state",
    "attention_mask",
    "token_type_ids",
    "temperature",
    "logits",
)


@dataclass(frozen=True)
class TensorInfo:
    """One graph input or output. `shape` mixes ints and the names `batch`, `seq`, `asked`, `slots`, `max_length`."""

    name: str
    role: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class GraphInfo:
    file: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]

    def input_named(self, role: str) -> str | None:
        """The name of the input with this role, or None where the graph has none."""
        return next((t.name for t in self.inputs if t.role == role), None)


@dataclass(frozen=True)
class StateTensor:
    """One state tensor: `in_place` buffers are bound as past and present at once; the output of a `grow` tensor is its
    input with new rows, that of a `replace` tensor (a recurrence) has its input's shape. Before the first token a `grow`
    tensor has no rows and a `replace` tensor is zero. A `cross` tensor is the encoder graph's output and every step's input.

    `shape` is the buffer's template, e.g. `["slots", 3, "max_length", 64]`. `window` is the number of positions that
    the layer attends to (None: all). Row `slot` of the outermost axis belongs to one request.
    """

    layer: int
    part: str  # "key" | "value" | what the model's cache calls it
    layout: str  # "in_place" | "grow" | "replace" | "cross"
    input: str
    output: str
    dtype: str
    shape: list[int | str]
    window: int | None = None


@dataclass(frozen=True)
class TokenizerInfo:
    """Special tokens as ids and, for chat templates, as text. `eos_token_ids` may be several."""

    file: str = "tokenizer.json"
    chat_template: str | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)  # further named templates: name -> file
    bos_token_id: int | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    pad_token_id: int | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>", …
    clean_up_tokenization_spaces: bool = False
    kind: str = "tokenizers"  # or "sentencepiece" (llmx.runtime.spm)


@dataclass(frozen=True)
class ModelInfo:
    """Sizes. A sequence that decodes past `recompute_at` positions has its state computed anew first, with the
    `rope_lengths` of the longer sequence (None: never). Prompts of fewer than `min_prefill` tokens go through the decode
    graph (carried state only).
    """

    context_length: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    parameters: int
    recompute_at: int | None = None
    min_prefill: int = 1


@dataclass(frozen=True)
class EncoderInfo:
    """What an encoder's outputs mean. `task`: "embed" | "classify" | "token-classify" | "fill-mask".

    `max_length` in tokens, special ones included. `pooling`, `normalized` and `dimension` describe `embeddings`; `labels`
    and `activation` ("softmax" | "sigmoid" | "none") the `logits`. `prompts`: name -> text put before the input.
    """

    task: str
    max_length: int
    pooling: list[str] = field(default_factory=list)
    normalized: bool = False
    dimension: int | None = None
    labels: list[str] = field(default_factory=list)
    activation: str | None = None
    mask_token_id: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False
    padding: bool = True  # False: padding changes a row's output, so only rows of equal length run together


@dataclass(frozen=True)
class AudioInfo:
    """How sound becomes the encoder's input: log-mel features float32 [n_mels, frames] of windows of `chunk_seconds`.

    `languages` ("en" -> token) and `tasks` ("transcribe", "translate" -> token) go into the decoder's prompt, in this
    order, then `no_timestamps_token_id`.
    """

    sampling_rate: int
    n_fft: int
    hop_length: int
    n_mels: int
    chunk_seconds: int
    languages: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    no_timestamps_token_id: int | None = None


@dataclass(frozen=True)
class Seq2SeqInfo:
    """What an encoder-decoder needs besides its graphs. Lengths in tokens, special ones included.

    `decoder_prompt`: the decoder's start token, and those that generation forces after it. `suppress_tokens` are never
    chosen, `begin_suppress_tokens` not as the first; `forced_eos_token_id` is the last token of an output cut at its
    longest.
    """

    max_source_length: int
    source_vocab_size: int
    decoder_prompt: list[int]
    suppress_tokens: list[int] = field(default_factory=list)
    begin_suppress_tokens: list[int] = field(default_factory=list)
    forced_eos_token_id: int | None = None
    audio: AudioInfo | None = None  # the source is sound, not text


@dataclass(frozen=True)
class Verification:
    """What the exporter compared with PyTorch. `status`: "passed", or "skipped" with the `reason`."""

    status: str
    reason: str | None = None
    max_abs_diff: float | None = None
    tolerance: float | None = None
    positions: int | None = None


@dataclass(frozen=True)
class WeightTensor:
    """An initializer of the graphs whose `nbytes` lie at `offset` of `weights.data`; several may share them."""

    name: str
    dtype: str
    shape: list[int]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileInfo:
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    family: str  # "decoder" | "encoder-decoder" | "encoder"
    name: str
    target: str  # "cpu" | "cuda"
    dtype: str  # of weights, activations, state and logits: "float32" | "float16" | "bfloat16"
    model: ModelInfo
    graphs: dict[str, GraphInfo]
    state: list[StateTensor]
    tokenizer: TokenizerInfo
    generation: dict[str, Any]  # SamplingParams fields that the checkpoint's generation_config sets
    source: dict[str, Any]  # model, revision, architecture, adapter
    created_by: dict[str, str]  # library -> version
    verification: Verification
    files: dict[str, FileInfo]
    quantization: dict[str, Any] | None = None
    encoder: EncoderInfo | None = None  # of family "encoder"
    seq2seq: Seq2SeqInfo | None = None  # of family "encoder-decoder"
    weights: list[WeightTensor] = field(default_factory=list)  # of a package for a device, which uploads them once
    min_onnxruntime: str = "1.31"
    format: str = "llmx"
    format_version: str = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"

    def state_bytes_per_token(self) -> int:
        """Bytes of state that one position of one slot takes, over all layers."""
        return sum(self._bytes(tensor) for tensor in self.state if "max_length" in tensor.shape)

    def state_bytes_per_slot(self) -> int:
        """Bytes of state that a slot takes whatever its length (an encoder-decoder's: for the longest source)."""
        source = self.seq2seq.max_source_length if self.seq2seq is not None else 1
        fixed = [tensor for tensor in self.state if "max_length" not in tensor.shape]
        return sum(self._bytes(tensor) * (source if "source_length" in tensor.shape else 1) for tensor in fixed)

    @staticmethod
    def _bytes(tensor: StateTensor) -> int:
        from llmx.runtime.dtypes import itemsize

        elements = 1
        for dim in tensor.shape:
            elements *= dim if isinstance(dim, int) else 1
        return elements * itemsize(tensor.dtype)

    def to_json(self) -> str:
        """Stable text: fields in declaration order, two-space indent, trailing newline."""
        ordered = {key: getattr(self, key) for key in ("format", "format_version")}
        return json.dumps({**ordered, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = MANIFEST_FILE) -> Manifest:
        """Parse and check. Raises PackageError for anything but a manifest of a known major version."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise PackageError(f"{where} is not valid JSON ({error}); export the model again.") from None
        if not isinstance(raw, dict) or raw.get("format") != "llmx":
            raise PackageError(f"{where} is not an llmx manifest; export the model with `llmx export`.")
        version = str(raw.get("format_version", ""))
        major = version.split(".")[0]
        if not major.isdigit() or int(major) != FORMAT_MAJOR:
            raise PackageError(
                f"{where} has format version {version or '(none)'}, and this llmx reads version {FORMAT_MAJOR}.x; "
                "upgrade llmx, or export the model again with this version."
            )
        parsed: Manifest = _parse(Manifest, raw, where)
        check_parts(parsed, where)
        return parsed


def _parse(kind: Any, raw: Any, where: str) -> Any:
    """`raw` JSON as `kind`, a dataclass or a builtin generic of them; unknown keys are ignored (a newer minor)."""
    origin = get_origin(kind)
    if kind is Any:
        return raw
    if origin in (Union, UnionType):
        options = get_args(kind)
        if raw is None and type(None) in options:
            return None
        concrete = [option for option in options if option is not type(None)]
        if len(concrete) == 1:
            return _parse(concrete[0], raw, where)
        if type(raw) in concrete:
            return raw
    elif origin is list and isinstance(raw, list):
        return [_parse(get_args(kind)[0], item, f"{where}[{index}]") for index, item in enumerate(raw)]
    elif origin is dict and isinstance(raw, dict):
        return {key: _parse(get_args(kind)[1], value, f"{where}.{key}") for key, value in raw.items()}
    elif hasattr(kind, "__dataclass_fields__") and isinstance(raw, dict):
        return _parse_dataclass(kind, raw, where)
    elif kind is float and type(raw) in (int, float):
        return float(raw)
    elif isinstance(kind, type) and type(raw) is kind:
        return raw
    wanted = getattr(kind, "__name__", str(kind))
    raise PackageError(
        f"{where} should be {wanted} and is {json.dumps(raw)[:60]}; the manifest is damaged: export the model again."
    )


#: A package's hundreds of tensors are of one class: its hints are resolved once.
_hints = cache(get_type_hints)


def _parse_dataclass(kind: Any, raw: dict[str, Any], where: str) -> Any:
    hints = _hints(kind)
    try:
        return kind(
            **{f.name: _parse(hints[f.name], raw[f.name], f"{where}.{f.name}") for f in fields(kind) if f.name in raw}
        )
    except TypeError as error:
        missing = str(error).rpartition(": ")[2]
        raise PackageError(f"{where} lacks {missing}; the manifest is damaged: export the model again.") from None


#: Files up to this size are hashed each time a package is loaded; larger ones (the weights) when their cache is built.
HASHED_AT_LOAD = 64 << 20


def load_manifest(folder: Path, check_sizes: bool = True) -> Manifest:
    """Read `folder/llmx.json` and check that every file it lists is there with its size, and, where small, its hash.

    Raises PackageError: no such folder, no manifest, a newer major version, a missing, truncated or altered file.
    """
    if not folder.is_dir():
        raise PackageError(
            f"There is no model package at {folder}; create one with `llmx export --model … --output {folder}`."
        )
    path = folder / MANIFEST_FILE
    if not path.is_file():
        hint = (
            " (it looks like a Hugging Face checkpoint: export it first)" if (folder / "config.json").is_file() else ""
        )
        raise PackageError(f"{folder} is not a model package{hint}: it has no {MANIFEST_FILE}; run `llmx export`.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PackageError(f"{path} is not UTF-8 text; it is damaged: export the model again.") from None
    except OSError as error:
        raise PackageError(f"{path} cannot be read ({error.strerror}).") from None
    manifest = Manifest.from_json(text, str(path))
    if check_sizes:
        for name, info in manifest.files.items():
            _check_size(folder, name, info)
        check_hashes(folder, manifest, HASHED_AT_LOAD)
    return manifest


def _check_size(folder: Path, name: str, info: FileInfo) -> None:
    if Path(name).name != name:
        raise PackageError(
            f"The manifest of {folder} lists {name!r}, which is no file of the package; export it again."
        )
    file = folder / name
    if not file.is_file():
        raise PackageError(f"{folder} lacks {name}, which its manifest lists; copy or export the package again.")
    if file.stat().st_size != info.size:
        raise PackageError(
            f"{file} has {file.stat().st_size:,} bytes and its manifest says {info.size:,}: it was cut short or "
            "altered; copy or export the package again."
        )


def check_hashes(folder: Path, manifest: Manifest, at_most: int | None = None) -> None:
    """Compare the sha256 of every file (of `at_most` bytes) with the manifest. Raises PackageError for the first that
    differs or cannot be read.
    """
    for name, info in manifest.files.items():
        if at_most is None or info.size <= at_most:
            check_hash(folder / name, info)


def check_hash(file: Path, info: FileInfo) -> None:
    """Raises PackageError where `file` is not the one that `info` describes."""
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise PackageError(f"{file} cannot be read ({error.strerror}); copy or export the package again.") from None
    if digest != info.sha256:
        raise PackageError(
            f"{file} was altered (its sha256 differs from the manifest's); copy or export the package again."
        )
