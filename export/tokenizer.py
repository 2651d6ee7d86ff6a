"""The package's text side: tokenizer.json, chat templates, special tokens and generation defaults."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from llmx.export.checkpoint import Checkpoint
from llmx.export.lowering import quiet
from llmx.runtime.errors import CheckpointError, UnsupportedModelError
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.spm import SOURCE_FILE, TARGET_FILE

TOKENIZER_FILE = "tokenizer.json"
SPM_FILE = "sentencepiece.json"
TEMPLATE_FILE = "chat_template.jinja"


def write_tokenizer(checkpoint: Checkpoint, tokenizer: Any, folder: Path) -> TokenizerInfo:
    """Write `tokenizer` (of load_tokenizer) as `tokenizer.json` and the chat templates into `folder`.

    The file is what transformers' loaded tokenizer holds rather than a copy of the checkpoint's: transformers applies
    settings of tokenizer_config.json to it, and converts the slow formats. Raises CheckpointError when there is no
    tokenizer and UnsupportedModelError when there is no way to convert it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spm = backend is None and hasattr(tokenizer, "build_inputs_with_special_tokens") and spm_models(tokenizer)
    if backend is None and not spm:
        raise UnsupportedModelError(
            f"{checkpoint.name} has a {type(tokenizer).__name__}, which transformers cannot convert to tokenizer.json; "
            "add a tokenizer.json to the checkpoint."
        )
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
        (folder / TOKENIZER_FILE).write_text(backend.to_str(pretty=True), encoding="utf-8")
    template, named = _write_templates(tokenizer.chat_template, folder)
    info = TokenizerInfo(
        file=TOKENIZER_FILE if not spm else SPM_FILE,
        kind="tokenizers" if not spm else "sentencepiece",
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
    if spm:
        _write_spm(checkpoint, tokenizer, spm, folder)
        _check_spm(checkpoint, tokenizer, folder, info)
    return info


def spm_models(tokenizer: Any) -> list[Any]:
    """The SentencePiece models of a slow tokenizer: the one that encodes, and the one that decodes where it is another."""
    source = getattr(tokenizer, "spm_source", None) or getattr(tokenizer, "sp_model", None)
    target = getattr(tokenizer, "spm_target", None)
    return [model for model in (source, target) if model is not None]


def _write_spm(checkpoint: Checkpoint, tokenizer: Any, models: list[Any], folder: Path) -> None:
    """`sentencepiece.json` and the models' files (llmx.runtime.spm says what they mean)."""
    for file, model in zip((SOURCE_FILE, TARGET_FILE), models, strict=False):
        (folder / file).write_bytes(model.serialized_model_proto())
    vocab = {str(spelling): int(i) for spelling, i in tokenizer.get_vocab().items()}
    marked = tokenizer.build_inputs_with_special_tokens([-1])
    facts = {
        "vocab": vocab,
        "prefix": marked[: marked.index(-1)],
        "suffix": marked[marked.index(-1) + 1 :],
        "unknown": tokenizer.unk_token_id,
        "special": sorted(set(tokenizer.all_special_ids)),
        "leading": sorted(token for token in vocab if token.startswith(">>") and token.endswith("<<")),
    }
    (folder / SPM_FILE).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


_SAMPLES = ("Hello world!", "  two  spaces ", "Über façade, 123.5 – 日本語", "a\nb\tc", "x", "It's (fine); isn't it?")


def _check_spm(checkpoint: Checkpoint, tokenizer: Any, folder: Path, info: TokenizerInfo) -> None:
    """Raises UnsupportedModelError where the written tokenizer reads or writes a text otherwise than transformers does."""
    from llmx.runtime.tokenizer import Tokenizer

    written = Tokenizer.load(folder, info)
    leading = [token for token in tokenizer.get_vocab() if token.startswith(">>") and token.endswith("<<")][:1]
    for text in (*_SAMPLES, *(f"{token} so be it" for token in leading)):
        wanted = list(tokenizer(text)["input_ids"])
        same = written.encode(text) == wanted
        if not same or written.decode(wanted) != tokenizer.decode(wanted, skip_special_tokens=True):
            raise UnsupportedModelError(
                f"{checkpoint.name} has a {type(tokenizer).__name__}, which treats {text!r} in a way that llmx does not; "
                "add a tokenizer.json to the checkpoint."
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
        "source.spm",
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
    default: str | None = None
    named: dict[str, str] = {}
    for name, text in templates.items():
        if name == "default":
            default = TEMPLATE_FILE
            (folder / default).write_text(text, encoding="utf-8")
        else:
            plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]  # a name may be anything, a path included
            file = f"chat_template.{plain}.jinja"
            named[name] = file if file not in named.values() else f"chat_template.{plain}.{len(named)}.jinja"
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


_NOT_APPLIED = (
    "sequence_bias", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "guidance_scale", "watermarking_config", "top_h",
)  # fmt: skip


def generation_defaults(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """(SamplingParams fields that the checkpoint sets, names of settings that llmx does not apply).

    As in transformers, sampling settings count only where `do_sample` is set; else the default is greedy. Penalties and
    bans count always.
    """
    config = generation_config(checkpoint)
    defaults: dict[str, Any] = {"temperature": 0.0}
    if config.do_sample:
        defaults["temperature"] = 1.0 if config.temperature is None else float(config.temperature)
        # transformers samples from the 50 best tokens unless told otherwise
        defaults["top_k"] = 50 if config.top_k is None else int(config.top_k)
        for name in ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            value = getattr(config, name, None)
            if value is not None:
                defaults[name] = float(value)
    if config.max_new_tokens:
        defaults["max_tokens"] = int(config.max_new_tokens)
    if getattr(config, "min_new_tokens", None):
        defaults["min_tokens"] = int(config.min_new_tokens)
    if config.repetition_penalty not in (None, 1.0):
        defaults["repetition_penalty"] = float(config.repetition_penalty)
    if config.no_repeat_ngram_size:
        defaults["no_repeat_ngram_size"] = int(config.no_repeat_ngram_size)
    words = [[int(token) for token in word] for word in config.bad_words_ids or []]
    if checkpoint.task == "seq2seq":  # single words are suppressed tokens there
        words = [word for word in words if len(word) > 1]
    if words:
        defaults["bad_words_ids"] = words
    neutral: dict[str, Any] = {"num_beam_groups": 1, **dict.fromkeys(_NOT_APPLIED)}
    if (config.num_beams or 1) > 1:
        if config.do_sample:  # drawing beams at random is another search
            neutral["num_beams"] = 1
        else:
            defaults |= {"num_beams": int(config.num_beams), "early_stopping": config.early_stopping or False}
            defaults["length_penalty"] = 1.0 if config.length_penalty is None else float(config.length_penalty)
    if checkpoint.task == "seq2seq":
        defaults |= _output_lengths(config)
    else:  # an encoder-decoder's are among its facts
        size = getattr(checkpoint.config.get_text_config(), "vocab_size", None) or math.inf
        for name in ("suppress_tokens", "begin_suppress_tokens"):  # transformers passes over ids beyond the vocabulary
            ids = sorted({int(token) for token in getattr(config, name, None) or [] if 0 <= token < size})
            if ids:
                defaults[name] = ids
    ignored = [name for name, value in neutral.items() if getattr(config, name, None) not in (value, None)]
    return defaults, ignored


def _output_lengths(config: Any) -> dict[str, int]:
    """An encoder-decoder's output lengths. transformers counts the decoder's start token in `max_length` and
    `min_length`, and a forced first token in all of them; a package's prompt has both.
    """
    forced = getattr(config, "forced_bos_token_id", None) is not None
    found = {}
    if config.max_new_tokens or config.max_length:
        found["max_tokens"] = (
            config.max_new_tokens - forced if config.max_new_tokens else config.max_length - 1 - forced
        )
    if getattr(config, "min_new_tokens", None) or config.min_length:
        found["min_tokens"] = (
            config.min_new_tokens - forced if config.min_new_tokens else config.min_length - 1 - forced
        )
    return {name: int(value) for name, value in found.items() if value > 0}
