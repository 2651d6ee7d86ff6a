"""Every sampling option of `llmx run` reaches SamplingParams; `llmx perplexity`."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from llmx.cli import main
from llmx.cli.sampling import GroupedCommand, sampling_options, sampling_params
from llmx.runtime import LLM, SamplingParams, StructuredOutputsParams


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)


def params(*arguments: object) -> SamplingParams:
    """What options make of them."""
    import click

    found: list[SamplingParams] = []

    @click.command(cls=GroupedCommand)
    @sampling_options
    def command(**options: Any) -> None:
        found.append(sampling_params(options))

    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return found[0]


def test_nothing_given_is_the_default() -> None:
    assert params() == SamplingParams()


def test_every_option(tmp_path: Path) -> None:
    got = params(
        "--temperature", 0.5, "--top-k", 4, "--top-p", 0.9, "--min-p", 0.1, "--typical-p", 0.8, "--epsilon-cutoff", 0.01,
        "--eta-cutoff", 0.02, "--top-n-sigma", 1.5, "--seed", 7, "--repetition-penalty", 1.2, "--presence-penalty", -0.5,
        "--frequency-penalty", 0.25, "--no-repeat-ngram-size", 3, "--logit-bias", "7=-2.5", "--logit-bias", "3=1",
        "--allowed-token-ids", "1, 2,3", "--bad-word", "one", "--bad-word", "two words", "-n", 9, "--min-tokens", 2,
        "--max-time", 1.5, "--stop", "a", "--stop", "b", "--stop-token-ids", "4,5", "--stop-token-id", 6, "--ignore-eos",
        "--n", 2, "--best-of", 3, "--bad-words-ids", "4,5", "--bad-words-ids", 6, "--suppress-tokens", "7,8",
        "--begin-suppress-tokens", 9, "--keep-special-tokens", "1,2", "--include-stop-str-in-output",
        "--no-skip-special-tokens",
    )  # fmt: skip
    assert got == SamplingParams(
        temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, typical_p=0.8, epsilon_cutoff=0.01, eta_cutoff=0.02, top_n_sigma=1.5,
        seed=7, repetition_penalty=1.2, presence_penalty=-0.5, frequency_penalty=0.25, no_repeat_ngram_size=3,
        logit_bias={7: -2.5, 3: 1}, allowed_token_ids=[1, 2, 3], bad_words=["one", "two words"], max_tokens=9, min_tokens=2,
        max_time=1.5, stop=["a", "b"], stop_token_ids=[4, 5, 6], ignore_eos=True, n=2, best_of=3,
        bad_words_ids=[[4, 5], [6]], suppress_tokens=[7, 8], begin_suppress_tokens=[9], keep_special_tokens=[1, 2],
        include_stop_str_in_output=True, skip_special_tokens=False,
    )  # fmt: skip
    beams = params("--num-beams", 4, "--n", 2, "--length-penalty", 0.5, "--early-stopping", "never")
    assert beams == SamplingParams(num_beams=4, n=2, length_penalty=0.5, early_stopping="never")
    assert params("--early-stopping", "true") == SamplingParams(early_stopping=True)
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    (tmp_path / "grammar.lark").write_text('start: "a"')
    forms: list[tuple[list[object], dict[str, Any]]] = [
        (["--json-schema", tmp_path / "schema.json"], {"json": {"type": "integer"}}),
        (["--json-object"], {"json_object": True}),
        (["--regex", "a+"], {"regex": "a+"}),
        (["--choice", "yes", "--choice", "no"], {"choice": ["yes", "no"]}),
        (["--grammar", tmp_path / "grammar.lark"], {"grammar": 'start: "a"'}),
    ]
    for arguments, form in forms:
        assert params(*arguments) == SamplingParams(structured_outputs=form)
    details = ("--disable-any-whitespace", "--disable-additional-properties", "--whitespace-pattern", " ?")
    assert params("--json-object", *details) == SamplingParams(
        structured_outputs={
            "json_object": True, "disable_any_whitespace": True, "disable_additional_properties": True,
            "whitespace_pattern": " ?",
        }
    )  # fmt: skip


def test_every_field_has_an_option() -> None:
    """Of SamplingParams and StructuredOutputsParams, but for what other options of `llmx run` say."""
    text = run("run", "--help").stdout
    others = {"structured_outputs", "logprobs", "prompt_logprobs", "json", "choice", "grammar"}
    for kind in (SamplingParams, StructuredOutputsParams):
        for field in fields(kind):
            assert field.name in others or f"--{field.name.replace('_', '-')}" in text, field.name
    assert all(
        option in text for option in ("--logprobs", "--prompt-logprobs", "--json-schema", "--choice", "--grammar")
    )


def test_help_groups_the_options() -> None:
    for command in ("run", "chat"):
        text = run(command, "--help").stdout
        places = [text.index(f"\n{heading}:\n") for heading in ("Options", "Sampling", "Penalties and bans", "Ending", "Form of the output")]  # fmt: skip
        assert places == sorted(places)
        assert text.rindex("--repetition-penalty") > places[2] > text.rindex("--top-p")


def test_run_with_penalties_and_a_form(demo: Path) -> None:
    common = ("run", "--onnx", demo, "--prompt", "KING:", "--json", "--seed", 3, "-n", 30)
    shaped = json.loads(run(*common, "--regex", "[a-z]{2,5} [0-9]{2}!").stdout)
    assert re.fullmatch("[a-z]{2,5} [0-9]{2}!", shaped["text"])
    assert shaped["finish_reason"] == "stop"
    noted = json.loads(run(*common, "--temperature", 0, "--repetition-penalty", 1.5, "--logprobs", 2).stdout)
    assert len(noted["logprobs"]) == len(noted["token_ids"]) == 30
    for token, entries in zip(noted["token_ids"], noted["logprobs"], strict=True):
        assert entries[0]["token_id"] == token
        assert {entry["rank"] for entry in entries} >= {1, 2}
        assert all(entry["logprob"] <= 0 for entry in entries)
    assert noted["text"] != json.loads(run(*common, "--temperature", 0).stdout)["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logit-bias", "7"], "--logit-bias must be ID=BIAS, such as 17=-5, and is '7'"),
        (["--logit-bias", "x=1"], "--logit-bias takes numbers, and 'x' is none"),
        (["--logit-bias", "3=500"], "each value of logit_bias must be a number from -100 to 100"),
        (["--logit-bias", "99999=1"], "logit_bias must lie between 0 and 1023"),
        (["--allowed-token-ids", "1,two"], "--allowed-token-ids takes numbers, and 'two' is none"),
        (["--repetition-penalty", "0"], "repetition_penalty must be a number above 0"),
        (
            ["--regex", "a", "--json-object"],
            "Give one of --json-schema, --json-object, --regex, --choice and --grammar",
        ),
        (["--json-schema", "/nowhere/x.json"], "The schema file /nowhere/x.json cannot be read"),
        (["--regex", "(a"], "structured_outputs cannot be compiled: "),
        (["--logprobs", "2"], "--logprobs goes with --json"),
        (["--max-time", "0"], "max_time must be a number above 0"),
    ],
)
def test_bad_options(demo: Path, options: list[str], message: str) -> None:
    result = run("run", "--onnx", demo, "--prompt", "x", *options)
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ") and message in last


def test_perplexity_command(demo: Path, tmp_path: Path) -> None:
    text = "ROMEO:\nWhat news? the gentle night goes on and the king is not at home.\n" * 12
    file = tmp_path / "text.txt"
    file.write_text(text)
    with LLM(demo, slots=1) as llm:
        whole = llm.perplexity(text)
        small = llm.perplexity(text, max_length=64, stride=16)
    found = json.loads(run("perplexity", "--onnx", demo, "--text-file", file, "--json").stdout)
    assert found["perplexity"] == pytest.approx(whole.perplexity)
    assert found["num_tokens"] == whole.num_tokens
    told = run("perplexity", "--onnx", demo, "--window", 64, "--stride", 16, stdin=text)
    assert told.stdout.startswith(
        f"Perplexity {small.perplexity:.4f} over {small.num_tokens:,} tokens (windows of 64, "
    )
    assert run("perplexity", "--onnx", demo, "--text-file", tmp_path / "none").exit_code == 2
    assert "perplexity needs two" in run("perplexity", "--onnx", demo, stdin="a").stderr


def test_several_outputs(demo: Path) -> None:
    common = ("run", "--onnx", demo, "--prompt", "KING:", "--seed", 3, "--temperature", 0.9, "-n", 8)
    whole = json.loads(run(*common, "--json", "--n", 3, "--logprobs", 0, "--prompt-logprobs", 1).stdout)
    assert [len(output["token_ids"]) for output in whole["outputs"]] == [8, 8, 8]
    assert whole["prompt_logprobs"][0] is None and len(whole["prompt_logprobs"][1]) >= 1
    best = json.loads(run(*common, "--json", "--best-of", 3).stdout)
    assert best["text"] == max(whole["outputs"], key=lambda output: output["cumulative_logprob"])["text"]
    shown = run(*common, "--n", 3)
    assert shown.stdout == "".join(output["text"] + "\n" for output in whole["outputs"])
    assert [f"[{i} of 3]" in shown.stderr for i in (1, 2, 3)] == [True] * 3
    beams = json.loads(
        run("run", "--onnx", demo, "--prompt", "KING:", "--num-beams", 3, "--n", 2, "-n", 8, "--json").stdout
    )
    assert beams["score"] == beams["outputs"][0]["score"] >= beams["outputs"][1]["score"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--best-of", 2, "--n", 3), "best_of (2) must not be below n (3)"),
        (("--num-beams", 2, "--best-of", 3), "num_beams and best_of do not go together"),
        (("--suppress-tokens", "x"), "--suppress-tokens takes numbers, and 'x' is none"),
        (("--suppress-tokens", "9999999"), "suppress_tokens must lie between 0 and"),
        (("--early-stopping", "maybe"), "Invalid value for '--early-stopping'"),
        (("--whitespace-pattern", " ?"), "--whitespace-pattern goes with --json-schema or --json-object"),
        (("--num-speculative-tokens", 3), "--num-speculative-tokens goes with --draft or --prompt-lookup"),
        (("--prompt-lookup", "--num-speculative-tokens", 0), "num_tokens must be a whole number from 1 to 64"),
        (("--prompt-logprobs", 3), "--prompt-logprobs goes with --json"),
    ],
)
def test_what_is_refused(demo: Path, arguments: tuple[object, ...], message: str) -> None:
    result = run("run", "--onnx", demo, "--prompt", "KING:", *arguments)
    assert result.exit_code != 0 and message in result.stderr
