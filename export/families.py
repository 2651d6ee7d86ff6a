"""What is written for each family of models: everything of a package but its manifest, which is returned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from llmx.export.attention import IMPLEMENTATION, LayerState
from llmx.export.feedback import candidates_graph
from llmx.export.passes import both_graphs
from llmx.export.rope import LengthRule, length_rule
from llmx.export.tokenizer import generation_config, load_tokenizer, write_tokenizer
from llmx.export.trace import check_lengths, probe_layers, state_names, trace
from llmx.export.work import Work, context_length, embedding_shape, explain, text_side
from llmx.runtime.errors import UnsupportedModelError
from llmx.runtime.manifest import Manifest, ModelInfo, StateTensor, TokenizerInfo


def write_decoder(work: Work) -> Manifest:
    """Everything of the package but the manifest, which is returned. The model is released with this call's locals."""
    tokenizer, defaults = text_side(work)
    try:
        return _write_in_place(work, tokenizer, defaults)
    except UnsupportedModelError as error:
        reason = error
    try:
        return _write_carried(work, tokenizer, defaults)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{reason}; as plain ONNX: {error}") from error


def _write_in_place(work: Work, tokenizer: TokenizerInfo, defaults: dict[str, Any]) -> Manifest:
    """With key/value state that the attention operator writes in place."""
    checkpoint = work.checkpoint
    source = work.source(tokenizer.file, IMPLEMENTATION)
    work.stages.begin("trace")
    layers = explain(checkpoint, lambda: probe_layers(source.module))
    rule: LengthRule | None = explain(checkpoint, lambda: length_rule(source.module))
    context = context_length(checkpoint, work.options.max_length, rule.stretch if rule else 1.0)
    if rule is not None and context <= rule.edge:
        rule = None  # no sequence is long enough to have other factors than the original ones

    def make() -> dict[str, ir.Model]:
        kept, hidden = work.target.query_seqlens, work.options.with_hidden_states
        traced = explain(checkpoint, lambda: trace(source.module, layers, kept, rule is not None, hidden))
        explain(checkpoint, lambda: check_lengths(traced, context))
        work.stages.begin("rewrite")
        prefill, decode = both_graphs(traced, context, work.target)
        graphs = {"prefill": prefill, "decode": decode}
        if work.target.on_device:
            logits = prefill.graph.outputs[0]
            assert logits.shape is not None and logits.dtype is not None
            graphs["candidates"] = candidates_graph(int(logits.shape[2]), logits.dtype)
        return graphs

    if work.target.on_device and work.dtype == "float32":
        work.warnings.append(
            "onnxruntime's attention has no float32 kernel on CUDA, so this package runs on CPUs alone; export with "
            "--dtype fp16 or bf16."
        )
    graphs, hashed = work.write(source, make)
    vocab = int(graphs["prefill"].graph.outputs[0].shape[2])
    return work.manifest(
        source,
        graphs,
        hashed,
        family="decoder",
        model=ModelInfo(
            context,
            vocab,
            embedding_shape(source)[1],
            len(layers),
            source.num_parameters,
            rule.edge if rule is not None and rule.recomputes else None,
        ),
        state=_state(layers, work.dtype),
        tokenizer=tokenizer,
        generation=defaults,
    )


def _write_carried(work: Work, tokenizer: TokenizerInfo, defaults: dict[str, Any]) -> Manifest:
    """With state that is carried from call to call (llmx.export.carried)."""
    from llmx.export.carried import carried_graphs, longest_state, shortest_prompt
    from llmx.export.places import prepare, probe_carried

    source = work.plain_source(tokenizer.file)
    work.stages.begin("trace")
    holder, carried = probe_carried(source.module)
    if holder.prepares:
        source = work.loaded(lambda model: prepare(model, holder))
    if holder.argument is None:
        work.warnings.append(
            "The model keeps no state that could be carried from step to step, so each token runs the whole sequence anew."
        )
    tables = [m for m in source.module.modules() if isinstance(m, torch.nn.Embedding)]
    # without a table of positions (recurrences, ALiBi) nothing limits the length
    unlimited = all(table is source.module.get_input_embeddings() for table in tables)
    context = context_length(work.checkpoint, work.options.max_length, 1.0, unlimited)
    hidden, operators = work.options.with_hidden_states, not work.target.on_device
    graphs, hashed = work.write(
        source, lambda: carried_graphs(source.module, holder, carried, context, hidden, operators)
    )
    if "prefill" not in graphs:
        work.warnings.append(
            "The prompt cannot be traced as a whole (its code loops over it), so it runs token by token."
        )
    context = work.shortened(longest_state(graphs["decode"], context), context, "sequences")
    vocab = int(graphs["decode"].graph.outputs[0].shape[2])
    return work.manifest(
        source,
        graphs,
        hashed,
        family="decoder",
        model=ModelInfo(
            context,
            vocab,
            embedding_shape(source)[1],
            _num_layers(work.checkpoint.config.get_text_config(decoder=True)),
            source.num_parameters,
            min_prefill=shortest_prompt(graphs, context),
        ),
        state=carried.describe(),
        tokenizer=tokenizer,
        generation=defaults,
    )


def write_seq2seq(work: Work) -> Manifest:
    """An encoder-decoder's package but its manifest, which is returned."""
    from llmx.export.carried import longest_state
    from llmx.export.seq2seq import Sources, audio_info, describe_seq2seq, longest_source, probe_seq2seq, seq2seq_graphs

    checkpoint = work.checkpoint
    tokenizer, defaults = text_side(work)
    source = work.plain_source(tokenizer.file)
    work.stages.begin("trace")
    audio = audio_info(checkpoint) if checkpoint.task == "transcribe" else None
    sources = Sources(audio)
    state = explain(checkpoint, lambda: probe_seq2seq(source.module, sources))
    context = context_length(checkpoint, work.options.max_length, 1.0, unlimited=True)
    rows, width = embedding_shape(source)
    info = explain(
        checkpoint, lambda: describe_seq2seq(checkpoint.config, generation_config(checkpoint), rows, context, audio)
    )
    graphs, hashed = work.write(
        source, lambda: explain(checkpoint, lambda: seq2seq_graphs(source.module, state, info, sources))
    )
    if audio is None:
        longest = explain(checkpoint, lambda: longest_source(graphs, info.max_source_length))
        info = replace(info, max_source_length=work.shortened(longest, info.max_source_length, "sources"))
    context = work.shortened(explain(checkpoint, lambda: longest_state(graphs["decode"], context)), context, "outputs")
    vocab = int(graphs["decode"].graph.outputs[0].shape[2])
    layers = len(state.own.template.layers)
    return work.manifest(
        source,
        graphs,
        hashed,
        family="encoder-decoder",
        model=ModelInfo(context, vocab, width, layers, source.num_parameters),
        state=state.describe(),
        tokenizer=tokenizer,
        generation=defaults,
        seq2seq=info,
    )


def write_encoder(work: Work) -> Manifest:
    """An encoder's package but its manifest, which is returned."""
    from llmx.export.encoder import build_module, describe_encoder, longest_input, longest_text, trace_encoder
    from llmx.export.passes import encoder_graph

    checkpoint = work.checkpoint
    loaded = load_tokenizer(checkpoint)
    tokenizer = write_tokenizer(checkpoint, loaded, work.folder)
    source = work.source(tokenizer.file, None)  # its masks are tensors: what transformers chooses
    work.stages.begin("trace")
    module = explain(
        checkpoint, lambda: build_module(checkpoint, source.module, work.torch_dtype, work.options.pooling)
    )

    def make() -> dict[str, ir.Model]:
        traced = explain(checkpoint, lambda: trace_encoder(module, longest_input(checkpoint, source.module, loaded)))
        work.stages.begin("rewrite")
        return {"encoder": encoder_graph(traced)}

    graphs, hashed = work.write(source, make)
    info = explain(checkpoint, lambda: describe_encoder(checkpoint, module, graphs["encoder"], loaded))
    longest = explain(checkpoint, lambda: longest_text(graphs["encoder"], info.max_length))
    info = replace(info, max_length=work.shortened(longest, info.max_length, "texts"))
    rows, width = embedding_shape(source)
    return work.manifest(
        source,
        graphs,
        hashed,
        family="encoder",
        model=ModelInfo(info.max_length, rows, width, _num_layers(checkpoint.config), source.num_parameters),
        state=[],
        tokenizer=tokenizer,
        generation={},
        encoder=info,
    )


def _num_layers(config: Any) -> int:
    names = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
    return int(next((v for name in names if (v := getattr(config, name, None))), 0))


def _state(layers: list[LayerState], dtype: str) -> list[StateTensor]:
    return [
        StateTensor(
            s.layer, part, "in_place", past, present, dtype, ["slots", s.kv_heads, "max_length", s.head_dim], s.window
        )
        for s in layers
        for part, past, present in state_names(s.layer)
    ]
