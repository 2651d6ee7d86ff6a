"""Options for sampling, stopping and the output's form, in groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import read_file
from llmx.runtime.params import SamplingParams


class GroupedOption(click.Option):
    """An option that `--help` lists under a heading of its own."""

    def __init__(self, *args: Any, group: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose `--help` has a section for each group of options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(param.group if isinstance(param, GroupedOption) else "Options", []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _option(group: str, *names: str, **more: Any) -> Callable[..., Any]:
    return click.option(*names, cls=GroupedOption, group=group, **more)


_S, _P, _E, _F = "Sampling", "Penalties and bans", "Ending", "Form of the output"
_FILE = click.Path(dir_okay=False, path_type=Path)

_OPTIONS = [
    _option(_S, "--temperature", type=float, help="0 is greedy [default: the package's]."),
    _option(_S, "--top-k", type=int, help="Sample from the K most likely tokens."),
    _option(_S, "--top-p", type=float, help="Sample from the most likely tokens that make up this probability."),
    _option(_S, "--min-p", type=float, help="Drop tokens less likely than this part of the likeliest."),
    _option(_S, "--typical-p", type=float, help="Sample from the tokens of typical surprise, up to this probability."),
    _option(_S, "--epsilon-cutoff", type=float, help="Drop tokens less likely than this."),
    _option(_S, "--eta-cutoff", type=float, help="The same, with a cut-off that falls with the entropy."),
    _option(_S, "--top-n-sigma", type=float, help="Drop logits this many standard deviations below the largest."),
    _option(_S, "--seed", type=int, help="Make the draws repeatable."),
    _option(_S, "--n", type=int, default=1, show_default=True, help="Outputs of the prompt."),
    _option(_S, "--best-of", type=int, help="Draw so many and show the N most likely."),
    _option(_S, "--num-beams", type=int, help="Beams of a beam search [default: the package's, else none]."),
    _option(_S, "--length-penalty", type=float, help="Above 0 a beam search favours longer outputs."),
    _option(
        _S,
        "--early-stopping",
        type=click.Choice(["true", "false", "never"]),
        help="When a beam search ends [default: false].",
    ),
    _option(_P, "--repetition-penalty", type=float, help="Above 1: tokens of prompt and output become less likely."),
    _option(_P, "--presence-penalty", type=float, help="Taken off the logits of tokens in the output (-2 to 2)."),
    _option(_P, "--frequency-penalty", type=float, help="The same for each time that they are there (-2 to 2)."),
    _option(_P, "--no-repeat-ngram-size", type=int, help="No run of N tokens comes twice."),
    _option(_P, "--logit-bias", multiple=True, metavar="ID=BIAS", help="Add to a token's logit (several times)."),
    _option(_P, "--allowed-token-ids", metavar="ID,ID,…", help="Only these tokens may come."),
    _option(
        _P, "--bad-words", "--bad-word", multiple=True, metavar="TEXT", help="A text that may not come (several times)."
    ),
    _option(
        _P,
        "--bad-words-ids",
        multiple=True,
        metavar="ID,ID,…",
        help="Tokens that may not come in a row (several times).",
    ),
    _option(_P, "--suppress-tokens", metavar="ID,ID,…", help="Tokens that may not come."),
    _option(_P, "--begin-suppress-tokens", metavar="ID,ID,…", help="Tokens that may not come first."),
    _option(_E, "-n", "--max-tokens", type=int, help="Most tokens to generate [default: the package's, else 256]."),
    _option(_E, "--min-tokens", type=int, help="No end before this many tokens."),
    _option(_E, "--max-time", type=float, help="Most seconds to take."),
    _option(_E, "--stop", multiple=True, help="End at this text (may be given several times)."),
    _option(
        _E, "--stop-token-ids", "--stop-token-id", multiple=True, metavar="ID,ID,…", help="End at one of these tokens."
    ),
    _option(_E, "--include-stop-str-in-output", is_flag=True, help="Keep the text of --stop that ended the output."),
    _option(_E, "--ignore-eos", is_flag=True, help="Go on past the model's end tokens."),
    _option(_F, "--json-schema", type=_FILE, help="JSON that follows the schema in this file."),
    _option(_F, "--json-object", is_flag=True, help="Any JSON object."),
    _option(_F, "--regex", help="Text that the whole regular expression matches."),
    _option(_F, "--choice", multiple=True, help="One of these texts (give it several times)."),
    _option(_F, "--grammar", type=_FILE, help="Text of the Lark or GBNF grammar in this file."),
    _option(_F, "--disable-any-whitespace", is_flag=True, help="JSON without spaces between its signs."),
    _option(_F, "--disable-additional-properties", is_flag=True, help="No properties that the schema does not name."),
    _option(_F, "--whitespace-pattern", metavar="REGEX", help="The spaces that JSON may have at one place."),
    _option(
        _F, "--skip-special-tokens/--no-skip-special-tokens", default=True, help="Leave special tokens out of the text."
    ),
    _option(_F, "--keep-special-tokens", metavar="ID,ID,…", help="Special tokens that stay in the text."),
]

#: Options that are a SamplingParams field under its own name.
_FIELDS = (
    "n", "best_of", "max_tokens", "min_tokens", "max_time", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "top_n_sigma", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "no_repeat_ngram_size", "ignore_eos", "num_beams", "length_penalty", "include_stop_str_in_output",
    "skip_special_tokens",
)  # fmt: skip
#: Options that are a field of StructuredOutputsParams under its own name.
_DETAILS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
#: Options that are a list of token ids.
_LISTS = ("allowed_token_ids", "suppress_tokens", "begin_suppress_tokens")


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sampling parameters; None leaves the package's default. The command's class is `GroupedCommand`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def sampling_params(options: dict[str, Any], **more: Any) -> SamplingParams:
    """The SamplingParams of `sampling_options`. Raises RequestError or click.UsageError."""
    early = options["early_stopping"]
    lists: dict[str, Any] = {name: options[name] and _ids(name, options[name]) for name in _LISTS}
    words = [_ids("bad_words_ids", text) for text in options["bad_words_ids"]]
    return SamplingParams(
        stop=list(options["stop"]),
        stop_token_ids=[token for text in options["stop_token_ids"] for token in _ids("stop_token_ids", text)],
        logit_bias=dict(_bias(text) for text in options["logit_bias"]),
        bad_words=list(options["bad_words"]),
        bad_words_ids=words or None,
        keep_special_tokens=_ids("keep_special_tokens", options["keep_special_tokens"] or ""),
        early_stopping={"true": True, "false": False}.get(early, early),
        structured_outputs=_form(options),
        **lists,
        **{name: options[name] for name in _FIELDS},
        **more,
    )


def _ids(name: str, text: str) -> list[int]:
    return [_number(int, f"--{name.replace('_', '-')}", part) for part in text.split(",")] if text else []


def _bias(text: str) -> tuple[int, float]:
    token, found, bias = text.partition("=")
    if not found:
        raise click.UsageError(f"--logit-bias must be ID=BIAS, such as 17=-5, and is {text!r}.")
    return _number(int, "--logit-bias", token), _number(float, "--logit-bias", bias)


def _number(kind: Callable[[str], Any], name: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise click.UsageError(f"{name} takes numbers, and {text.strip()!r} is none.") from None


def _form(options: dict[str, Any]) -> dict[str, Any] | None:
    schema, grammar = options["json_schema"], options["grammar"]
    form: dict[str, Any] = {
        "json": _schema(schema) if schema is not None else None,
        "json_object": options["json_object"] or None,
        "regex": options["regex"],
        "choice": list(options["choice"]) or None,
        "grammar": read_file(grammar, "grammar") if grammar is not None else None,
    }
    given = {name: value for name, value in form.items() if value is not None}
    if len(given) > 1:
        raise click.UsageError("Give one of --json-schema, --json-object, --regex, --choice and --grammar.")
    details = {name: options[name] for name in _DETAILS if options[name]}
    if details and not given:
        raise click.UsageError(f"--{next(iter(details)).replace('_', '-')} goes with --json-schema or --json-object.")
    return {**given, **details} or None


def _schema(file: Path) -> Any:
    try:
        return json.loads(read_file(file, "schema"))
    except ValueError as error:
        raise click.UsageError(f"The schema file {file} is no JSON: {error}.") from None
