"""`llmx inspect`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
from llmx.cli.common import quality_sentence
from llmx.runtime.units import human_bytes


@click.command(name="inspect")
@click.argument("package", metavar="DIR_OR_HUB_ID")
@click.option("--integrity", is_flag=True, help="Also check the sha256 of every file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(package: str, integrity: bool, as_json: bool) -> None:
    """Show what a package holds: graphs, operators, sizes, state per token and the longest context that fits.

    \b
    Examples:
      llmx inspect artifacts/demo
      llmx inspect artifacts/demo --integrity --json
    """
    from llmx.runtime.hub import resolve_package
    from llmx.runtime.manifest import check_hashes, load_manifest

    folder = resolve_package(package)
    manifest = load_manifest(folder)
    if integrity:
        check_hashes(folder, manifest)
    facts = describe(folder, manifest)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def describe(folder: Path, manifest: Any) -> dict[str, Any]:
    """Everything that the command shows, as plain data."""
    from llmx.runtime.machine import available_memory

    per_token = manifest.state_bytes_per_token()
    fixed = manifest.state_bytes_per_slot()
    free = available_memory()
    layouts = Counter(tensor.layout for tensor in manifest.state)
    windows = sorted({tensor.window for tensor in manifest.state if tensor.window})
    return {
        "path": str(folder),
        "name": manifest.name,
        "family": manifest.family,
        "architecture": manifest.source.get("architecture"),
        "target": manifest.target,
        "dtype": manifest.dtype,
        "quantization": manifest.quantization,
        "parameters": manifest.model.parameters,
        "layers": manifest.model.num_layers,
        "vocabulary": manifest.model.vocab_size,
        "context_length": manifest.model.context_length,
        "encoder": manifest.encoder.__dict__ if manifest.encoder is not None else None,
        "verification": manifest.verification.__dict__,
        "files": {name: info.size for name, info in manifest.files.items()},
        "graphs": {name: operators(folder / graph.file) for name, graph in manifest.graphs.items()},
        "state": {
            "layouts": dict(layouts),
            "windows": windows,
            "bytes_per_token": per_token,
            "bytes_per_slot": fixed,
            "bytes_at_full_context": per_token * manifest.model.context_length + fixed,
        },
        "longest_context_that_fits": min(manifest.model.context_length, free // max(1, per_token)),
        "free_memory": free,
    }


def operators(path: Path) -> dict[str, int]:
    """Operator counts of a graph file, read from its protobuf (no onnx package needed)."""
    from llmx.runtime.protobuf import graph_operators

    return dict(Counter(graph_operators(path.read_bytes())).most_common())


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    head = Table(show_header=False, box=None, pad_edge=False)
    state, check = facts["state"], facts["verification"]
    verified = (
        f"passed, largest difference {check['max_abs_diff']:.2g} (tolerance {check['tolerance']:.2g})"
        if check["status"] == "passed"
        else f"skipped: {check['reason']}"
    )
    rows = [
        ("package", facts["path"]),
        ("model", f"{facts['name']} ({facts['architecture']}, {facts['family']})"),
        ("built for", f"{facts['target']}, {facts['dtype']}"),
        ("parameters", f"{facts['parameters']:,} in {facts['layers']} layers, vocabulary {facts['vocabulary']:,}"),
        ("verified", verified),
    ]
    quantization = facts["quantization"]
    if quantization is not None:
        rows.append(("quantized", _quantized(quantization)))
        if "quality" in quantization:
            rows.append(("quality", quality_sentence(quantization["quality"])))
    encoder = facts["encoder"]
    if encoder is not None:
        rows.append(("task", f"{encoder['task']}, at most {encoder['max_length']:,} tokens"))
        if encoder["dimension"]:
            pooled = f"{', '.join(encoder['pooling'])} pooling{', normalised' if encoder['normalized'] else ''}"
            rows.append(("embeddings", f"{encoder['dimension']} numbers, {pooled}"))
        if encoder["labels"]:
            rows.append(("labels", ", ".join(encoder["labels"])))
    else:
        context, fits = facts["context_length"], facts["longest_context_that_fits"]
        each, full = human_bytes(state["bytes_per_token"]), human_bytes(state["bytes_at_full_context"])
        fixed = f", {human_bytes(state['bytes_per_slot'])} whatever the length" if state["bytes_per_slot"] else ""
        rows += [
            ("context", f"{context:,} positions; {fits:,} fit into {human_bytes(facts['free_memory'])} free"),
            ("state", f"{', '.join(state['layouts'])}; {each} a token{fixed}, {full} at full context"),
            ("windows", ", ".join(map(str, state["windows"])) or "none"),
        ]
    for label, value in rows:
        head.add_row(f"[bold]{label}[/bold]", Text(value))
    console.print(head)
    table = Table("graph", "nodes", "operators")
    for name, counts in facts["graphs"].items():
        table.add_row(name, str(sum(counts.values())), ", ".join(f"{op} {n}" for op, n in counts.items()))
    console.print(table)
    files = Table("file", "size")
    for name, size in facts["files"].items():
        files.add_row(Text(name), human_bytes(size))
    console.print(files)


def _quantized(facts: dict[str, Any]) -> str:
    """Kind and share of the quantized weights in one line."""
    head = (
        f"{facts['head_bits']} bits in head and embedding" if facts["head_bits"] else "head and embedding as they are"
    )
    copy = ", and an int8 copy of the layers for prompts" if facts.get("prompts") == "int8" else ""
    kind = "symmetric" if facts["symmetric"] else "asymmetric"
    return (
        f"{facts['matrices']} matrices of {facts['parameters']:,} values to {facts['bits']} bits in {kind} blocks of "
        f"{facts['block_size']} ({facts['method']}), {head}; {human_bytes(facts['bytes'])}{copy}"
    )
