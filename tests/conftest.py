"""Shared fixtures: tiny checkpoints and packages, made once a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # for `zoo`


@pytest.fixture(scope="session", autouse=True)
def _offline_and_own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reaches a hub or the user's cache."""
    changed = {"HF_HUB_OFFLINE": "1", "LLMX_CACHE": str(tmp_path_factory.mktemp("cache"))}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of a TINY or SEQ2SEQ model -> its checkpoint folder."""
    from zoo.models import SEQ2SEQ, make_model, make_seq2seq, save_checkpoint

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            model = make_seq2seq(name) if name in SEQ2SEQ else make_model(name)
            made[name] = save_checkpoint(model, tmp_path_factory.mktemp("checkpoints") / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """name of a TINY or SEQ2SEQ model -> its exported package, verified while exporting."""
    from llmx.export import ExportOptions, export_model

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            output = tmp_path_factory.mktemp("packages") / name
            made[name] = export_model(ExportOptions(str(checkpoint(name)), output)).path
        return made[name]

    return get


@pytest.fixture(scope="session")
def seq2seq_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name of a SEQ2SEQ model -> its exported package."""
    from llmx.export import ExportOptions, export_model
    from zoo.models import make_seq2seq, save_checkpoint

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            work = tmp_path_factory.mktemp(name)
            save_checkpoint(make_seq2seq(name), work / "checkpoint")
            made[name] = export_model(ExportOptions(str(work / "checkpoint"), work / "package")).path
        return made[name]

    return get


@pytest.fixture(scope="session")
def device_package(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]
) -> Callable[[str], Path]:
    """name of a TINY model -> its float32 package for CUDA, whose graphs the CPU provider runs too."""
    from llmx.export import ExportOptions, export_model

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            output = tmp_path_factory.mktemp("device-packages") / name
            made[name] = export_model(ExportOptions(str(checkpoint(name)), output, target="cuda", dtype="fp32")).path
        return made[name]

    return get


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    return ROOT / "artifacts" / "checkpoints" / "demo"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Path:
    """The demo model's package."""
    from llmx.export import ExportOptions, export_model

    return export_model(ExportOptions(str(demo_checkpoint), tmp_path_factory.mktemp("demo") / "demo")).path
