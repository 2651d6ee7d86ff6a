"""Every chat template of a checkpoint is in its package, whichever way the checkpoint holds it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from llmx.export.checkpoint import Checkpoint
from llmx.export.tokenizer import load_tokenizer, write_tokenizer
from llmx.runtime.conversation import Conversations
from llmx.runtime.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
TEMPLATES = {
    "default": "{{ bos_token }}{{ messages[0].content }}\n",
    "tool_use": "{{ tools | tojson }}\r\n{{ messages[0].content }}",
    "rag": "{% for d in documents %}{{ d.text }} é{% endfor %}",
    "../a b/ü": "{{ messages | length }}",
    ".._a b_ü": "other",
}


@pytest.fixture
def source(tmp_path: Path, demo_checkpoint: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_checkpoint / name, folder / name)
    return folder


def exported(source: Path) -> tuple[Any, Conversations]:
    """(transformers' tokenizer of the checkpoint, the package's chats)."""
    from transformers import AutoConfig

    checkpoint = Checkpoint(source, "source", None, AutoConfig.from_pretrained(source))
    package = source.parent / "package"
    package.mkdir()
    tokenizer = load_tokenizer(checkpoint)
    info = write_tokenizer(checkpoint, tokenizer, package)
    files = {info.chat_template, *info.chat_templates.values()} - {None}
    assert {path.name for path in package.iterdir()} == {"tokenizer.json", *files}
    return load_tokenizer(checkpoint), Conversations(package, Tokenizer.load(package, info))


@pytest.mark.parametrize("form", ["list", "folder", "one", "named alone"])
def test_all_templates_are_exported(source: Path, form: str) -> None:
    wanted = {"one": ["default"], "folder": ["default", "tool_use", "rag"], "named alone": ["rag"]}.get(
        form, list(TEMPLATES)
    )
    templates = {name: TEMPLATES[name] for name in wanted}
    if form == "folder":
        (source / "chat_template.jinja").write_text(templates["default"])
        (source / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (source / "additional_chat_templates" / f"{name}.jinja").write_text(templates[name])
    else:
        config = json.loads((source / "tokenizer_config.json").read_text())
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        config["chat_template"] = templates["default"] if form == "one" else listed
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    reference, chats = exported(source)
    assert set(chats.files) == set(templates)
    for name in templates:
        options = {"tools": [{"name": "f"}], "documents": [{"text": "d"}]}
        chosen = templates[name] if form == "one" else name
        expected = reference.apply_chat_template(MESSAGES, chat_template=chosen, tokenize=False, **options)
        assert chats.prompt(MESSAGES, name, add_generation_prompt=False, **options) == expected  # type: ignore[arg-type]
