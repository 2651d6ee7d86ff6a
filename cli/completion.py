"""`llmx completion`."""

from __future__ import annotations

import click


@click.command(name="completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Examples:
      eval "$(llmx completion bash)"        # in ~/.bashrc
      eval "$(llmx completion zsh)"         # in ~/.zshrc
      llmx completion fish > ~/.config/fish/completions/llmx.fish
    """
    from click.shell_completion import get_completion_class
    from llmx.cli.main import main

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "llmx", "_LLMX_COMPLETE").source())
