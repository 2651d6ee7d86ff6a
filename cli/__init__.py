"""The `llmx` command: parse, call, print. Subcommands live in modules that are imported when they run."""

try:
    from llmx.cli.main import main
except KeyboardInterrupt:  # Ctrl-C while click is imported; `main` answers every later one
    import sys

    sys.stderr.write("\nInterrupted.\n")
    raise SystemExit(130) from None

__all__ = ["main"]
