"""Servers of the demo model and of a small embedder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import Running, running
from llmx.serve import ServeConfig


@pytest.fixture(scope="session")
def served(demo: Path) -> Iterator[Running]:
    """The demo model behind a server with the defaults."""
    with running(ServeConfig(onnx=[f"demo={demo}"], slots=4)) as server:
        yield server


@pytest.fixture
def serving(demo: Path) -> Iterator[Callable[..., Running]]:
    """serving(slots=1, …) -> a server of the demo model with these settings, until the test's end."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            running(ServeConfig(**{"onnx": [f"demo={demo}"], "slots": 2, **settings}))
        )


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """ "embed" or "rerank" -> a small random encoder's package."""
    import torch
    import transformers
    from llmx.export import ExportOptions, export_model
    from zoo.models import VOCAB, widen, write_tokenizer

    made: dict[str, Path] = {}

    def get(task: str) -> Path:
        if task not in made:
            torch.manual_seed(0)
            config = transformers.BertConfig(
                vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, pad_token_id=0, num_labels=1,
            )  # fmt: skip
            kind = transformers.BertModel if task == "embed" else transformers.BertForSequenceClassification
            model = kind(config).eval()
            widen(model, 0)
            folder = tmp_path_factory.mktemp("encoders") / task
            model.save_pretrained(folder)
            write_tokenizer(folder)
            made[task] = export_model(ExportOptions(str(folder), folder.with_name(f"{task}-onnx"))).path
        return made[task]

    return get
