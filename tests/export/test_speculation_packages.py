"""Speculative decoding of real packages: outputs of plain decoding, and its distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from llmx.export import ExportOptions, export_model
from llmx.export.quantization import QuantizationOptions
from llmx.runtime import LLM, PackageError, RequestError, SamplingParams, Speculation
from scipy.stats import chi2_contingency

ROOT = Path(__file__).parent.parent.parent
LOOKUP = Speculation(prompt_lookup=True)
FIXED_LOOKUP = Speculation(prompt_lookup=True, num_tokens=3)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = ROOT / "artifacts" / "checkpoints" / "draft"
    return export_model(ExportOptions(str(checkpoint), tmp_path_factory.mktemp("draft") / "draft")).path


def held_out(count: int, length: int = 160) -> list[str]:
    """Pieces of the last tenth of tinyshakespeare, which neither model was trained on."""
    text = (ROOT / "artifacts" / "checkpoints" / "data" / "tinyshakespeare.txt").read_text()
    rest = text[int(len(text) * 0.9) :]
    step = (len(rest) - length) // count
    return [rest[i * step : i * step + length] for i in range(count)]


def test_greedy_output_is_that_of_plain_decoding(demo: Path, draft: Path) -> None:
    prompts = held_out(100)
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    with LLM(demo, slots=8, max_length=256) as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    for speculative in (
        draft,
        LOOKUP,
        Speculation(draft=draft, num_tokens=4),
        Speculation(prompt_lookup=True, num_tokens=4),
    ):
        with LLM(demo, slots=8, max_length=256, speculative=speculative) as llm:
            outs = llm.generate(prompts, params)
            assert [out.outputs[0].token_ids for out in outs] == expected
            if isinstance(speculative, Speculation) and speculative.num_tokens:  # else it follows measured times
                assert sum(out.metrics.num_accepted for out in outs) > 100
            alone = [llm.generate(prompt, params)[0] for prompt in prompts[:5]]  # through another pass than a batch
            assert [out.outputs[0].token_ids for out in alone] == expected[:5]


def test_everything_else_of_a_request(demo: Path, draft: Path) -> None:
    """Seeds, stop strings, log-probabilities, penalties, grammars and streams, as without speculation."""
    prompts = held_out(6)
    wanted = [
        SamplingParams(max_tokens=40, temperature=0.9, top_p=0.9, seed=3, logprobs=2),
        SamplingParams(max_tokens=40, temperature=0.0, stop=["the", "."], min_tokens=5),
        SamplingParams(max_tokens=40, temperature=0.7, seed=5, repetition_penalty=1.2, n=2),
        SamplingParams(
            max_tokens=40, temperature=1.0, seed=6, structured_outputs={"regex": "(ROMEO|JULIET): [a-z ]{3,30}"}
        ),
        SamplingParams(max_tokens=8, temperature=0.0, num_beams=2),
        SamplingParams(max_tokens=40, temperature=0.0, no_repeat_ngram_size=3, logprobs=0),
    ]

    def told(llm: LLM) -> list[object]:
        outs = llm.generate(prompts, wanted)
        streamed = "".join(piece.text for piece in llm.stream(prompts[1], wanted[1]))
        assert streamed == outs[1].outputs[0].text
        return [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for out in outs for o in out.outputs]

    with LLM(demo, slots=6, max_length=256) as llm:
        expected = told(llm)
    with LLM(demo, slots=6, max_length=256, speculative=LOOKUP) as llm:
        assert told(llm) == expected
    with LLM(demo, slots=6, max_length=256, speculative=draft) as llm:
        wanted = [w if w.temperature == 0.0 else SamplingParams(**{**vars(w), "temperature": 0.0}) for w in wanted]
        got = told(llm)
    with LLM(demo, slots=6, max_length=256) as llm:
        assert told(llm) == got


@pytest.mark.parametrize("name", ["llama-longrope", "phi3-longrope"])
def test_rotary_factors_by_length(name: str, package: Callable[[str], Path]) -> None:
    """Past the original length of 32 positions, at which one of them computes its state anew."""
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    prompts = [[5, 6, 7, 8] * 4, [9, 10] * 13]
    with LLM(package(name), slots=2) as llm:
        expected = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    lookup = Speculation(prompt_lookup=True, min_ngram=1, num_tokens=5)
    with LLM(package(name), slots=2, speculative=lookup) as llm:
        outs = llm.generate(prompts, params)
        assert [out.outputs[0].token_ids for out in outs] == expected
        assert sum(out.metrics.num_drafted for out in outs) > 0
        assert [llm.generate([p], params)[0].outputs[0].token_ids for p in prompts] == expected


def test_refusals(demo: Path, package: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="another vocabulary than the model"):
        LLM(demo, speculative=package("llama"))
    with pytest.raises(RequestError, match="a recurrence, which cannot go back"):
        LLM(package("mamba"), speculative=LOOKUP)
    with pytest.raises(RequestError, match="token by token"):
        LLM(package("bloom"), speculative=LOOKUP)
    with pytest.raises(RequestError, match="keeps a recurrence, which cannot take guesses back"):
        LLM(package("llama"), speculative=package("mamba"))
    with pytest.raises(PackageError, match="no model package"):
        LLM(demo, speculative=demo / "nowhere")


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo or its draft -> its package in 4 bits."""

    @cache
    def get(name: str) -> Path:
        source = ROOT / "artifacts" / "checkpoints" / name
        options = QuantizationOptions(weights="int4", block_size=16)
        output = tmp_path_factory.mktemp("int4") / name
        return export_model(ExportOptions(str(source), output, quantize=options, verify=False)).path

    return get


@pytest.mark.parametrize("drafter", ["draft", "lookup"])
def test_quantized_packages(drafter: str, int4: Callable[[str], Path]) -> None:
    """With rounded activations a pass over several tokens differs from a step by more than rounding: the same tokens,
    but where the two best lie closer than that moves them.
    """
    prompts = held_out(40)
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True, logprobs=2)
    with LLM(int4("demo"), slots=8, max_length=256) as llm:
        outs = llm.generate(prompts, params)
        plain = [out.outputs[0] for out in outs]
        scores = llm.score([out.prompt_token_ids + out.outputs[0].token_ids for out in outs])  # in passes
    noise = max(
        abs(entry[token].logprob - score)
        for one, scored in zip(plain, scores, strict=True)
        for entry, token, score in zip(one.logprobs or [], one.token_ids, scored[-32:], strict=True)
    )
    assert noise < 0.3
    guessing = Speculation(draft=int4("draft"), num_tokens=4) if drafter == "draft" else FIXED_LOOKUP
    with LLM(int4("demo"), slots=8, max_length=256, speculative=guessing) as llm:
        outs = llm.generate(prompts, params)
    assert sum(out.metrics.num_accepted for out in outs) > 40
    parted = 0
    for out, one in zip(outs, plain, strict=True):
        got = out.outputs[0].token_ids
        if got != one.token_ids:
            parted += 1
            place = next(i for i, (a, b) in enumerate(zip(got, one.token_ids, strict=True)) if a != b)
            entry = (one.logprobs or [])[place]
            assert entry[one.token_ids[place]].logprob - entry[got[place]].logprob <= 2 * noise
    assert parted <= 10  # of 40


PROMPT = "ROMEO:\nO, she doth teach the torches to burn bright! O, she doth"
SAMPLES, TOGETHER = 20_480, 64


@pytest.fixture(scope="module")
def triples(demo: Path, draft: Path) -> Callable[[str, float], Counter[tuple[int, ...]]]:
    """(who guesses, temperature) -> how often each run of three tokens begins one of 20,480 outputs; counted once."""

    @cache
    def count(drafter: str, temperature: float) -> Counter[tuple[int, ...]]:
        guessing = {"plain": None, "draft": Speculation(draft=draft, num_tokens=3), "lookup": FIXED_LOOKUP}[drafter]
        seen: Counter[tuple[int, ...]] = Counter()
        judged = stood = 0
        first = {"plain": 1, "draft": 2, "lookup": 3}[drafter] * 10_000_000
        with LLM(demo, slots=TOGETHER, max_length=64, speculative=guessing) as llm:
            for seed in range(first, first + SAMPLES, TOGETHER):
                params = SamplingParams(
                    temperature=temperature, top_p=0.9, max_tokens=4, n=TOGETHER, ignore_eos=True, seed=seed
                )
                [out] = llm.generate(PROMPT, params)
                seen.update(tuple(o.token_ids[:3]) for o in out.outputs)
                judged, stood = judged + out.metrics.num_drafted, stood + out.metrics.num_accepted
        assert guessing is None or 0.02 < stood / judged < 0.98  # both ways of a token are tried
        return seen

    return count


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("drafter", ["draft", "lookup"])
def test_the_distribution_is_that_of_plain_sampling(
    drafter: str,
    temperature: float,
    triples: Callable[[str, float], Counter[tuple[int, ...]]],
    record_property: Callable[[str, object], None],
) -> None:
    """The first three tokens of 20,480 outputs of each, compared as two samples (chi-square)."""
    counts = [triples("plain", temperature), triples(drafter, temperature)]
    often = [triple for triple in counts[0] | counts[1] if counts[0][triple] + counts[1][triple] >= 20]
    table = np.array([[count[triple] for triple in often] for count in counts])
    rest = SAMPLES - table.sum(axis=1, keepdims=True)
    found = chi2_contingency(np.hstack([table, rest]))
    record_property("chi_square", f"p {found.pvalue:.3f}, {found.dof} degrees of freedom")
    assert found.pvalue > 0.01
