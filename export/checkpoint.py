"""Where a model comes from: a local folder or a hub id, checked before anything is built."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.export.packed_checkpoints import PackedFormat, read_format
from llmx.runtime.errors import CheckpointError, ExportError, UnsupportedModelError
from llmx.runtime.hub import download, looks_like_hub_id

_WANTED = ["*.json", "*.safetensors", "*.model", "*.spm", "*.txt", "*.jinja", "*.tiktoken", "tokenizer*", "LICENSE*"]


#: Task -> transformers' auto class. All but "generate", "seq2seq" and "transcribe" (encoder-decoders for text and for
#: speech) are exported as encoders.
TASKS = {
    "generate": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "transcribe": "AutoModelForSpeechSeq2Seq",
    "embed": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "token-classify": "AutoModelForTokenClassification",
    "fill-mask": "AutoModelForMaskedLM",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `name` is a folder's last part or the hub id; `revision` the resolved commit, if any."""

    path: Path
    name: str
    revision: str | None
    config: Any  # transformers.PreTrainedConfig
    trust_remote_code: bool = False
    task: str = "generate"
    packed: PackedFormat | None = None  # how its weights are quantized already

    @property
    def auto_class(self) -> Any:
        """transformers' class that builds the model for the task."""
        import transformers

        auto = getattr(transformers, TASKS[self.task])
        if self.task == "generate" and not _mapped(self.config, "generate"):
            return _Generator(_generating_class(self.config))
        return auto

    @property
    def short_name(self) -> str:
        return self.name.rstrip("/").rpartition("/")[2]


class _Generator:
    """A class of transformers that generates and is in no causal-LM mapping (the models that see or hear, and their text
    halves), under an auto class's interface. Given text alone, such a model is its text tower.
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def from_config(self, config: Any, trust_remote_code: bool = False, **options: Any) -> Any:
        return self.kind._from_config(config, **options)

    def from_pretrained(self, path: Path, trust_remote_code: bool = False, **options: Any) -> Any:
        return self.kind.from_pretrained(path, **options)


def _mapped(config: Any, task: str) -> bool:
    import transformers

    remote = getattr(config, "auto_map", None) or {}
    return type(config) in getattr(transformers, TASKS[task])._model_mapping or TASKS[task] in remote


def _generating_class(config: Any) -> Any:
    """The class that a config's `architectures` names, where it is transformers' own, is built from that config and
    generates text; else None.
    """
    import transformers

    kind: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    generates = getattr(kind, "can_generate", None)
    return kind if generates is not None and generates() and kind.config_class is type(config) else None


def open_checkpoint(
    model: str, revision: str | None = None, trust_remote_code: bool = False, task: str = "auto"
) -> Checkpoint:
    """Find `model`, read its config and find out (or check) which task it can be exported for.

    Raises CheckpointError (not there, not a checkpoint, no weights) or UnsupportedModelError (another family).
    """
    folder = Path(model).expanduser()
    commit = None
    name = model
    if folder.exists():
        name = folder.resolve().name
        if revision is not None:
            raise CheckpointError(f"--revision goes with a hub id, and {model} is a local folder; leave it out.")
    elif looks_like_hub_id(model):
        patterns = _WANTED + (["*.py"] if trust_remote_code else [])
        folder, commit = download(model, revision, patterns, CheckpointError)
    else:
        raise CheckpointError(
            f"There is no checkpoint at {model}; give a folder with config.json, or a hub id like org/name."
        )
    if not (folder / "config.json").is_file():
        kind = "folder" if folder.is_dir() else "file"
        raise CheckpointError(f"{model} is not a Hugging Face checkpoint: the {kind} has no config.json.")
    config = _read_config(folder, model, trust_remote_code)
    packed = _packed_format(config, model)
    _check_weights(folder, model)
    return Checkpoint(folder, name, commit, config, trust_remote_code, _task(config, folder, model, task), packed)


def _read_config(folder: Path, model: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The config.json of {model} cannot be read: {error}.") from None
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise CheckpointError(
            f"The config.json of {model} names no model_type, so it is not a transformers checkpoint."
        )
    if raw.get("auto_map") and not trust_remote_code:
        from transformers import CONFIG_MAPPING

        if raw["model_type"] not in CONFIG_MAPPING:
            raise CheckpointError(
                f"{model} needs Python code of its own; read it, then allow it with --trust-remote-code."
            )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"transformers cannot read the config of {model}: {str(error).splitlines()[0]}") from None


def _packed_format(config: Any, model: str) -> PackedFormat | None:
    """How the checkpoint is quantized already, if it is; taken out of `config`, so that plain layers are built from it.

    Raises UnsupportedModelError for a format that llmx does not read.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    packed = read_format(dict(found) if isinstance(found, dict) else found.to_dict(), model)
    del config.quantization_config
    return packed


def _task(config: Any, folder: Path, model: str, wanted: str) -> str:
    """`wanted`, or for "auto" what the checkpoint's files say: sentence-transformers' modules.json, else its architecture.

    Raises UnsupportedModelError where transformers has no model of that task for the config.
    """
    from transformers.models.auto import modeling_auto

    architecture = (getattr(config, "architectures", None) or [""])[0]
    seq2seq = getattr(config, "is_encoder_decoder", False)

    def can(task: str) -> bool:
        if task == "generate" and not seq2seq and _generating_class(config) is not None:
            return True
        return _mapped(config, task)

    def named_in(mapping: str) -> bool:
        names = getattr(modeling_auto, mapping).values()
        return any(architecture in (name if isinstance(name, (tuple, list)) else (name,)) for name in names)

    if seq2seq and wanted in ("auto", "generate"):
        wanted = "transcribe" if can("transcribe") and not can("seq2seq") else "seq2seq"
    if seq2seq and wanted not in ("seq2seq", "transcribe"):
        raise UnsupportedModelError(
            f"{model} ({architecture}) is an encoder-decoder, which llmx exports for generation alone; leave out --task."
        )
    if wanted == "auto":
        if (folder / "modules.json").is_file():
            wanted = "embed"
        elif named_in("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
            wanted = "generate"
        elif named_in("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"):
            wanted = "classify"
        elif named_in("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"):
            wanted = "token-classify"
        elif named_in("MODEL_FOR_MASKED_LM_MAPPING_NAMES"):
            wanted = "fill-mask"
        elif named_in("MODEL_MAPPING_NAMES") and (can("fill-mask") or not can("generate")):
            wanted = "embed"
        else:
            wanted = "generate"
    if wanted not in TASKS:
        raise ExportError(f"There is no task {wanted!r}; choose auto or one of {', '.join(TASKS)}.")
    if not can(wanted):
        what = architecture or config.model_type
        raise UnsupportedModelError(
            f"{model} ({what}) cannot be exported for {wanted}: transformers has no {TASKS[wanted]} for it."
        )
    return wanted


def _check_weights(folder: Path, model: str) -> None:
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{model} has a config.json but no weights (*.safetensors); download the whole checkpoint."
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            raise CheckpointError(f"{index} is damaged; download the checkpoint again.") from None
        missing = sorted(name for name in files if not (folder / name).is_file())
        if missing:
            raise CheckpointError(
                f"{model} lacks {missing[0]} ({len(missing)} of {len(files)} weight files missing); download it again."
            )
