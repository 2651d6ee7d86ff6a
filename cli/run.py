"""`llmx run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import load, model_options, read_prompt, speculation_options
from llmx.cli.conversation import opening, show, template_arguments, template_options
from llmx.cli.profile import profile_option
from llmx.cli.sampling import GroupedCommand, sampling_options, sampling_params

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(name="run", cls=GroupedCommand)
@model_options
@click.option("--prompt", help="Text to continue [default: standard input].")
@click.option(
    "--prompt-file", type=click.Path(dir_okay=False, path_type=Path), help="A file with the text to continue."
)
@click.option(
    "--audio", type=click.Path(dir_okay=False, path_type=Path), help="A WAV file to transcribe (speech models)."
)
@click.option("--language", help="The language spoken, such as en [default: detected].")
@click.option("--task", default="transcribe", show_default=True, help="transcribe, or translate into English (speech).")
@click.option("--chat", is_flag=True, help="Send the prompt as a user message through the chat template.")
@template_options
@click.option("--tools", type=_FILE, help="A JSON file: a list of functions that the model may call (with --chat).")
@click.option("--prefill", help="What the answer begins with (with --chat).")
@speculation_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming.")
@click.option("--logprobs", type=int, help="Put each token's log-probability, and the N likeliest, into the JSON.")
@click.option("--prompt-logprobs", type=int, help="The same for the prompt's tokens.")
@click.option("--quiet", is_flag=True, help="Do not print the timings.")
@profile_option
def command(
    prompt: str | None,
    prompt_file: Path | None,
    audio: Path | None,
    language: str | None,
    task: str,
    chat: bool,
    tools: Path | None,
    prefill: str | None,
    as_json: bool,
    logprobs: int | None,
    prompt_logprobs: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue a prompt, streaming to the terminal; timings go to standard error.

    \b
    Examples:
      llmx run --onnx artifacts/demo --prompt "ROMEO:"
      llmx run --onnx artifacts/demo --prompt "ROMEO:" --temperature 0 -n 64
      echo "Once upon a time" | llmx run --onnx artifacts/demo --json
      llmx run --onnx artifacts/demo --chat --prompt "What news?" --seed 7
      llmx run --onnx artifacts/demo --draft artifacts/draft --prompt "ROMEO:"
      llmx run --onnx artifacts/qwen --chat --prompt "Is it warm in Rome?" --tools tools.json --json
      llmx run --onnx artifacts/demo --prompt "KING:" --regex "[A-Z ]+[.!?]" --repetition-penalty 1.2
      llmx run --onnx artifacts/whisper --audio speech.wav --language en
      llmx run --onnx artifacts/demo --prompt "ROMEO:" --profile trace.json
    """
    if audio is not None:
        if prompt is not None or prompt_file is not None or chat:
            raise click.UsageError("Give --audio or a prompt, not both.")
        _transcribe(audio, language, task, as_json, options)
        return
    if language is not None:
        raise click.UsageError("--language goes with --audio.")
    text = read_prompt(prompt, prompt_file)
    params = sampling_params(options, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    for name, value in (("logprobs", logprobs), ("prompt-logprobs", prompt_logprobs)):
        if value is not None and not as_json:
            raise click.UsageError(f"--{name} goes with --json.")
    if not text:
        raise click.UsageError("The prompt is empty; give at least one character.")
    arguments = template_arguments(options, tools)
    if not chat and (arguments or options["system"] or prefill):
        raise click.UsageError("--system, --tools, --documents, --chat-template and --prefill go with --chat.")
    llm = load(options)
    with llm:
        request = None
        if chat:
            messages = [*opening(options), {"role": "user", "content": text}]
            if prefill:
                messages.append({"role": "assistant", "content": prefill})
            request = llm.chat_request(messages, continue_final_message=bool(prefill), **arguments)
        if options["max_length"] is None and not quiet and not as_json:
            click.echo(
                f"Context: {llm.max_length:,} of {llm.manifest.model.context_length:,} positions (--max-length).",
                err=True,
            )
        if as_json:
            _print_json(llm.generate([text], params)[0] if request is None else llm.answer(request, params))
        elif request is None:
            _timings(_stream(llm.stream(text, params), params.n), quiet)
        elif params.n == 1:
            _timings(show(llm.answer(request, params, stream=True)), quiet)
        else:
            _timings(_stream(llm.stream(request.token_ids, request.params(params)), params.n), quiet)


def _transcribe(audio: Path, language: str | None, task: str, as_json: bool, options: dict[str, Any]) -> None:
    with load(options, slots=4) as llm:
        transcript = llm.transcribe(audio, sampling_params(options), language=language, task=task)
    if as_json:
        result = {"text": transcript.text, "language": transcript.language, "windows": len(transcript.outputs)}
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        click.echo(transcript.text)


def _stream(pieces: Any, count: int = 1) -> Any:
    """Show outputs as they come, one after the other; those whose turn has not come are held. Returns the metrics."""
    held, ended, current, metrics = [""] * count, [False] * count, 0, None
    _head(current, count)
    for piece in pieces:
        held[piece.index] += piece.text
        ended[piece.index] |= piece.finish_reason is not None
        metrics = piece.metrics or metrics
        while current < count:
            sys.stdout.write(held[current])
            sys.stdout.flush()
            held[current] = ""
            if not ended[current]:
                break
            sys.stdout.write("\n")
            current += 1
            _head(current, count)
    if current < count:
        sys.stdout.write("\n")
    sys.stdout.flush()
    return metrics


def _head(index: int, count: int) -> None:
    if 1 < count > index:
        click.echo(f"[{index + 1} of {count}]", err=True)


def _timings(metrics: Any, quiet: bool) -> None:
    if metrics is not None and not quiet:
        click.echo(
            f"{metrics.num_prompt_tokens} prompt tokens, first token after {metrics.ttft * 1e3:.0f} ms; "
            f"{metrics.num_output_tokens} tokens at {metrics.decode_tokens_per_second:.1f} tokens/s",
            err=True,
        )
        if metrics.num_verifications:
            click.echo(
                f"{metrics.num_accepted} of {metrics.num_drafted} guesses stood, "
                f"{metrics.mean_accepted_length:.2f} tokens a pass",
                err=True,
            )


def _logprobs(token_ids: list[int], entries: list[Any]) -> list[list[dict[str, Any]] | None]:
    """For each token the tokens that were looked at, the one that stands there first; None where nothing precedes it."""
    rows: list[list[dict[str, Any]] | None] = []
    for token, known in zip(token_ids, entries, strict=True):
        if known is None:
            rows.append(None)
            continue
        ids = [token, *(other for other in known if other != token)]
        rows.append(
            [
                {"token_id": i, "token": known[i].decoded_token, "logprob": known[i].logprob, "rank": known[i].rank}
                for i in ids
            ]
        )
    return rows


def _fields(result: Any) -> dict[str, Any]:
    """An output in the JSON."""
    return {
        "text": result.text,
        **({} if result.message is None else {"message": result.message.to_dict()}),
        "token_ids": result.token_ids,
        **({} if result.logprobs is None else {"logprobs": _logprobs(result.token_ids, result.logprobs)}),
        **({} if result.cumulative_logprob is None else {"cumulative_logprob": result.cumulative_logprob}),
        **({} if result.score is None else {"score": result.score}),
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
    }


def _print_json(output: Any) -> None:
    """The first output's fields, and those of all where there are several."""
    metrics, given = output.metrics, output.prompt_logprobs
    speculation = {
        "drafted_tokens": metrics.num_drafted,
        "accepted_tokens": metrics.num_accepted,
        "mean_accepted_length": round(metrics.mean_accepted_length, 3),
    }
    click.echo(
        json.dumps(
            {
                "prompt": output.prompt,
                **_fields(output.outputs[0]),
                **({"outputs": [_fields(result) for result in output.outputs]} if len(output.outputs) > 1 else {}),
                **({} if given is None else {"prompt_logprobs": _logprobs(output.prompt_token_ids, given)}),
                "usage": {"prompt_tokens": metrics.num_prompt_tokens, "completion_tokens": metrics.num_output_tokens},
                **({"speculation": speculation} if metrics.num_verifications else {}),
                "time_to_first_token_s": round(metrics.ttft, 6),
                "decode_tokens_per_second": round(metrics.decode_tokens_per_second, 2),
            },
            ensure_ascii=False,
        )
    )
