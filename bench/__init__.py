"""llmx.bench: how fast a package runs on this machine, and where the time goes. No PyTorch."""
