"""llmx.export: a Hugging Face checkpoint in, a model package out."""
