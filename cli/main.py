"""The command group, imported for every invocation: click and nothing heavier."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

_COMMANDS = {
    "export": ("llmx.cli.export", "Export a Hugging Face model to a package of ONNX graphs."),
    "run": ("llmx.cli.run", "Continue a prompt, streaming to the terminal."),
    "chat": ("llmx.cli.chat", "Talk with a model in the terminal."),
    "embed": ("llmx.cli.embed", "Turn texts into vectors with an embedding model."),
    "classify": ("llmx.cli.classify", "Label texts, or their tokens, with a classifier."),
    "rerank": ("llmx.cli.rerank", "Order documents by how well they answer a query."),
    "fill-mask": ("llmx.cli.fill_mask", "Propose words for the mask in a text."),
    "inspect": ("llmx.cli.inspect", "Show what a package holds: graphs, operators, sizes, state."),
    "doctor": ("llmx.cli.doctor", "Show what this machine can run, and how to fix what is missing."),
    "completion": ("llmx.cli.completion", "Print the shell completion script for bash, zsh or fish."),
}


class LazyGroup(click.Group):
    """Lists commands from a table and imports a command's module when it is called (or asked for its own help)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[cmd_name][0])
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; deliberate errors become one sentence and their exit code, anything else a traceback."""
        from llmx.runtime.errors import LlmxError

        try:
            return super().invoke(ctx)
        except LlmxError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            sys.exit(130)
        except BrokenPipeError:  # `llmx run … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"llmx {version('llmx')}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def main() -> None:
    """Export Hugging Face language models to ONNX and run them without PyTorch.

    \b
    Examples:
      llmx export --model HuggingFaceTB/SmolLM2-135M --output artifacts/smollm2
      llmx run --onnx artifacts/smollm2 --prompt "The sea is"
      llmx chat --onnx artifacts/smollm2
    """
