"""The `llmx` command."""


def main() -> None:
    """Console entry point; replaced as commands land."""
