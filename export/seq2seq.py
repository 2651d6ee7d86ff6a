"""Encoder-decoders: an encoder graph that writes the cross-attention state, and a decode graph that reads it.

Both are traced from the model as it is, with transformers' `EncoderDecoderCache`. The encoder graph runs the source text
through the encoder and each decoder layer's cross-attention projections (state layout `cross`: written once, read by
every step); the rest of the decoder falls away as unused. The decode graph takes one token, its own state (`grow`) and
the cross state; the few tokens that a decoder is prompted with go through it one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from llmx.export.carried import (
    Carried,
    CarriedTensor,
    compare_layers,
    graph_state_names,
    longest_block,
    separate_names,
    tracing,
)
from llmx.export.checkpoint import Checkpoint
from llmx.export.lowering import _first_line, _place, lower, quiet
from llmx.export.passes import encoder_graph
from llmx.export.rope import untouched
from llmx.export.shims import fake_tensors, shimmed
from llmx.export.tokenizer import generation_config
from llmx.export.trace import output_head
from llmx.export.verify import Progress, check_logits, fitting
from llmx.runtime.errors import CheckpointError, LlmxError, UnsupportedModelError
from llmx.runtime.manifest import AudioInfo, Seq2SeqInfo, StateTensor, Verification
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

# Lengths of the example sources and outputs: all different, and above 1.
_SOURCE, _OTHER_SOURCE, _TARGET, _OTHER_TARGET = 11, 13, 7, 9
_NEW_TOKENS = 16
_SOURCE_LENGTHS = (5, 23, 64)


class Sources:
    """Example sources for the encoder: tokens of any length, or the log-mel features of a whole window of sound."""

    def __init__(self, audio: AudioInfo | None) -> None:
        self.audio = audio
        self.name = "input_ids" if audio is None else "input_features"

    def example(self, length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The model's arguments for a source of `length` tokens (a window of sound has one length)."""
        if self.audio is None:
            return {self.name: torch.ones(1, length, dtype=torch.long)}
        frames = self.audio.chunk_seconds * self.audio.sampling_rate // self.audio.hop_length
        return {self.name: torch.zeros(1, self.audio.n_mels, frames, dtype=dtype)}

    @property
    def dynamic(self) -> dict[int, Any]:
        return {1: torch.export.Dim.DYNAMIC} if self.audio is None else {}


def audio_info(checkpoint: Checkpoint) -> AudioInfo:
    """From preprocessor_config.json and the generation config. Raises UnsupportedModelError for other features than
    Whisper's.
    """
    try:
        raw = json.loads((checkpoint.path / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.name} has no readable preprocessor_config.json ({error}).") from None
    kind = raw.get("feature_extractor_type")
    if kind != "WhisperFeatureExtractor":
        raise UnsupportedModelError(
            f"{checkpoint.name} reads sound through {kind}, and only WhisperFeatureExtractor's features are computed so far"
        )
    config = generation_config(checkpoint)
    languages = {token.strip("<|>"): int(i) for token, i in (getattr(config, "lang_to_id", None) or {}).items()}
    return AudioInfo(
        sampling_rate=int(raw.get("sampling_rate", 16000)),
        n_fft=int(raw.get("n_fft", 400)),
        hop_length=int(raw.get("hop_length", 160)),
        n_mels=int(raw.get("feature_size", 80)),
        chunk_seconds=int(raw.get("chunk_length", 30)),
        languages=languages if getattr(config, "is_multilingual", bool(languages)) else {},
        tasks={name: int(i) for name, i in (getattr(config, "task_to_id", None) or {}).items()},
        no_timestamps_token_id=getattr(config, "no_timestamps_token_id", None),
    )


class Seq2SeqState:
    """What an encoder-decoder carries: its own state, the cross-attention state, and what its encoder returns (a class of
    outputs, and their width).
    """

    def __init__(self, own: Carried, cross: Carried, kind: type[Any], width: int) -> None:
        self.own, self.cross, self.kind, self.width = own, cross, kind, width

    def unread(self, cross: torch.Tensor) -> Any:
        """An encoder's output for `cross` to be the keys or values of: read for its shape alone."""
        length = cross.shape[self.cross.tensors[0].grows or 2]
        return self.kind(last_hidden_state=cross.new_zeros(1, length, self.width))

    def describe(self) -> list[StateTensor]:
        return self.own.describe() + self.cross.describe()


def probe_seq2seq(model: Any, sources: Sources) -> Seq2SeqState:
    """Run `model` at two lengths under fake tensors. Raises UnsupportedModelError where it keeps another kind of cache."""
    output_head(model)
    caches: list[EncoderDecoderCache] = []
    kind, width = BaseModelOutput, 0
    with torch.no_grad(), untouched(model), tracing(), fake_tensors(), shimmed():
        for source, target in ((_SOURCE, _TARGET), (_OTHER_SOURCE, _OTHER_TARGET)):
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            try:
                example = sources.example(source, model.dtype)
                mask = {"attention_mask": torch.ones_like(example["input_ids"])} if "input_ids" in example else {}
                encoded = model.get_encoder()(**example, **mask, return_dict=True)
                model(
                    encoder_outputs=encoded,
                    **mask,
                    decoder_input_ids=torch.ones(1, target, dtype=torch.long),
                    past_key_values=cache,
                    use_cache=True,
                    return_dict=True,
                )
            except LlmxError:
                raise
            except Exception as error:
                raise UnsupportedModelError(f"its forward pass failed: {_first_line(error)}{_place(error)}") from error
            caches.append(cache)
            kind, width = type(encoded), int(encoded.last_hidden_state.shape[-1])
    first, second = caches
    own = _carried(first.self_attention_cache, second.self_attention_cache, _TARGET, "decoder")
    cross = _carried(first.cross_attention_cache, second.cross_attention_cache, _SOURCE, "encoder")
    return Seq2SeqState(own, cross, kind, width)


def _carried(first: DynamicCache, second: DynamicCache, length: int, side: str) -> Carried:
    tensors = [
        tensor
        for index, layers in enumerate(zip(first.layers, second.layers, strict=True))
        for tensor in compare_layers(index, *layers, length=length, side=side)
    ]
    if not tensors or (side == "decoder" and any(tensor.grows is None for tensor in tensors)):
        raise UnsupportedModelError(f"its cache holds no keys and values of the {side}")
    return Carried.of(first, tensors, "past_key_values")


class EncoderModule(torch.nn.Module):
    """Source tokens [1, source] to the cross state of every decoder layer."""

    def __init__(self, model: torch.nn.Module, state: Seq2SeqState, start: int, masked: bool) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.state, self.start, self.masked = state, start, masked

    def forward(
        self, input_ids: torch.Tensor | None = None, input_features: torch.Tensor | None = None
    ) -> dict[str, Any]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        source = {"input_ids": input_ids} if input_features is None else {"input_features": input_features}
        mask = {"attention_mask": torch.ones_like(input_ids)} if self.masked and input_ids is not None else {}
        encoded = self.model.get_encoder()(**source, **mask, return_dict=True)  # as `generate` does
        token = torch.full((1, 1), self.start)
        self.model(
            encoder_outputs=encoded,
            decoder_input_ids=token,
            past_key_values=cache,
            use_cache=True,
            **mask,
            return_dict=True,
        )
        layers = cache.cross_attention_cache.layers
        return {"present": [tensor.read(layers[tensor.layer]) for tensor in self.state.cross.tensors]}


class DecodeModule(torch.nn.Module):
    """One token after the state: logits [1, 1, vocab] and the decoder's new state."""

    def __init__(self, model: torch.nn.Module, state: Seq2SeqState) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.state = state

    def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor], cross: list[torch.Tensor]) -> dict[str, Any]:
        own = self.state.own
        cache = EncoderDecoderCache(own.cache(past), self.state.cross.cache(cross))
        cache.is_updated = dict.fromkeys(range(len(cache.cross_attention_cache.layers)), True)
        logits = self.model(
            encoder_outputs=self.state.unread(cross[0]),
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).logits
        layers = cache.self_attention_cache.layers
        return {"logits": logits, "present": [tensor.read(layers[tensor.layer]) for tensor in own.tensors]}


def seq2seq_graphs(model: Any, state: Seq2SeqState, info: Seq2SeqInfo, sources: Sources) -> dict[str, ir.Model]:
    """The graphs `encoder` and `decode`. Raises UnsupportedModelError."""
    start = info.decoder_prompt[0]

    def lower_encoder(length: int, masked: bool) -> ir.Model:
        module = EncoderModule(model, state, start, masked)
        with untouched(model), tracing():
            return lower(module, sources.example(length, model.dtype), {sources.name: sources.dynamic or None})

    masked = False  # a mask of ones says nothing, but some encoders make their own only from one
    try:
        encoder = lower_encoder(_SOURCE, masked)
    except UnsupportedModelError:
        if sources.audio is not None:
            raise
        masked = True
        encoder = lower_encoder(_SOURCE, masked)
    if sources.audio is None:
        other = lower_encoder(min(2 * longest_block(model.config) + 5, info.max_source_length), masked)
        if [node.op_type for node in encoder.graph] != [node.op_type for node in other.graph]:
            raise UnsupportedModelError("its encoder works in blocks, whose number a graph cannot follow")
    by_name = {f"present.{index}": tensor for index, tensor in enumerate(state.cross.tensors)}
    graph_state_names(encoder.graph, by_name, {"input_ids": "seq"})
    decode = _lower_decode(model, state)
    by_name = {f"{side}.{i}": tensor for side in ("past", "present") for i, tensor in enumerate(state.own.tensors)}
    by_name |= {f"cross.{index}": tensor for index, tensor in enumerate(state.cross.tensors)}
    graph_state_names(decode.graph, by_name, {"input_ids": 1})
    logits = decode.graph.outputs[0]
    assert logits.name == "logits" and logits.shape is not None
    logits.shape = ir.Shape([1, 1, logits.shape[2]])
    graphs = {"encoder": encoder_graph(encoder), "decode": encoder_graph(decode)}
    separate_names(graphs)
    return graphs


def _lower_decode(model: Any, state: Seq2SeqState) -> ir.Model:
    def examples(tensors: list[CarriedTensor]) -> list[torch.Tensor]:
        return [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors]

    def dynamic(tensors: list[CarriedTensor]) -> list[Any]:
        return [None if t.grows is None else {t.grows: torch.export.Dim.DYNAMIC} for t in tensors]

    own, cross = state.own.tensors, state.cross.tensors
    inputs = {"input_ids": torch.ones(1, 1, dtype=torch.long), "past": examples(own), "cross": examples(cross)}
    shapes = {"input_ids": None, "past": dynamic(own), "cross": dynamic(cross)}
    with untouched(model), tracing():
        return lower(DecodeModule(model, state), inputs, shapes)


def describe_seq2seq(
    config: Any, generation: Any, source_vocab: int, context: int, audio: AudioInfo | None
) -> Seq2SeqInfo:
    """What the decoder is prompted with and may not say, from the config and the generation config."""
    start = next(
        (
            token
            for name in ("decoder_start_token_id", "bos_token_id")
            for holder in (generation, config)
            if (token := getattr(holder, name, None)) is not None
        ),
        None,
    )
    if start is None:
        raise UnsupportedModelError("its config names no decoder_start_token_id")
    prompt = [int(t) for t in (start if isinstance(start, list) else [start])][:1]
    forced = getattr(generation, "forced_bos_token_id", None)
    if forced is not None and audio is None:
        prompt.append(int(forced))
    single = [words[0] for words in getattr(generation, "bad_words_ids", None) or [] if len(words) == 1]
    suppressed = [*(getattr(generation, "suppress_tokens", None) or []), *single]
    names = ("max_encoder_position_embeddings", "max_source_positions", "max_position_embeddings", "n_positions")
    longest = next((int(v) for name in names if (v := getattr(config, name, None))), context)
    end = getattr(generation, "forced_eos_token_id", None)
    return Seq2SeqInfo(
        max_source_length=longest,
        source_vocab_size=source_vocab,
        decoder_prompt=prompt,
        suppress_tokens=sorted({int(t) for t in suppressed if t >= 0}),
        begin_suppress_tokens=[int(t) for t in getattr(generation, "begin_suppress_tokens", None) or []],
        forced_eos_token_id=int(end[0] if isinstance(end, list) else end) if end is not None else None,
        audio=audio,
    )


def greedy(
    model: Any, source: torch.Tensor, prompt: list[int], new_tokens: int, info: Seq2SeqInfo | None = None
) -> torch.Tensor:
    """transformers' greedy `generate` for exactly `new_tokens` tokens after the decoder's `prompt`: [1, all tokens]. With
    `info`, tokens are suppressed as it says.
    """
    from transformers import GenerationConfig

    suppressed = {} if info is None else _suppressed(info)
    settings = GenerationConfig(
        **suppressed,
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        decoder_start_token_id=prompt[0],
    )
    with torch.no_grad(), quiet():
        original, model.generation_config = model.generation_config, settings
        try:
            tokens: torch.Tensor = model.generate(
                source,
                attention_mask=torch.ones_like(source),
                decoder_input_ids=torch.tensor([prompt]),
                generation_config=settings,
            )
        finally:
            model.generation_config = original
    return tokens


def _suppressed(info: Seq2SeqInfo) -> dict[str, list[int]]:
    return {
        name: tokens
        for name in ("suppress_tokens", "begin_suppress_tokens")
        if (tokens := getattr(info, name))  # an empty list is an error to transformers
    }


def speech_greedy(
    model: Any, features: torch.Tensor, prompt: list[int], new_tokens: int, info: Seq2SeqInfo
) -> torch.Tensor:
    """Greedy tokens after `prompt` for float32 [1, mels, frames], suppressed as `info` says: [1, all tokens]. Without
    Whisper's own `generate`, which cuts sound and prompts itself.
    """
    with torch.no_grad():
        encoded, ids = model.get_encoder()(features), torch.tensor([prompt])
        for step in range(new_tokens):
            logits = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False).logits[0, -1].float()
            logits[info.suppress_tokens + (info.begin_suppress_tokens if step == 0 else [])] = -torch.inf
            ids = torch.cat([ids, logits.argmax().reshape(1, 1)], dim=1)
    return ids


def verify_seq2seq(
    backend: Any, load: Callable[[], Any], info: Seq2SeqInfo, dtype: str, progress: Progress
) -> Verification:
    """Compare the package with PyTorch on sources of several lengths, teacher-forced along PyTorch's greedy path.

    Raises VerificationError as `llmx.export.verify.verify`.
    """
    model = load()
    worst, positions, tolerance = 0.0, 0, 0.0
    lengths = [min(length, info.max_source_length) for length in _SOURCE_LENGTHS]
    for row, length in enumerate(lengths):
        random = torch.Generator().manual_seed(row)
        steps = min(_NEW_TOKENS, backend.max_length - 3)
        if info.audio is None:
            source = torch.randint(0, info.source_vocab_size, (1, length), generator=random)
            tokens = greedy(model, source, info.decoder_prompt, steps)
            arguments = {"input_ids": source, "attention_mask": torch.ones_like(source)}
        else:
            source = torch.randn(
                Sources(info.audio).example(0, torch.float32)["input_features"].shape, generator=random
            )
            arguments = {"input_features": source}
            tokens = torch.randint(0, backend.vocab_size, (1, steps), generator=random)
        with torch.no_grad(), fitting(model, dtype):
            output = model(**arguments, decoder_input_ids=tokens, use_cache=False)
        want, path = output.logits[0].float().numpy(), tokens[0].numpy()
        backend.encode(row, source[0].numpy())
        got = backend.prefill(row, path, 0, np.arange(len(path)))
        difference, allowed = check_logits(got, want, dtype, f"source of {length} tokens, position", 0)
        if difference >= worst:
            worst, tolerance = difference, allowed
        positions += len(path)
        progress(row + 1, len(lengths))
    return Verification("passed", max_abs_diff=worst, tolerance=tolerance, positions=positions)
