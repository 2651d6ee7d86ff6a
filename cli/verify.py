"""`llmx verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import print_table, reason, status
from llmx.runtime.errors import MissingDependencyError, RequestError


@click.command(name="verify")
@click.option("--onnx", required=True, metavar="DIR_OR_HUB_ID", help="The package to compare.")
@click.option("--model", required=True, metavar="DIR_OR_HUB_ID", help="The checkpoint that it was exported from.")
@click.option("--adapter", type=click.Path(path_type=Path), help="The PEFT LoRA folder that was merged in.")
@click.option("--revision", help="Branch, tag or commit of the checkpoint's hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option(
    "--text-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also compare the perplexity of both on this UTF-8 text (encoder-decoders: lines of source, tab, target).",
)
@click.option("--tokens", type=click.IntRange(2), default=2048, show_default=True, help="Tokens of the text to read.")
@click.option(
    "--prompts", type=click.IntRange(1, 64), default=5, show_default=True, help="Random prompts, run at once."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random prompts.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    help="Largest difference, as a part of the largest logit [default: fp32 1e-4, fp16 1e-2].",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads [default: the CPUs this process may use].")
@click.option("--integrity", is_flag=True, help="Also check the sha256 of every file of the package.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(context: click.Context, text_file: Path | None, as_json: bool, **options: Any) -> None:
    """Compare a package with its PyTorch source: logits, tokens, perplexity. Exits with 1 where they differ.

    \b
    Examples:
      llmx verify --onnx artifacts/demo --model artifacts/checkpoints/demo
      llmx verify --onnx artifacts/smollm2 --model HuggingFaceTB/SmolLM2-135M --text-file book.txt --json
    """
    text = _text(text_file)
    _need_torch()
    from llmx.export.compare import compare
    from llmx.export.pair import CompareOptions

    with status(f"Comparing {options['onnx']} with {options['model']}") as spinner:
        report = compare(CompareOptions(text=text, **options), spinner.update)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        print_table(["", "value"], [[label, value] for label, value in _rows(report)])
        click.echo(_verdict(report))
    if not report.passed:
        context.exit(1)


def _text(file: Path | None) -> str | None:
    try:
        return file.read_text(encoding="utf-8") if file is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"The text file {file} cannot be read as text: {reason(error)}.") from None


def _need_torch() -> None:
    from llmx.runtime.providers import is_installed

    missing = [name for name in ("torch", "transformers", "onnx_ir", "onnxruntime") if not is_installed(name)]
    if missing:
        extra = "export,cpu" if "onnxruntime" in missing else "export"
        raise MissingDependencyError(f'Verifying needs {", ".join(missing)}: pip install "llmx[{extra}]".')


def _rows(report: Any) -> list[tuple[str, str]]:
    """The report as (label, value)."""
    out, unit = report.outputs, report.compared
    rows = [
        ("package", report.onnx),
        ("source", report.model),
        ("kind", f"{report.family}, {report.dtype}"),
        *_differences(out, unit, report.graph),
        (f"mean difference of {unit}", f"{out['mean_abs_diff']:.3g}"),
    ]
    if "mean_kl" in out:
        rows += [
            ("KL(PyTorch‖ONNX)", f"mean {out['mean_kl']:.3g}, max {out['max_kl']:.3g} nats"),
            ("best tokens equal", f"{out['argmax_agreement']:.2%}"),
        ]
    else:
        rows.append(("cosine", f"mean {out['mean_cosine']:.7f}, min {out['min_cosine']:.7f}"))
    if report.generation is not None:
        rows.append(("greedy tokens equal", _generation(report.generation)))
    if report.perplexity is not None:
        p = report.perplexity
        read = (
            f"of {p['targets']:,} targets" if "targets" in p else f"windows of {p['window']:,}, stride {p['stride']:,}"
        )
        over = f"over {p['tokens']:,} tokens ({read})"
        rows.append(("perplexity", f"{p['onnx']:.4f} ONNX, {p['pytorch']:.4f} PyTorch {over}"))
    return rows


def _differences(out: dict[str, Any], unit: str, graph: dict[str, Any] | None) -> list[tuple[str, str]]:
    """How many positions were compared and the largest difference; `graph`: of a quantized package's graph alone."""
    if graph is None:
        return [
            ("positions", f"{out['positions']:,} compared, {out['positions_past_tolerance']:,} past the tolerance"),
            (f"max difference of {unit}", f"{out['max_abs_diff']:.3g} (allowed {out['allowed']:.3g})"),
        ]
    past = f"{graph['positions_past_tolerance']:,} of {graph['positions']:,} positions past the tolerance"
    return [
        (
            "graph",
            f"max difference {graph['max_abs_diff']:.3g} with its own weights (allowed {graph['allowed']:.3g}); {past}",
        ),
        ("positions", f"{out['positions']:,} compared with the source as it is"),
        (f"max difference of {unit}", f"{out['max_abs_diff']:.3g}"),
    ]


def _generation(facts: dict[str, Any]) -> str:
    lengths = facts["prompt_lengths"]
    text = f"{facts['agreement']:.2%}, {facts['identical_rows']} of {len(lengths)} rows in one ragged batch"
    first = facts["first_difference"]
    if first is None:
        return text
    kind = "a tie" if first["tie"] else f"PyTorch's leads by {first['lead']:.3g}"
    return f"{text}; row {first['row']}, token {first['token']}: {first['onnx']} for {first['pytorch']} ({kind})"


def _verdict(report: Any) -> str:
    if report.passed:
        what = "its source" if report.graph is None else "PyTorch with its own weights"
        return f"Passed: the package equals {what} within {report.tolerance:g} of the largest value."
    return " ".join(part for part in (f"Failed: {report.reason}", report.parting) if part)
