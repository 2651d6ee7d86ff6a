"""Encoder-decoders: an encoder graph that writes the cross-attention state, and a decode graph that reads it.

Both are traced from the model as it is, with transformers' `EncoderDecoderCache`. The encoder graph runs the source text
through the encoder and each decoder layer's cross-attention projections (state layout `cross`: written once, read by
every step); the rest of the decoder falls away as unused. The decode graph takes one token, its own state (`grow`) and
the cross state; the few tokens that a decoder is prompted with go through it one by one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from llmx.export.carried import graph_state_names, longest_block, separate_names
from llmx.export.checkpoint import Checkpoint
from llmx.export.holders import Carried, CarriedTensor, compare
from llmx.export.known import KnownValues
from llmx.export.lengths import USEFUL, joined, longest_right, shortest_right, wrong_block
from llmx.export.lowering import forward_failed, lower
from llmx.export.passes import encoder_graph
from llmx.export.places import tracing
from llmx.export.rope import untouched
from llmx.export.shims import fake_tensors, shimmed
from llmx.export.tokenizer import generation_config
from llmx.export.trace import output_head
from llmx.runtime.errors import CheckpointError, LlmxError, UnsupportedModelError
from llmx.runtime.manifest import AudioInfo, Seq2SeqInfo, StateTensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

# Lengths of the example sources and outputs: all different, and above 1.
_SOURCE, _OTHER_SOURCE, _TARGET, _OTHER_TARGET = 11, 13, 7, 9


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
    with torch.no_grad(), untouched(model), tracing(), fake_tensors(), shimmed(), KnownValues():
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
                raise forward_failed(error, "it would have to run on transformers' EncoderDecoderCache") from error
            caches.append(cache)
            kind, width = type(encoded), int(encoded.last_hidden_state.shape[-1])
    first, second = caches
    targets, sizes = (_TARGET, _OTHER_TARGET), (_SOURCE, _OTHER_SOURCE)
    own = _carried(first.self_attention_cache, second.self_attention_cache, targets, "decoder")
    cross = _carried(first.cross_attention_cache, second.cross_attention_cache, sizes, "encoder")
    return Seq2SeqState(own, cross, kind, width)


def _carried(first: DynamicCache, second: DynamicCache, lengths: tuple[int, int], side: str) -> Carried:
    tensors = compare(first, second, lengths, side)
    if not tensors or (side == "decoder" and any(tensor.grows is None for tensor in tensors)):
        raise UnsupportedModelError(f"its cache holds no keys and values of the {side}")
    return Carried.of(first, tensors)


@dataclass(frozen=True)
class EncoderTrace:
    """How the encoder is called: with a mask of ones, which says nothing, but some make their own only from one; with
    `block`, on the source padded to a multiple of it, `least` or more, as encoders do themselves whose attention works in
    blocks.
    """

    masked: bool = False
    block: int | None = None
    least: int = 0


class EncoderModule(torch.nn.Module):
    """Source tokens [1, source] to the cross state of every decoder layer."""

    def __init__(self, model: torch.nn.Module, state: Seq2SeqState, start: int, how: EncoderTrace) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.state, self.start, self.how = state, start, how

    def forward(
        self, input_ids: torch.Tensor | None = None, input_features: torch.Tensor | None = None
    ) -> dict[str, Any]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with KnownValues():
            encoded, mask = self._encode(input_ids, input_features)
            self.model(
                encoder_outputs=encoded,
                decoder_input_ids=torch.full((1, 1), self.start),
                past_key_values=cache,
                use_cache=True,
                **mask,
                return_dict=True,
            )
        return {"present": [tensor.read(cache.cross_attention_cache) for tensor in self.state.cross.tensors]}

    def _encode(
        self, input_ids: torch.Tensor | None, input_features: torch.Tensor | None
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """The encoder's output, by itself as `generate` runs it, and the mask that the decoder is given."""
        encoder: Any = self.model.get_encoder()
        if input_ids is None:
            return encoder(input_features=input_features, return_dict=True), {}
        mask = {"attention_mask": torch.ones_like(input_ids)} if self.how.masked else {}
        if self.how.block is None:
            return encoder(input_ids=input_ids, **mask, return_dict=True), mask
        length = input_ids.shape[1]
        padded = torch.sym_max(length + -length % self.how.block, self.how.least)
        filler = input_ids.new_full((1, self.how.least), self.config.pad_token_id or 0)
        ids = torch.cat([input_ids, filler], dim=1)[:, :padded]
        words = (torch.arange(padded) < length).long()[None]
        encoded = encoder(input_ids=ids, attention_mask=words, return_dict=True)
        encoded.last_hidden_state = encoded.last_hidden_state[:, :length]
        return encoded, mask


class DecodeModule(torch.nn.Module):
    """One token after the state: logits [1, 1, vocab] and the decoder's new state."""

    def __init__(self, model: torch.nn.Module, state: Seq2SeqState) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.state = state

    def forward(self, input_ids: torch.Tensor, past: list[torch.Tensor], cross: list[torch.Tensor]) -> dict[str, Any]:
        own = self.state.own
        cache = EncoderDecoderCache(own.filled(past), self.state.cross.filled(cross))
        cache.is_updated = dict.fromkeys(range(len(cache.cross_attention_cache.layers)), True)
        logits = self.model(
            encoder_outputs=self.state.unread(cross[0]),
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).logits
        return {"logits": logits, "present": [tensor.read(cache.self_attention_cache) for tensor in own.tensors]}


def seq2seq_graphs(model: Any, state: Seq2SeqState, info: Seq2SeqInfo, sources: Sources) -> dict[str, ir.Model]:
    """The graphs `encoder` and `decode`. Raises UnsupportedModelError."""
    encoder = _lower_encoder(model, state, info, sources)
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


def _lower_encoder(model: Any, state: Seq2SeqState, info: Seq2SeqInfo, sources: Sources) -> ir.Model:
    def lowered(length: int, how: EncoderTrace) -> ir.Model:
        module = EncoderModule(model, state, info.decoder_prompt[0], how)
        with untouched(model), tracing():
            return lower(module, sources.example(length, model.dtype), {sources.name: sources.dynamic or None})

    how = EncoderTrace()
    try:
        encoder = lowered(_SOURCE, how)
    except UnsupportedModelError:
        if sources.audio is not None:
            raise
        how = EncoderTrace(masked=True)
        encoder = lowered(_SOURCE, how)
    if sources.audio is not None:
        return encoder
    longest = info.max_source_length
    try:
        other = lowered(min(2 * longest_block(model.config) + 5, longest - 3), how)  # a multiple of no block, as a rule
    except UnsupportedModelError:
        return encoder  # which `longest_source` limits to the lengths it is right for
    same = joined(other, encoder)
    block = None if same and longest_right(other, 2, longest) == longest else wrong_block(other, longest)
    if same and block is None:
        return other
    if block is None:
        raise UnsupportedModelError("its encoder works in blocks, whose number a graph cannot follow")
    # it pads by itself, but for sources that need no padding; few blocks take ways of their own
    how, many = replace(how, block=block, least=block), min(5 * block + 5, longest - 3)
    first = shortest_right(lowered(many, how), longest)
    return lowered(many, replace(how, least=block * -(-first // block)))


def longest_source(graphs: dict[str, ir.Model], longest: int) -> int:
    """The longest source, up to `longest`, that both graphs are right for. Raises UnsupportedModelError where that is too
    short to be of use.
    """
    found = longest_right(graphs["encoder"], 2, longest)
    found = longest_right(graphs["decode"], 2, found, lambda name, _: None if name == "cross" else _SOURCE)
    if found < min(longest, USEFUL):
        raise UnsupportedModelError(
            f"its code takes another way for sources of {found + 1} tokens than for those of {_SOURCE}, and a graph has no "
            "branches"
        )
    return found


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
