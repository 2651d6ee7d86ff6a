"""The `llmx` command: parse, call, print. Subcommands live in modules that are imported when they run."""

from llmx.cli.main import main

__all__ = ["main"]
