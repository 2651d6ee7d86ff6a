"""`llmx serve`."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import click
from llmx.runtime.errors import MissingDependencyError, RequestError

try:
    from llmx.serve.config import ServeConfig
    from pydantic import ValidationError
    from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource
except ImportError as error:
    raise MissingDependencyError(f'`llmx serve` needs {error.name}: pip install "llmx[serve]".') from None


def _options(function: Any) -> Any:
    """A flag for each field of ServeConfig; an environment variable and the configuration file set it as well."""
    for name, field in reversed(ServeConfig.model_fields.items()):
        flag = f"--{name.replace('_', '-')}"
        kind, many = _click_type(field.annotation)
        default = field.get_default(call_default_factory=True)
        shown = f"; default: {default}" if default not in (None, []) else ""
        text = f"{field.description} [LLMX_{name.upper()}{shown}]"
        if kind is bool:
            function = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)(function)
        else:
            function = click.option(flag, name, type=kind, multiple=many, default=None, help=text)(function)
    return function


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """(click's type, whether several may be given) of a field."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return str, True
    if origin is typing.Literal:
        return click.Choice(members), False
    if origin in (types.UnionType, typing.Union):
        return members[0], False
    if origin is typing.Annotated:
        return members[0], False
    return annotation, False


def read_config(given: dict[str, Any], file: Path | None) -> ServeConfig:
    """The settings: flags first, then LLMX_… variables, then the file (TOML), then defaults. Raises RequestError."""

    class Settings(BaseSettings, ServeConfig):
        model_config = SettingsConfigDict(
            env_prefix="LLMX_", extra="forbid", toml_file=file, frozen=True, enable_decoding=False
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            *_: PydanticBaseSettingsSource,
            **__: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            order = (init_settings, env_settings)
            return (*order, TomlConfigSettingsSource(settings_cls)) if file is not None else order

    try:
        return ServeConfig(**dict(Settings(**given)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "The configuration"
        where = f"--{name.replace('_', '-')} (LLMX_{name.upper()})" if name in ServeConfig.model_fields else name
        raise RequestError(f"{where}: {first['msg']}.") from None
    except Exception as error:  # a file that is no TOML, a list in the environment that is no JSON
        raise RequestError(f"The configuration cannot be read: {' '.join(str(error).split())[:300]}.") from None


@click.command(name="serve")
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A TOML file of the settings below."
)
@_options
def command(config: Path | None, **options: Any) -> None:
    """Serve packages over HTTP, with OpenAI's API. Several entries in a variable are a JSON list.

    \b
    Examples:
      llmx serve --onnx artifacts/demo
      llmx serve --onnx chat=artifacts/smollm2 --onnx vectors=artifacts/minilm --api-key "$KEY" --host 0.0.0.0
      llmx serve --config serve.toml --port 9000
    """
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v is not None and v != ()}
    settings = read_config(given, config)
    from llmx.cli.common import status
    from llmx.serve.models import load_models
    from llmx.serve.server import bind, serve

    sock = bind(settings)
    with status(f"Loading {', '.join(settings.onnx)}"):
        models = load_models(settings)
    serve(models, settings, sock)
