"""`llmx run --chat` and `llmx chat`: templates, tools, documents, and how an answer is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from llmx.cli import main
from llmx.cli.conversation import show
from llmx.runtime import ChatDelta, StreamPiece
from llmx.runtime.chat_output import ToolCallDelta

#: Opens the model's reasoning, so that the whole answer is of it.
TEMPLATE = "{{ messages[0].content }}|{{ tools | tojson }}|{{ documents[0].text }}|{{ mode }}{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }}{% endif %}<think>\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "tools.json").write_text('[{"type": "function", "function": {"name": "f"}}]')
    (tmp_path / "documents.json").write_text('[{"title": "t", "text": "It rains."}]')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "object.json").write_text("{}")
    return tmp_path


def test_what_the_template_is_given(demo: Path, files: Path) -> None:
    options = [
        "--chat-template",
        files / "t.jinja",
        "--tools",
        files / "tools.json",
        "--documents",
        files / "documents.json",
    ]
    command = [
        "run",
        "--onnx",
        demo,
        "--chat",
        "--prompt",
        "Hi",
        *options,
        "--template-option",
        "mode=7",
        "--seed",
        "3",
        "--json",
        "-n",
        "12",
    ]
    result = CliRunner().invoke(main, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["prompt"] is None
    assert answer["message"]["reasoning_content"] == answer["text"].strip() and answer["message"]["content"] == ""
    streamed = CliRunner().invoke(main, [str(part) for part in command if part != "--json"])
    assert streamed.stdout == "\n" and answer["message"]["reasoning_content"] in streamed.stderr


def test_an_answer_begun(demo: Path) -> None:
    common = ["run", "--onnx", str(demo), "--chat", "--prompt", "Hi", "--system", "Rome.", "--json", "-n", "8"]
    begun = json.loads(CliRunner().invoke(main, [*common, "--prefill", "The king"]).stdout)
    plain = json.loads(CliRunner().invoke(main, common).stdout)
    assert begun["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    assert begun["message"]["content"] == begun["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tools", "broken.json"], "is not JSON"),
        (["--tools", "object.json"], "must hold a JSON list"),
        (["--documents", "none.json"], "cannot be read as text"),
        (["--template-option", "thinking"], "takes NAME=VALUE"),
        (["--chat-template", "agents"], "no chat template named 'agents'; take one of default"),
    ],
)
def test_refused(demo: Path, files: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    monkeypatch.chdir(files)
    result = CliRunner().invoke(main, ["run", "--onnx", str(demo), "--chat", "--prompt", "x", *options])
    assert result.exit_code == 2 and message in result.stderr.splitlines()[-1], result.output


def test_options_of_chats_need_chat(demo: Path) -> None:
    result = CliRunner().invoke(main, ["run", "--onnx", str(demo), "--prompt", "x", "--system", "y"])
    assert result.exit_code == 2 and "go with --chat" in result.stderr


def test_a_full_context(demo: Path) -> None:
    """At the third question there is no room: `stop` says so, `shift` forgets the oldest."""
    common = ["chat", "--onnx", str(demo), "--max-length", "64", "-n", "20", "--ignore-eos", "--temperature", "0"]
    said = "To be, or not to be\n" * 4
    stopped = CliRunner().invoke(main, common, input=said)
    assert stopped.exit_code == 0 and "/reset starts anew" in stopped.stderr
    shifted = CliRunner().invoke(main, [*common, "--on-full", "shift", "--keep-first", "4"], input=said)
    assert shifted.exit_code == 0 and "Error" not in shifted.stderr
    assert len(shifted.stdout.strip()) > len(stopped.stdout.strip())
    refused = CliRunner().invoke(main, [*common, "--on-full", "shift", "--keep-first", "64"], input=said)
    assert refused.exit_code == 2 and "keep_first must be a whole number from 0 to 62" in refused.stderr


def test_calls_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    call = [ToolCallDelta(0, "id", "f", '{"a": '), ToolCallDelta(0, arguments='"é"}')]
    show([StreamPiece("", [], delta=ChatDelta("Well.", "", [piece])) for piece in call])
    assert capsys.readouterr().out.splitlines() == [
        "Well.Well.",
        '{"tool_call": {"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}}',
    ]
