"""llmx.serve: an OpenAI-compatible HTTP server over packages.

from llmx.serve import ServeConfig, create_app, load_models
"""

from llmx.serve.app import create_app
from llmx.serve.config import ServeConfig
from llmx.serve.models import Model, Models, load_models

__all__ = ["Model", "Models", "ServeConfig", "create_app", "load_models"]
