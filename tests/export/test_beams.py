"""Beam search against transformers' `generate`: the same outputs, in the same order, with the same scores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, AsyncLLM, RequestError, SamplingParams, StreamPiece
from zoo.models import SEQ2SEQ, VOCAB, make_model, make_seq2seq, save_checkpoint

SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 4, "n": 4},
    {"num_beams": 4, "n": 2, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "n": 1, "length_penalty": 0.5, "early_stopping": True},
    {"num_beams": 4, "n": 3, "length_penalty": -0.5, "early_stopping": False},
    {"num_beams": 2, "n": 2, "length_penalty": 0.0, "early_stopping": "never", "min_tokens": 9},
    {"num_beams": 4, "n": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 5, "n": 5, "length_penalty": 1.5},
]
NEW_TOKENS = 12


def reference(model: Any, ids: list[int], ends: list[int], search: dict[str, Any], start: int) -> list[Any]:
    """(tokens up to the end token, score) of transformers' best beams; the decoder's prompt has `start` tokens."""
    config = {
        "num_beams": search["num_beams"], "num_return_sequences": search["n"], "do_sample": False,
        "length_penalty": search.get("length_penalty", 1.0), "early_stopping": search.get("early_stopping", False),
        "max_new_tokens": NEW_TOKENS, "eos_token_id": ends, "pad_token_id": 1, "output_scores": True,
        "return_dict_in_generate": True, "repetition_penalty": search.get("repetition_penalty"),
        "no_repeat_ngram_size": search.get("no_repeat_ngram_size"),
    }  # fmt: skip
    if "min_tokens" in search:
        config["min_new_tokens"] = search["min_tokens"]
    with torch.no_grad():
        prompt = torch.tensor([ids])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **config)
    found = []
    for sequence, indices, score in zip(out.sequences, out.beam_indices, out.sequences_scores, strict=True):
        count = int((indices >= 0).sum())
        found.append((sequence[start : start + count].tolist(), float(score)))
    return found


def common_ends(model: Any, prompts: list[list[int]], start: Callable[[list[int]], int]) -> list[int]:
    """End tokens that searches meet: frequent tokens of outputs that nothing ends."""
    tokens: list[int] = []
    for prompt in prompts:
        for output, _ in reference(model, prompt, [0], {"num_beams": 4, "n": 4}, start(prompt)):
            tokens += output[3:]
    values, counts = np.unique(tokens, return_counts=True)
    return [0, *(int(v) for v in values[np.argsort(-counts)] if v > 2)][:4]


def check(
    folder: Path,
    model: Any,
    prompts: list[list[int]],
    start: Callable[[list[int]], int],
    searches: list[dict[str, Any]],
) -> None:
    ends = common_ends(model, prompts, start)
    reasons = set()
    with LLM(folder, slots=7) as llm:
        for search in searches:
            params = SamplingParams(max_tokens=NEW_TOKENS, stop_token_ids=ends[1:], logprobs=0, **search)
            for prompt, out in zip(prompts, llm.generate(prompts, params), strict=True):
                expected = reference(model, prompt, ends, search, start(prompt))
                assert [o.token_ids for o in out.outputs] == [tokens for tokens, _ in expected], search
                for output, (_, score) in zip(out.outputs, expected, strict=True):
                    assert output.score == pytest.approx(score, abs=1e-4, rel=1e-4)
                    reasons.add(output.finish_reason)
                    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
                    if not {"repetition_penalty", "min_tokens"} & search.keys():
                        chosen = [e[t].logprob for e, t in zip(output.logprobs, output.token_ids, strict=True)]
                        assert output.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-3)
            llm.engine.scheduler.pool.check_integrity()
            assert llm.engine.scheduler.pool.num_free == 7
    assert "stop" in reasons


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_decoders(name: str, package: Callable[[str], Path]) -> None:
    """In place, and carried: grown and replaced."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, VOCAB, size).tolist() for size in (9, 1, 24)]
    if name != "llama":
        prompts = prompts[:2]
    check(package(name), make_model(name), prompts, len, SEARCHES if name == "llama" else SEARCHES[:4])


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_encoder_decoders(name: str, seq2seq_package: Callable[[str], Path]) -> None:
    assert name in SEQ2SEQ
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, VOCAB, size).tolist() for size in (7, 21)]
    check(seq2seq_package(name), make_seq2seq(name), prompts, lambda _: 1, SEARCHES[:5])


def test_what_generation_forces(tmp_path: Path) -> None:
    """Defaults of the checkpoint: beams, a forced first token, a forced last one, words that may not come."""
    model = make_seq2seq("bart")
    config = model.generation_config
    config.forced_bos_token_id, config.forced_eos_token_id, config.eos_token_id = 5, 0, 0
    config.pad_token_id, config.decoder_start_token_id, config.max_length, config.min_length = 1, 2, 13, 6
    config.num_beams, config.length_penalty, config.early_stopping, config.bad_words_ids = 4, 2.0, True, [[7]]
    save_checkpoint(model, tmp_path / "checkpoint")
    result = export_model(ExportOptions(str(tmp_path / "checkpoint"), tmp_path / "package"))
    assert result.warnings == []
    rng = np.random.default_rng(5)
    with LLM(result.path, slots=4) as llm:
        for size in (3, 30):
            source = rng.integers(3, VOCAB, size).tolist()
            ids = torch.tensor([source])
            with torch.no_grad():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_scores=True,
                )
            [mine] = llm.generate(source)
            assert [2, 5, *mine.outputs[0].token_ids] == out.sequences[0].tolist()
            assert mine.outputs[0].score == pytest.approx(float(out.sequences_scores[0]), abs=1e-4)
            assert len(llm.generate(source, SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3
            pieces = list(llm.stream(source))
            assert [t for piece in pieces for t in piece.token_ids] == mine.outputs[0].token_ids
            assert pieces[-1].finish_reason is not None and pieces[-1].metrics is not None


def test_beams_beside_other_requests(package: Callable[[str], Path]) -> None:
    """Searches wait for slots for all their beams, whatever runs beside them, and change nothing of it."""
    search = SamplingParams(num_beams=3, n=3, max_tokens=10, stop=["t"])
    plain = SamplingParams(max_tokens=13, temperature=1.0, seed=3, n=2)
    rng = np.random.default_rng(6)
    prompts = [rng.integers(3, VOCAB, size).tolist() for size in (40, 3, 11, 20, 8, 30)]
    wanted = [search if i % 2 else plain for i in range(6)]
    with LLM(package("llama"), slots=4, prefill_chunk=8) as llm:
        alone = [llm.generate(p, w)[0] for p, w in zip(prompts, wanted, strict=True)]
        together = llm.generate(prompts, wanted)
        for one, other in zip(alone, together, strict=True):
            assert [(o.token_ids, o.text, o.finish_reason) for o in one.outputs] == [
                (o.token_ids, o.text, o.finish_reason) for o in other.outputs
            ]
        for out in together[1::2]:
            assert all("t" not in o.text for o in out.outputs)
        with pytest.raises(RequestError, match="num_beams is 5 and there are 4 slots"):
            llm.generate([[5]], SamplingParams(num_beams=5))
        stream = llm.stream([5], SamplingParams(num_beams=3, max_tokens=100))
        stream.close()
        assert llm.generate([[5]], SamplingParams(max_tokens=1, temperature=0.0))[0].outputs[0].token_ids
        assert llm.engine.scheduler.pool.num_free == 4


def test_run(package: Callable[[str], Path]) -> None:
    """The command line loads as many slots as there are beams."""
    from click.testing import CliRunner
    from llmx.cli import main

    folder = package("llama")
    command = ["run", "--onnx", str(folder), "--prompt", "the", "-n", "6", "--num-beams", "3", "--json"]
    told = json.loads(CliRunner().invoke(main, command).stdout)
    with LLM(folder, slots=3) as llm:
        [out] = llm.generate("the", SamplingParams(num_beams=3, max_tokens=6))
    assert told["token_ids"] == out.outputs[0].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "needs temperature 0"),
        ({"num_beams": 2, "n": 3}, "must not exceed num_beams"),
        ({"num_beams": 2, "structured_outputs": {"regex": "a"}}, "do not go together"),
        ({"num_beams": 0}, "num_beams must be a whole number"),
        ({"early_stopping": "always"}, "early_stopping must be"),
        ({"length_penalty": float("nan")}, "length_penalty must be"),
    ],
)
def test_bad_parameters(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_asynchronously(package: Callable[[str], Path]) -> None:
    """A stream of a search ends after its n outputs, which are fewer than its beams."""

    async def main() -> tuple[list[StreamPiece], list[list[int]]]:
        params = SamplingParams(num_beams=4, n=2, max_tokens=8)
        async with AsyncLLM(package("llama"), slots=4) as llm:
            pieces = [piece async for piece in llm.stream([5, 6], params)]
            [out] = await llm.generate([[5, 6]], params)
            return pieces, [o.token_ids for o in out.outputs]

    pieces, expected = asyncio.run(asyncio.wait_for(main(), 60))
    assert [piece.token_ids for piece in pieces] == expected and [piece.index for piece in pieces] == [0, 1]
