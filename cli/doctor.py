"""`llmx doctor`."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click
from llmx.runtime.units import human_bytes


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """Show what this machine can run: versions, providers, GPU, memory, what is missing and the fix.

    Exits with 1 when nothing can run a package here.
    """
    facts = examine()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)
    if not facts["can_run"]:
        raise SystemExit(1)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def examine() -> dict[str, Any]:
    """Facts and findings as plain data; each problem carries its fix."""
    from llmx.runtime.machine import available_memory, usable_cpus
    from llmx.runtime.mapped_cache import default_cache_dir
    from llmx.runtime.providers import is_installed

    names = (
        "llmx",
        "onnxruntime",
        "onnxruntime-gpu",
        "tokenizers",
        "numpy",
        "torch",
        "transformers",
        "onnx-ir",
        "onnxscript",
        "peft",
    )
    versions = {name: _installed(name) for name in names}
    problems: list[dict[str, str]] = []
    providers: list[str] = []
    try:
        import onnxruntime

        providers = list(onnxruntime.get_available_providers())
    except (ImportError, OSError, AttributeError) as error:
        installed = is_installed("onnxruntime")
        problem = (
            f"onnxruntime is installed but cannot be loaded ({error})" if installed else "onnxruntime is not installed"
        )
        how = "--force-reinstall " if installed else ""
        problems.append(
            {"problem": problem, "fix": f'pip install {how}"llmx[cpu]"  (or "llmx[gpu]" with an NVIDIA GPU)'}
        )
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        problems.append(
            {
                "problem": "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
                "fix": 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "llmx[gpu]"',
            }
        )
    gpus = _gpus()
    if gpus and "CUDAExecutionProvider" not in providers:
        problems.append(
            {
                "problem": "there is a GPU and onnxruntime has no CUDA provider",
                "fix": 'pip uninstall -y onnxruntime && pip install "llmx[gpu]"',
            }
        )
    missing = [name for name in ("torch", "transformers", "onnx-ir", "onnxscript") if versions[name] is None]
    if missing:
        problems.append(
            {"problem": f"export is not possible without {', '.join(missing)}", "fix": 'pip install "llmx[export]"'}
        )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "providers": providers,
        "cpus": usable_cpus(),
        "free_memory": available_memory(),
        "gpus": gpus,
        "cache": str(default_cache_dir()),
        "can_run": bool(providers),
        "can_export": not missing,
        "problems": problems,
    }


def _gpus() -> list[str]:
    """NVIDIA cards with their memory, by nvidia-smi; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        query = [tool, "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("[bold]python[/bold]", f"{facts['python']} on {facts['platform']}")
    for name, number in facts["versions"].items():
        table.add_row(f"[bold]{name}[/bold]", number or "[dim]not installed[/dim]")
    table.add_row("[bold]providers[/bold]", ", ".join(facts["providers"]) or "none")
    table.add_row("[bold]CPUs[/bold]", f"{facts['cpus']} usable, {human_bytes(facts['free_memory'])} of memory free")
    table.add_row("[bold]GPUs[/bold]", escape("; ".join(facts["gpus"])) or "none")
    table.add_row("[bold]cache[/bold]", escape(facts["cache"]))
    table.add_row("[bold]run[/bold]", "yes" if facts["can_run"] else "no")
    table.add_row("[bold]export[/bold]", "yes" if facts["can_export"] else "no")
    console.print(table)
    for item in facts["problems"]:
        console.print(
            f"[yellow]![/yellow] {escape(item['problem'])}\n  fix: {escape(item['fix'])}",
            highlight=False,
            soft_wrap=True,
        )
