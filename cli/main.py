"""The command group, imported for every invocation: click and nothing heavier."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import Any

import click
from llmx.cli.signals import Terminated, exit_code
from llmx.cli.streams import standard_streams

_COMMANDS = {
    "export": ("llmx.cli.export", "Export a Hugging Face model to a package of ONNX graphs."),
    "run": ("llmx.cli.run", "Continue a prompt, streaming to the terminal."),
    "chat": ("llmx.cli.chat", "Talk with a model in the terminal."),
    "serve": ("llmx.cli.serve", "Serve packages over HTTP, with OpenAI's API."),
    "embed": ("llmx.cli.embed", "Turn texts into vectors with an embedding model."),
    "classify": ("llmx.cli.classify", "Label texts, or their tokens, with a classifier."),
    "rerank": ("llmx.cli.rerank", "Order documents by how well they answer a query."),
    "fill-mask": ("llmx.cli.fill_mask", "Propose words for the mask in a text."),
    "verify": ("llmx.cli.verify", "Compare a package with its PyTorch source: logits, tokens, perplexity."),
    "bench": ("llmx.cli.bench", "Measure how fast a package runs on this machine."),
    "perplexity": ("llmx.cli.perplexity", "Measure how well a model predicts a text."),
    "inspect": ("llmx.cli.inspect", "Show what a package holds: graphs, operators, sizes, state."),
    "doctor": ("llmx.cli.doctor", "Show what this machine can run, and how to fix what is missing."),
    "completion": ("llmx.cli.completion", "Print the shell completion script for bash, zsh or fish."),
}

# Troubles of the machine rather than of llmx: what file, and why, is all that a user needs.
_MACHINE = {
    errno.EACCES, errno.EPERM, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE,
    errno.ESTALE,
}  # fmt: skip


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

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run the command line and exit; an interrupt, wherever it arrives, is one word and its exit code."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **more)  # type: ignore[call-overload]
        with standard_streams():
            sys.exit(self._run(*args, **more))

    def _run(self, *args: Any, **more: Any) -> int:
        try:
            code = super().main(*args, standalone_mode=False, **more)  # type: ignore[call-overload]
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except click.Abort as error:  # click's word for KeyboardInterrupt, which it has written a newline for
            return _interrupted(error.__cause__)
        except KeyboardInterrupt as error:
            click.echo(err=True)
            return _interrupted(error)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; deliberate errors become one sentence and their exit code, anything else a traceback."""
        from llmx.runtime.errors import LlmxError

        try:
            return super().invoke(ctx)
        except LlmxError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            if error.filename is None or error.errno not in _MACHINE:
                raise
            raise click.ClickException(f"{error.filename} cannot be read or written: {error.strerror}.") from None


def _interrupted(error: BaseException | None) -> int:
    # CPython notes an interrupt that leaves an exec() of text, and dies of SIGINT at its end even where someone caught it
    # further out; the next exec() drops the note.
    exec("")
    click.echo("Terminated." if isinstance(error, Terminated) else "Interrupted.", err=True)
    return exit_code(error)


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
