"""`python -m llmx.cli`."""

from llmx.cli.main import main

main()
