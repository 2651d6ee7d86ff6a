"""`llmx export`."""

from __future__ import annotations

import atexit
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import quality_sentence
from llmx.cli.signals import termination_interrupts
from llmx.runtime.errors import MissingDependencyError
from llmx.runtime.units import human_bytes


@click.command(name="export")
@click.option("--model", required=True, metavar="DIR_OR_HUB_ID", help="A checkpoint folder, or a hub id like org/name.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the package [default: artifacts/<name>].")
@click.option(
    "--target", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="The provider to build for."
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Of weights, computation and state [default: fp32 on cpu, on cuda the checkpoint's, fp16 for fp32 ones].",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="Store weights block-wise in 8 or 4 bits (docs/quantization.md).",
)
@click.option(
    "--quantize-block-size", type=int, help="Values that share a scale: 16, 32, 64, 128 or 256 [default: 64]."
)
@click.option("--quantize-asymmetric", is_flag=True, help="Give each block a zero point: finer, and slightly larger.")
@click.option(
    "--quantize-head",
    type=click.Choice(["int8", "int4", "none"]),
    help="Of the output head and the embedding [default: int8].",
)
@click.option(
    "--quantize-exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave modules of this name as they are, e.g. *.o_proj.",
)
@click.option(
    "--quantize-method",
    type=click.Choice(["rtn", "gptq"]),
    help="Round to nearest, or so that layers' outputs on a calibration text change least [default: rtn].",
)
@click.option(
    "--quantize-prompts",
    type=click.Choice(["auto", "int8", "same"]),
    default="auto",
    show_default=True,
    help="Prompts of a quantized package multiply with an int8 copy of the layers (a byte a weight), or with the same weights as decoding.",
)
@click.option(
    "--calibration-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="UTF-8 text for gptq [default: text that the model writes].",
)
@click.option(
    "--quality-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="UTF-8 text on which to measure what quantization costs [default: text that the model writes].",
)
@click.option(
    "--task",
    type=click.Choice(["auto", "generate", "embed", "classify", "token-classify", "fill-mask"]),
    default="auto",
    show_default=True,
    help="What to export the model for [auto: what its files say].",
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "cls", "lasttoken", "max", "mean_sqrt_len", "weightedmean"]),
    help="How an embedding model makes one vector of its tokens' [default: modules.json, else mean].",
)
@click.option("--max-length", type=int, help="Shorten the context [default: the model's].")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--adapter", type=click.Path(path_type=Path), help="A PEFT LoRA folder to merge in.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model.")
@click.option("--force", is_flag=True, help="Replace a package at the output.")
@click.option("--with-hidden-states", is_flag=True, help="Let LLM.hidden_states work on a model that generates.")
@click.option("--no-verify", is_flag=True, help="Skip the comparison with PyTorch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def command(as_json: bool, no_verify: bool, **options: Any) -> None:
    """Export a Hugging Face language model or encoder to a package of ONNX graphs, and verify it against PyTorch.

    \b
    Examples:
      llmx export --model artifacts/checkpoints/demo
      llmx export --model HuggingFaceTB/SmolLM2-135M --output artifacts/smollm2 --quantize int4
      llmx export --model sentence-transformers/all-MiniLM-L6-v2 --output artifacts/minilm
      llmx export --model ./llama --adapter ./lora --target cuda --dtype bf16
    """
    _need_torch()
    from rich.console import Console

    # Importing and exporting make millions of objects that live to the end: the collector would walk them in vain, and
    # again at exit.
    gc.disable()
    atexit.register(gc.freeze)
    console = Console(stderr=True, quiet=as_json)
    with termination_interrupts(), _progress(console) as reporter:
        result = _export(reporter, verify=not no_verify, **options)
    for warning in result.warnings:
        click.echo(f"Warning: {warning}", err=True)
    manifest = result.manifest
    size = sum(info.size for info in manifest.files.values())
    seconds = sum(result.seconds.values())
    if as_json:
        summary = {
            "path": str(result.path),
            "bytes": size,
            "parameters": manifest.model.parameters,
            "dtype": manifest.dtype,
            "quantization": manifest.quantization,
            "target": manifest.target,
            "verification": manifest.verification.__dict__,
            "seconds": {k: round(v, 3) for k, v in result.seconds.items()},
        }
        click.echo(json.dumps(summary))
        return
    check = manifest.verification
    verdict = (
        f"verified against PyTorch at {check.positions} positions: logits differ by at most {check.max_abs_diff:.1e}"
        if check.status == "passed"
        else "not verified"
    )
    kept = f"int{manifest.quantization['bits']} weights" if manifest.quantization else manifest.dtype
    click.echo(
        f"{result.path}: {manifest.model.parameters:,} parameters, {kept}, {human_bytes(size)}, {seconds:.1f} s; {verdict}."
    )
    if manifest.quantization and "quality" in manifest.quantization:
        click.echo(quality_sentence(manifest.quantization["quality"]))
    hints = {
        "embed": "embed --onnx {} --text …",
        "classify": "classify --onnx {} --text …",
        "token-classify": "classify --onnx {} --text …",
        "fill-mask": "fill-mask --onnx {} --text …",
    }
    task = manifest.encoder.task if manifest.encoder is not None else "generate"
    click.echo("Run it: llmx " + hints.get(task, 'run --onnx {} --prompt "…"').format(result.path))


def _export(reporter: Any, **options: Any) -> Any:
    """Import the exporter and run it. Raises MissingDependencyError where a library is there and does not load."""
    try:
        from llmx.export import ExportOptions, export_model
    except (ImportError, OSError) as error:
        if (getattr(error, "name", None) or "").startswith("llmx"):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MissingDependencyError(
            f"A library that exporting needs is installed but cannot be loaded: {reason}; "
            'pip install --force-reinstall "llmx[export]".'
        ) from None
    quantize = _quantization(options)
    return export_model(ExportOptions(**options, quantize=quantize), reporter)


def _quantization(options: dict[str, Any]) -> Any:
    """The QuantizationOptions of the --quantize options, which are taken out of `options`; None without --quantize."""
    from llmx.export.quantization import QuantizationOptions

    weights = options.pop("quantize")
    given = {
        "block_size": options.pop("quantize_block_size"),
        "symmetric": False if options.pop("quantize_asymmetric") else None,
        "head": options.pop("quantize_head"),
        "exclude": options.pop("quantize_exclude") or None,
        "method": options.pop("quantize_method"),
        "calibration_file": options.pop("calibration_file"),
        "quality_file": options.pop("quality_file"),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if weights is None and given:
        raise click.UsageError("The options of quantization go with --quantize int8 or int4.")
    return QuantizationOptions(weights, **given) if weights is not None else None


def _need_torch() -> None:
    from llmx.runtime.providers import is_installed

    missing = [
        name for name in ("torch", "transformers", "onnx_ir", "onnxscript", "onnxruntime") if not is_installed(name)
    ]
    if missing:
        extra = "export,cpu" if "onnxruntime" in missing else "export"
        raise MissingDependencyError(f'Exporting needs {", ".join(missing)}: pip install "llmx[{extra}]".')


_TITLES = {
    "load": "Reading the checkpoint",
    "calibrate": "Calibrating",
    "trace": "Tracing",
    "rewrite": "Rewriting graphs",
    "write": "Writing weights",
    "verify": "Verifying against PyTorch",
}


class _progress:  # noqa: N801 - used as a function
    """A Reporter: rich bars on a terminal, one plain line a stage elsewhere."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._live = console.is_terminal and not console.quiet
        self._bar: Any = None
        self._task: Any = None
        self._name, self._start = "", 0.0

    def __enter__(self) -> Any:
        if self._live:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
        return self

    def stage(self, name: str) -> None:
        """A new stage begins; the one before is done."""
        self._end()
        self._name, self._start = name, time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task(_TITLES[name], total=None)

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` units of the stage."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def _end(self) -> None:
        if not self._name:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=1, total=1)
        elif not self._console.quiet:
            print(f"{_TITLES[self._name]}: {time.perf_counter() - self._start:.1f} s", file=sys.stderr)
        self._name = ""

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self._end()
        if self._bar is not None:
            self._bar.stop()
