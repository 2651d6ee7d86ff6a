"""Other clients, unmodified: LangChain's ChatOpenAI, LiteLLM, curl; and Schemathesis over /openapi.json.

LangChain and LiteLLM come with `pip install -e '.[clients]'`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from harness import Running, running
from llmx.runtime import LLM, SamplingParams
from llmx.serve import ServeConfig
from pydantic import BaseModel

GREEDY = SamplingParams(max_tokens=16, temperature=0.0)


@pytest.fixture(scope="module")
def said(demo: Path) -> str:
    """What the demo model answers to "What news?"."""
    with LLM(demo) as llm:
        return str(llm.chat([{"role": "user", "content": "What news?"}], GREEDY).outputs[0].text)  # type: ignore[union-attr]


class Answer(BaseModel):
    """The answer."""

    place: Literal["Rome", "Verona"]


def test_langchain(served: Running, said: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    options: dict[str, Any] = {
        "base_url": f"{served.url}/v1",
        "api_key": "none",
        "model": "demo",
        "temperature": 0,
        "max_retries": 0,
    }
    chat = langchain.ChatOpenAI(**options, max_tokens=16)
    answer = chat.invoke("What news?")
    assert answer.content == said and answer.usage_metadata["output_tokens"] == 16
    assert "".join(piece.content for piece in chat.stream("What news?")) == said
    assert asyncio.run(chat.ainvoke("What news?")).content == said
    assert [a.content for a in chat.batch(["What news?"] * 3)] == [said] * 3
    roomy = langchain.ChatOpenAI(**{**options, "temperature": 1}, seed=1, max_tokens=200)
    for method in ("json_schema", "function_calling"):
        assert isinstance(roomy.with_structured_output(Answer, method=method).invoke("What news?"), Answer)
    called = roomy.bind_tools([Answer], tool_choice="Answer").invoke("What news?")
    assert called.tool_calls[0]["name"] == "Answer" and called.tool_calls[0]["args"]["place"] in ("Rome", "Verona")


def test_litellm(served: Running, said: str, encoder: Callable[[str], Path]) -> None:
    litellm = pytest.importorskip("litellm")
    options: dict[str, Any] = {
        "model": "openai/demo", "api_base": f"{served.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 16,
        "messages": [{"role": "user", "content": "What news?"}], "num_retries": 0,
    }  # fmt: skip
    assert litellm.completion(**options).choices[0].message.content == said
    pieces = litellm.completion(**options, stream=True, stream_options={"include_usage": True})
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == said
    assert asyncio.run(litellm.acompletion(**options)).choices[0].message.content == said
    hosted = litellm.completion(**{**options, "model": "hosted_vllm/demo"})
    assert hosted.choices[0].message.content == said
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**options, "model": "openai/other"})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**options, "messages": [{"role": "user", "content": "word " * 3000}]})
    with running(ServeConfig(onnx=[f"vectors={encoder('embed')}"])) as server:
        answer = litellm.embedding(
            model="openai/vectors", input=["a text"], api_base=f"{server.url}/v1", api_key="none", encoding_format="float"
        )  # fmt: skip
        assert len(answer.data[0]["embedding"]) == 48


def test_curl(served: Running, said: str) -> None:
    body = {"messages": [{"role": "user", "content": "What news?"}], "max_tokens": 16, "temperature": 0}

    def curl(*arguments: str) -> str:
        done = subprocess.run(["curl", "-sS", "-f", *arguments], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    url, kind = f"{served.url}/v1/chat/completions", "content-type: application/json"
    assert json.loads(curl(url, "-H", kind, "-d", json.dumps(body)))["choices"][0]["message"]["content"] == said
    lines = curl("-N", url, "-H", kind, "-d", json.dumps({**body, "stream": True})).splitlines()
    assert lines[-2] == "data: [DONE]" and all(line == "" or line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == said
    assert curl(f"{served.url}/health") == '{"status":"ok"}'


@pytest.fixture(scope="module")
def all_kinds(demo: Path, encoder: Callable[[str], Path]) -> Iterator[Running]:
    with running(
        ServeConfig(onnx=[f"demo={demo}", f"vectors={encoder('embed')}", f"judge={encoder('rerank')}"], slots=4)
    ) as server:
        yield server


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("phases", "examples"), [("fuzzing", 4), pytest.param("examples,coverage,fuzzing", 100, marks=pytest.mark.slow)]
)
def test_schemathesis(all_kinds: Running, phases: str, examples: int, tmp_path: Path) -> None:
    """Requests made of the API's own description, right and wrong ones: no 5xx, every answer as described, and none of the
    wrong ones accepted. (That every right one is accepted no schema can say: a model's name, a context's length.)
    """
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{all_kinds.url}/openapi.json", "--no-color", "--seed", "1",
        "--checks", "all", "--exclude-checks", "positive_data_acceptance", "--max-examples", str(examples),
        "--phases", phases, "--request-timeout", "60", "--generation-database", "none",
        "--continue-on-failure",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    all_kinds.wait_idle()
    assert all_kinds.http.get("/health").status_code == 200
