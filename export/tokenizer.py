"""The package's text side: tokenizer.json, chat templates, special tokens and generation defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmx.export.checkpoint import Checkpoint
from llmx.export.lowering import quiet
from llmx.runtime.errors import CheckpointError, UnsupportedModelError
from llmx.runtime.manifest import TokenizerInfo

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"


def write_tokenizer(checkpoint: Checkpoint, tokenizer: Any, folder: Path) -> TokenizerInfo:
    """Write `tokenizer` (of load_tokenizer) as `tokenizer.json` and the chat templates into `folder`.

    The file is what transformers' loaded tokenizer holds rather than a copy of the checkpoint's: transformers applies
    settings of tokenizer_config.json to it, and converts the slow formats. Raises CheckpointError when there is no
    tokenizer and UnsupportedModelError when there is no way to convert it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{checkpoint.name} has a {type(tokenizer).__name__}, which transformers cannot convert to tokenizer.json; "
            "add a tokenizer.json to the checkpoint."
        )
    backend.no_truncation()
    backend.no_padding()
    (folder / TOKENIZER_FILE).write_text(backend.to_str(pretty=True), encoding="utf-8")
    template, named = _write_templates(tokenizer.chat_template, folder)
    return TokenizerInfo(
        file=TOKENIZER_FILE,
        chat_template=template,
        chat_templates=named,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=_eos_ids(checkpoint, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        special_tokens={
            key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        },
        clean_up_tokenization_spaces=bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)),
    )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """transformers' tokenizer of the checkpoint. Raises CheckpointError where there is none that loads."""
    from transformers import AutoTokenizer

    known = (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tokenizer_config.json",
        "sentencepiece.bpe.model",
    )
    if not any((checkpoint.path / name).is_file() for name in known):
        raise CheckpointError(
            f"{checkpoint.name} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json …); add its files to the folder."
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                checkpoint.path, config=checkpoint.config, trust_remote_code=checkpoint.trust_remote_code
            )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"The tokenizer of {checkpoint.name} cannot be converted to tokenizer.json: {reason[:240]}"
        ) from None


def _write_templates(template: str | dict[str, str] | None, folder: Path) -> tuple[str | None, dict[str, str]]:
    """(file of the default template, name -> file of the others)."""
    templates = template if isinstance(template, dict) else {"default": template} if template else {}
    default, named = None, {}
    for name, text in templates.items():
        if name == "default":
            default = TEMPLATE_FILE
            (folder / default).write_text(text, encoding="utf-8")
        else:
            named[name] = f"chat_template.{name}.jinja"
            (folder / named[name]).write_text(text, encoding="utf-8")
    return default, named


def generation_config(checkpoint: Checkpoint) -> Any:
    """The checkpoint's generation_config.json, or what its config implies. Raises CheckpointError."""
    from transformers import GenerationConfig

    if not (checkpoint.path / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(checkpoint.config)
    try:
        with quiet():
            return GenerationConfig.from_pretrained(checkpoint.path)
    except Exception as error:
        raise CheckpointError(f"The generation_config.json of {checkpoint.name} cannot be read: {error}") from None


def _eos_ids(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """generation_config's end tokens, else the config's, else the tokenizer's: the order `generate` uses."""
    sources = (generation_config(checkpoint).eos_token_id, getattr(checkpoint.config, "eos_token_id", None))
    for eos in (*sources, tokenizer.eos_token_id):
        if eos is not None:
            return sorted({int(e) for e in (eos if isinstance(eos, (list, tuple)) else [eos])})
    return []


def generation_defaults(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """(SamplingParams fields that the checkpoint sets, names of settings that llmx does not apply).

    As in transformers, sampling settings count only where `do_sample` is set; else the default is greedy.
    """
    config = generation_config(checkpoint)
    defaults: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        defaults["temperature"] = 1.0 if config.temperature is None else float(config.temperature)
        # transformers samples from the 50 best tokens unless told otherwise
        defaults["top_k"] = 50 if config.top_k is None else int(config.top_k)
        for name in ("top_p", "min_p"):
            value = getattr(config, name, None)
            if value is not None:
                defaults[name] = float(value)
    if config.max_new_tokens:
        defaults["max_tokens"] = int(config.max_new_tokens)
    neutral = {
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "typical_p": 1.0,
        "num_beams": 1,
        "bad_words_ids": None,
        "suppress_tokens": None,
    }
    if checkpoint.task == "seq2seq":  # honoured there, but for words of several tokens
        del neutral["suppress_tokens"]
        if all(len(words) == 1 for words in config.bad_words_ids or []):
            del neutral["bad_words_ids"]
    ignored = [name for name, value in neutral.items() if getattr(config, name, None) not in (value, None)]
    return defaults, ignored
