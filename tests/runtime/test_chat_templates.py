"""Prompts byte-equal to transformers' `apply_chat_template`, for the styles of 24 model families."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
from chat_templates import ANSWERS, TEMPLATES
from llmx.runtime import RequestError
from llmx.runtime.chat import ChatTemplate
from llmx.runtime.chat_formats import ChatFormat, find_format
from llmx.runtime.conversation import Conversations
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The <b>weather</b> & "more" of a città.',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city's name"},
                    "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                    "hours": {"type": "array", "items": {"type": "integer"}},
                    "exact": {"type": ["boolean", "string"]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip
CALL = {
    "id": "a1B2c3D4e",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich <x>", "hours": [1, 2]}},
}
NOW = {"id": "f5G6h7I8j", "type": "function", "function": {"name": "now", "arguments": {}}}
DOCUMENTS = [{"title": "Weather", "text": "It rains.\nA lot."}, {"title": "Time & <space>", "text": "It flies."}]

USER = {"role": "user", "content": " Is it <warm>, in 'Zürich'? 世界 "}
SAID = {"role": "assistant", "content": "Let me think.\n"}
ASKED = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
RESULT = {"role": "tool", "content": '{"warm": true}', "tool_call_id": "a1B2c3D4e", "name": "get_weather"}

#: name -> (messages, options)
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([USER], {}),
    "system": ([{"role": "system", "content": "Be brief. /no_think <b>"}, USER, SAID, USER], {}),
    "two turns": ([USER, SAID, {"role": "user", "content": "Sure?"}], {}),
    "ends with the assistant": ([USER, SAID], {}),
    "tools offered": ([{"role": "system", "content": "Be brief."}, USER], {"tools": TOOLS}),
    "no tools": ([USER], {"tools": []}),
    "tool called": ([*ASKED, RESULT], {"tools": TOOLS}),
    "tool called, answered": ([*ASKED, RESULT, {"role": "assistant", "content": "Yes."}, USER], {"tools": TOOLS}),
    "two calls": ([USER, {"role": "assistant", "content": "I look.", "tool_calls": [CALL, NOW]}, RESULT, RESULT], {"tools": TOOLS}),
    "documents": ([USER], {"documents": DOCUMENTS, "citation_mode": "accurate"}),
    "documents and tools": ([USER, SAID, USER], {"documents": DOCUMENTS, "tools": TOOLS, "controls": {"length": "short"}}),
    "reasoning": ([USER, {"role": "assistant", "reasoning_content": "\nHm.\n", "content": "Yes."}, USER], {}),
    "reasoning, last": ([USER, {"role": "assistant", "thinking": "Hm.", "content": "Yes."}], {"enable_thinking": True}),
    "reasoning in the text": ([USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}, USER], {}),
    "no thinking": ([USER], {"enable_thinking": False, "reasoning_effort": "high"}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "image"}, {"type": "text", "text": "is it?"}]}], {}),
    "unknown role": ([USER, {"role": "oracle", "content": "…"}], {}),
    "two users": ([USER, USER], {}),
    "variables over special tokens": ([USER], {"bos_token": "<B>", "model_identity": "You are 'x'.", "date_string": "today"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer(), **SPECIAL)


def raw_tokenizer() -> RawTokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw = RawTokenizer(models.BPE({char: i for i, char in enumerate(sorted(alphabet))}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.add_special_tokens(list(SPECIAL.values()))
    return raw


def both(reference: Any, style: str, messages: list[dict[str, Any]], **options: Any) -> tuple[str | None, str | None]:
    """(transformers' prompt, llmx's), None where it is refused."""
    given = copy.deepcopy((messages, options))
    try:
        expected = reference.apply_chat_template(messages, chat_template=TEMPLATES[style], tokenize=False, **options)
    except Exception:
        expected = None
    try:
        got = ChatTemplate(TEMPLATES[style], SPECIAL).render(messages, **options)
    except RequestError:
        got = None
    assert (messages, options) == given  # the caller's objects stay as they were
    return expected, got


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("style", list(TEMPLATES))
def test_equals_transformers(reference: Any, style: str, case: str) -> None:
    messages, options = CASES[case]
    for add_generation_prompt in (True, False):
        expected, got = both(reference, style, messages, add_generation_prompt=add_generation_prompt, **options)
        assert got == expected


def test_most_cases_are_rendered(reference: Any) -> None:
    """That templates refuse is compared too, but the comparison is worth something only where they do not."""
    rendered = 0
    for template in [ChatTemplate(text, SPECIAL) for text in TEMPLATES.values()]:
        for messages, options in CASES.values():
            with contextlib.suppress(RequestError):
                rendered += bool(template.render(messages, **options))
    assert len(TEMPLATES) >= 24
    assert rendered > 0.75 * len(TEMPLATES) * len(CASES)
    for style in ("llama31", "mistral_v3", "mistral_v7", "qwen25", "qwen3", "qwen3_coder", "hermes_tool_use", "gpt_oss", "command_r_tool_use", "glm4"):  # fmt: skip
        prompt = both(reference, style, CASES["tool called"][0], tools=TOOLS, add_generation_prompt=True)[1]
        assert prompt is not None and "get_weather" in prompt and "Zürich <x>" in prompt and '{"warm": true}' in prompt.replace("\\", "")  # fmt: skip


@pytest.mark.parametrize("style", list(TEMPLATES))
@pytest.mark.parametrize("field", [True, "content", "reasoning_content", "thinking"])
@pytest.mark.parametrize("text", ["The answer ", "is\n", "4"])
def test_continuing_the_last_message(reference: Any, style: str, field: bool | str, text: str) -> None:
    last = {"role": "assistant", "content": text, "reasoning_content": "Hm, " + text}
    expected, got = both(reference, style, [USER, last], continue_final_message=field, add_generation_prompt=False)
    assert got == expected
    parts = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": text}]}
    expected, got = both(reference, style, [USER, parts], continue_final_message=field, add_generation_prompt=False)
    assert got == expected


def test_refusals_are_one_sentence() -> None:
    def refused(style: str, messages: list[dict[str, Any]], **options: Any) -> str:
        with pytest.raises(RequestError) as caught:
            ChatTemplate(TEMPLATES[style], SPECIAL).render(messages, **options)
        return str(caught.value)

    assert "must alternate" in refused("llama2", [USER, USER])
    assert "Only user and assistant roles are supported" in refused(
        "mistral_v1", [USER, {"role": "oracle", "content": "x"}]
    )
    assert "System role not supported" in refused("gemma", [{"role": "system", "content": "x"}, USER])
    assert "fails on these messages (it may not know tools" in refused("chatml", ASKED)
    assert "tools must be a list" in refused("qwen3", [USER], tools="get_weather")
    assert "documents must be a list" in refused("granite", [USER], documents=[1])
    both_set = refused("qwen3", [USER, SAID], continue_final_message=True, add_generation_prompt=True)
    assert "continue_final_message and add_generation_prompt" in both_set
    assert "needs a last message" in refused(
        "qwen3", [USER, {"role": "assistant", "tool_calls": [CALL]}], continue_final_message=True
    )


def test_arguments_as_json_text_where_the_template_wants_a_mapping_or_a_text(reference: Any) -> None:
    """OpenAI's API has arguments as text. Whatever the template does with them, the prompt is the one meant."""
    text = '{"city": "Zürich <x>", "hours": [1, 2]}'
    as_text = {**CALL, "function": {"name": "get_weather", "arguments": text}}
    for style in TEMPLATES:
        given = {"text": as_text, "mapping": CALL}
        prompts = {}
        for name, call in given.items():
            messages = [USER, {"role": "assistant", "tool_calls": [call]}, RESULT]
            try:
                prompts[name] = reference.apply_chat_template(
                    messages, chat_template=TEMPLATES[style], tools=TOOLS, tokenize=False
                )
            except Exception:
                prompts[name] = None
        from llmx.runtime.conversation import _with_arguments

        messages = [USER, _with_arguments({"role": "assistant", "tool_calls": [as_text]}), RESULT]
        right = prompts["text"] if style == "deepseek_v3" else prompts["mapping"]  # it concatenates the text
        if right is None:
            continue
        assert (
            ChatTemplate(TEMPLATES[style], SPECIAL).render(messages, tools=TOOLS, add_generation_prompt=False) == right
        )


@pytest.mark.parametrize("style", list(TEMPLATES))
def test_the_format_of_answers_is_recognised(style: str) -> None:
    assert find_format([TEMPLATES[style]], []) == ChatFormat(*ANSWERS.get(style, (None, None)))


@pytest.mark.parametrize("style", [style for style, (_, reasoning) in ANSWERS.items() if reasoning])
def test_a_rendered_answer_is_read_back(style: str) -> None:
    """What the template writes of an answer, without its end, is what the parser makes an answer of."""
    template = ChatTemplate(TEMPLATES[style], SPECIAL)
    answer = {"role": "assistant", "reasoning_content": "Hm.\nWell.", "content": "Yes, 1 < 2."}
    if style in ("deepseek_r1", "smollm3"):  # their templates drop or ignore earlier reasoning
        return
    prompt = template.render([USER])
    whole = template.render([USER, answer], add_generation_prompt=False)
    assert whole.startswith(prompt)
    parser = find_format([TEMPLATES[style]], []).parser(TOOLS, prompt)
    parser.finish(whole.removeprefix(prompt).split("<|im_end|>")[0])
    assert parser.message.to_dict() == answer


# -- a package's templates --------------------------------------------------------------------------------------------


def package(folder: Path, default: str | None, named: dict[str, str]) -> Conversations:
    for name, text in {"default": default, **named}.items():
        if text is not None:
            (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
    info = TokenizerInfo(
        chat_template="default.jinja" if default is not None else None,
        chat_templates={name: f"{name}.jinja" for name in named},
        special_tokens=SPECIAL,
    )
    return Conversations(folder, Tokenizer(raw_tokenizer(), info))


def test_named_templates_are_chosen_as_transformers_chooses(tmp_path: Path, reference: Any) -> None:
    named = {
        "default": TEMPLATES["command_r"],
        "rag": TEMPLATES["command_r_rag"],
        "tool_use": TEMPLATES["command_r_tool_use"],
    }
    chats = package(tmp_path, named["default"], {k: v for k, v in named.items() if k != "default"})
    reference = copy.deepcopy(reference)
    reference.chat_template = named
    for options in (
        {},
        {"tools": TOOLS},
        {"tools": []},
        {"chat_template": "rag", "documents": DOCUMENTS},
        {"chat_template": "rag", "documents": DOCUMENTS, "tools": TOOLS},
        {"chat_template": "{{ bos_token }}{{ messages[0].content }}"},
        {"chat_template": "default", "tools": TOOLS},
    ):
        expected = reference.apply_chat_template([USER], tokenize=False, add_generation_prompt=True, **options)
        assert chats.prompt([USER], **options) == expected
        request = chats.request([USER], **options)  # type: ignore[arg-type]
        assert request.prompt == expected
        assert (
            request.token_ids
            == reference.apply_chat_template([USER], add_generation_prompt=True, **options)["input_ids"]
        )
    with pytest.raises(RequestError, match="no chat template named 'agents'; take one of default, rag, tool_use"):
        chats.prompt([USER], "agents")
    (tmp_path / "other").mkdir()
    with pytest.raises(RequestError, match="no default chat template; take one of rag"):
        package(tmp_path / "other", None, {"rag": TEMPLATES["command_r_rag"]}).prompt([USER])
    with pytest.raises(RequestError, match="no chat template; use a plain prompt"):
        package(tmp_path / "other", None, {}).prompt([USER])
    with pytest.raises(RequestError, match="cannot be read"):
        chats.prompt([USER], "{% for %}")


def test_a_given_template_gives_the_format(tmp_path: Path) -> None:
    chats = package(tmp_path, TEMPLATES["chatml"], {})
    assert chats.format() == ChatFormat(None, None)
    assert chats.request([USER], chat_template=TEMPLATES["qwen3"]).format == ChatFormat("hermes", "think")
    assert chats.request([USER], tool_calls="mistral", reasoning=None).format == ChatFormat("mistral", None)
