"""llmx.runtime: a model package in, tokens out, on numpy, onnxruntime and tokenizers alone."""
