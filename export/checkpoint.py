"""Where a model comes from: a local folder or a hub id, checked before anything is built."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.runtime.errors import CheckpointError, UnsupportedModelError
from llmx.runtime.hub import download, looks_like_hub_id

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "tokenizer*", "LICENSE*"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `name` is a folder's last part or the hub id; `revision` the resolved commit, if any."""

    path: Path
    name: str
    revision: str | None
    config: Any  # transformers.PreTrainedConfig
    trust_remote_code: bool = False

    @property
    def short_name(self) -> str:
        return self.name.rstrip("/").rpartition("/")[2]


def open_checkpoint(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Find `model`, read its config and check that a causal language model can be built from it.

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
    _check_config(config, model)
    _check_weights(folder, model)
    return Checkpoint(folder, name, commit, config, trust_remote_code)


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


def _check_config(config: Any, model: str) -> None:
    from transformers import AutoModelForCausalLM

    what = (getattr(config, "architectures", None) or [config.model_type])[0]
    if getattr(config, "quantization_config", None) is not None:
        method = dict(config.quantization_config).get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"{model} is already quantized ({method}), which llmx does not read yet; export the original checkpoint instead."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{model} ({what}) is an encoder-decoder; llmx exports decoder-only language models so far."
        )
    remote = getattr(config, "auto_map", None) or {}
    if type(config) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in remote:
        raise UnsupportedModelError(
            f"{model} ({what}) is not a causal language model, the only kind that llmx exports so far."
        )


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
