"""Encoder-decoders beside PyTorch: logits along its greedy path, free-running tokens, perplexity of given targets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llmx.export.agreement import greedy_params, token_agreement
from llmx.export.differences import Differences, log_softmax
from llmx.export.pair import LENGTHS, Pair, Report, Stage
from llmx.export.parting import Parting, find_seq2seq_parting
from llmx.export.seq2seq import Sources
from llmx.export.tokenizer import load_tokenizer
from llmx.export.verify import _NEW_TOKENS
from llmx.export.verify_seq2seq import greedy, output_logits, speech_greedy
from llmx.runtime import LLM
from llmx.runtime.errors import RequestError
from llmx.runtime.manifest import Seq2SeqInfo


@dataclass(frozen=True)
class Path:
    """A source (int64 [n] tokens, or float32 [mels, frames]), what PyTorch's decoder says of it (int64 [tokens], its
    prompt first) and the logits [tokens, vocab] at each.
    """

    source: np.ndarray
    tokens: np.ndarray
    logits: np.ndarray

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        return arguments(self.source)


def arguments(source: np.ndarray) -> dict[str, torch.Tensor]:
    """The model's arguments for a source of one row."""
    tensor = torch.from_numpy(source)[None]
    if source.ndim > 1:
        return {"input_features": tensor}
    return {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}


def compare_seq2seq(pair: Pair, stage: Stage) -> Report:
    """As the module says; where logits differ, the layer of the encoder or the decoder at which the two part."""
    info, options = pair.manifest.seq2seq, pair.options
    assert info is not None
    pairs = text_pairs(pair, info, options.text, options.tokens) if options.text is not None else None
    longest = max([2048, *(len(target) + 1 for _, target in pairs or [])])
    lengths = [min(n, info.max_source_length) for n in (*LENGTHS[1:], *LENGTHS[:1])]
    lengths = (lengths * options.prompts)[: options.prompts]
    differences, measured = Differences(pair.tolerance), None
    stage("Loading the package")
    room = min(pair.manifest.model.context_length, longest)
    with LLM(pair.folder, device="cpu", max_length=room, slots=len(lengths), threads=options.threads) as llm:
        steps = min(_NEW_TOKENS, llm.max_length - len(info.decoder_prompt))
        stage("Running PyTorch")
        paths = [_path(pair, info, length, row, steps) for row, length in enumerate(lengths)]
        stage("Running the package")
        for row, path in enumerate(paths):
            _compare(llm, path, row, differences)
        generation = _generate(llm, info, paths, steps, pair.tolerance)
        if pairs is not None:
            stage("Perplexity")
            measured = _perplexity(llm, pair.model, pairs, len(paths), paths, differences)
    report = pair.report(differences, generation=generation, perplexity=measured)
    spot = differences.first
    if spot is not None:
        stage("Looking for the layer")
        threshold = min(pair.tolerance, spot.difference / spot.scale / 4)
        parting = _part(pair, paths[spot.row], spot.position, threshold)
        report.layer, report.parting = parting.layer, parting.sentence
    elif not generation["within_tolerance"]:
        pair.fail(
            report, "Logits agree, and greedy tokens differ by more than a tie: the runtime, not the graph, is wrong."
        )
    return report


def _part(pair: Pair, path: Path, position: int, threshold: float) -> Parting:
    return find_seq2seq_parting(
        pair.folder,
        pair.manifest,
        pair.model,
        path.source,
        path.tokens[: position + 1],
        lambda: _logits(pair.model, path.source, path.tokens[: position + 1]),
        pair.tolerance,
        threshold,
        pair.options.threads,
    )


def _path(pair: Pair, info: Seq2SeqInfo, length: int, row: int, steps: int) -> Path:
    random = torch.Generator().manual_seed(1000 * pair.options.seed + row)
    if info.audio is None:
        source = torch.randint(0, info.source_vocab_size, (1, length), generator=random)
        tokens = greedy(pair.model, source, info.decoder_prompt, steps, info)
    else:
        shape = Sources(info.audio).example(0, torch.float32)["input_features"].shape
        source = torch.randn(shape, generator=random)
        tokens = speech_greedy(pair.model, source, info.decoder_prompt, steps, info)
    flat, path = source[0].numpy(), tokens[0].numpy()
    return Path(flat, path, output_logits(pair.model, arguments(flat), tokens))


def _logits(model: Any, source: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float32 [tokens, vocab] of PyTorch, in one call and without a cache."""
    ids = torch.from_numpy(tokens)[None]
    logits: np.ndarray = model(**arguments(source), decoder_input_ids=ids, use_cache=False).logits[0].float().numpy()
    return logits


def _compare(llm: LLM, path: Path, row: int, differences: Differences) -> np.ndarray:
    """The package's logits on the path's tokens, from slot 0."""
    llm.backend.encode(0, path.source)
    got = llm.backend.prefill(0, path.tokens, 0, np.arange(len(path.tokens)))
    differences.add(got, path.logits, row, 0, "decode")
    return got


def _generate(llm: LLM, info: Seq2SeqInfo, paths: list[Path], steps: int, tolerance: float) -> dict[str, Any]:
    """Free-running greedy tokens of all sources in one batch, beside transformers'."""
    params = greedy_params(steps)
    start = len(info.decoder_prompt)
    requests = [llm.engine.add(None, info.decoder_prompt, params, None, path.source) for path in paths]
    got = [output.outputs[0].token_ids for output in llm._finished(requests)]
    wanted = [path.tokens[start:] for path in paths]
    chosen = [path.logits[start - 1 : -1] for path in paths]
    lengths = [path.source.shape[-1] for path in paths]
    return token_agreement(wanted, chosen, got, lengths, tolerance)


def text_pairs(pair: Pair, info: Seq2SeqInfo, text: str, limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(source, target) token ids of the text's lines, each a source and its target with a tab between, as transformers'
    tokenizer writes them; as many lines as hold `limit` tokens of targets. Raises RequestError.
    """
    if info.audio is not None:
        raise RequestError(f"Perplexity reads text, and {pair.options.onnx} hears sound; leave --text-file out.")
    tokenizer, pairs, count = load_tokenizer(pair.checkpoint), [], 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        source, tab, target = line.partition("\t")
        if not tab or not source.strip() or not target.strip():
            raise RequestError(
                f"Line {number} of the text is not a source and its target with a tab between; an encoder-decoder's "
                "perplexity is that of targets."
            )
        ids = np.array(tokenizer(source)["input_ids"], np.int64)[: info.max_source_length]
        labels = np.array(tokenizer(text_target=target)["input_ids"], np.int64)[: limit - count]
        pairs.append((ids, labels))
        count += len(labels)
        if count >= limit:
            break
    if not pairs:
        raise RequestError("The text has no line with a source and its target; give at least one.")
    return pairs


def _perplexity(
    llm: LLM,
    model: Any,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    row: int,
    paths: list[Path],
    differences: Differences,
) -> dict[str, Any]:
    """exp of the mean negative log-probability of the targets' tokens, teacher-forced. Both sides read the same ids. The
    logits compared are added to `differences` as rows from `row` on, and what they are of to `paths`.
    """
    onnx = pytorch = 0.0
    for source, labels in pairs:
        shifted = _shifted(model, labels)
        path = Path(source, shifted, output_logits(model, arguments(source), torch.from_numpy(shifted)[None]))
        paths.append(path)
        got = _compare(llm, path, len(paths) - 1, differences).astype(np.float32)[:, : path.logits.shape[1]]
        onnx -= float(np.take_along_axis(log_softmax(got), labels[:, None], axis=1).sum())
        pytorch -= float(np.take_along_axis(log_softmax(path.logits), labels[:, None], axis=1).sum())
    count = sum(len(labels) for _, labels in pairs)
    return {
        "pytorch": math.exp(pytorch / count),
        "onnx": math.exp(onnx / count),
        "tokens": count,
        "targets": len(pairs),
    }


def _shifted(model: Any, labels: np.ndarray) -> np.ndarray:
    """What the decoder reads to say `labels`: the model's own rule, else its start token and all but the last."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        shifted: np.ndarray = own(labels=torch.from_numpy(labels)[None])[0].numpy()
        return shifted
    start = model.config.decoder_start_token_id
    return np.concatenate([[start], labels[:-1]])
