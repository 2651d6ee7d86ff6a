"""Detokenising piece by piece, stop strings, chat templates: each against its whole-text reference."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime import PackageError, RequestError
from llmx.runtime.chat import ChatTemplate
from llmx.runtime.detokenizer import IncrementalDetokenizer
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.stopping import StopChecker
from llmx.runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXT = "The sea is wide. Ünïcode 世界 🌍🚀 naïve café — and the ship… they said: “go!”\n\tНет, да."


def byte_level() -> RawTokenizer:
    tokenizer = RawTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def byte_fallback() -> RawTokenizer:
    """SentencePiece's style (Llama 2): metaspace, <0x..> for what the vocabulary lacks."""
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": i + 1 for i in range(256)}
    for piece in ["▁", "t", "h", "e", "s", "a", "i", "▁the", "▁s", "ea", "▁is", "!", "."]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = RawTokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


def wrapped(name: str) -> Tokenizer:
    return Tokenizer(TOKENIZERS[name], TokenizerInfo())


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=0, max_size=40), prompt=st.sampled_from(["", "the", "a sea", "世"]))
def test_pieces_make_the_whole_text(name: str, text: str, prompt: str) -> None:
    tokenizer = wrapped(name)
    before = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + text)[len(before) :] if name == "byte_level" else tokenizer.encode(text)
    whole = tokenizer.decode([*before, *ids])
    start = tokenizer.decode(before)
    if not whole.startswith(start):
        return  # merges across the border changed the prompt's own tokens
    pieces = stream(tokenizer, before, ids)
    assert "".join(pieces) == whole[len(start) :]


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(1, 260), max_size=30))
def test_random_tokens_with_broken_bytes(ids: list[int]) -> None:
    tokenizer = wrapped("byte_level")
    pieces = stream(tokenizer, [], ids)
    assert "".join(pieces) == tokenizer.decode(ids)


def test_markers_stay_in_the_text_where_other_special_tokens_do_not() -> None:
    raw = byte_level()
    raw.add_special_tokens(["<call>", "<end>"])
    tokenizer = Tokenizer(raw, TokenizerInfo())
    ids = tokenizer.encode("the <call>sea<end>")
    detokenizer = IncrementalDetokenizer(tokenizer, [], True, [raw.token_to_id("<call>")])
    assert "".join([*(detokenizer.push(i) for i in ids), detokenizer.finish()]) == "the <call>sea"


def test_characters_are_held_until_complete() -> None:
    tokenizer = wrapped("byte_fallback")
    ids = [b + 1 for b in "🚀".encode()]
    assert stream(tokenizer, [], ids) == ["", "", "", "🚀", ""]


def test_leading_space_of_a_continuation() -> None:
    tokenizer = wrapped("byte_fallback")
    vocab = TOKENIZERS["byte_fallback"].get_vocab()
    assert "".join(stream(tokenizer, [vocab["▁the"]], [vocab["▁s"], vocab["ea"]])) == " sea"
    assert "".join(stream(tokenizer, [], [vocab["▁s"], vocab["ea"]])) == "sea"


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(PackageError, match="damaged"):
        Tokenizer.load(tmp_path, TokenizerInfo())


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_equal_a_character_by_character_search(pieces: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(stops, include)
    emitted = []
    for piece in pieces:
        emitted.append(checker.push(piece))
        if checker.matched is None and stops:
            shown = "".join(emitted)
            assert not any(stop in shown for stop in stops)
    text = "".join(emitted) + ("" if checker.matched else checker.finish())
    whole = "".join(pieces)
    ends = [(whole.find(s) + len(s), whole.find(s), s) for s in stops if s in whole]
    if not ends:
        assert (text, checker.matched) == (whole, None)
        return
    end, start, stop = min(ends)
    assert checker.matched is not None and len(checker.matched) + start == end
    assert text == whole[: end if include else start]


TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}\n{% endif %}{% for m in messages %}\n    {%- if loop.first %}\n{{ m.content | upper }}\n    {%- else %}\n{{ m.content }}\n    {%- endif %}\n{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "loop": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
}
MESSAGES = [
    {"role": "system", "content": "Be brief. <b>"},
    {"role": "user", "content": " Hi 世界! "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "More?"},
]


@pytest.mark.parametrize("style", list(TEMPLATES))
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_equals_transformers(style: str, add_generation_prompt: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": "<é>"}}}] if style == "tools" else None
    expected = reference.apply_chat_template(
        MESSAGES,
        chat_template=TEMPLATES[style],
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    template = ChatTemplate(TEMPLATES[style], {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(MESSAGES, add_generation_prompt=add_generation_prompt, tools=tools) == expected


@pytest.mark.parametrize("messages", ["hi", [], [{"content": "x"}], ["x"], {"role": "user"}])
def test_bad_messages(messages: object) -> None:
    with pytest.raises(RequestError, match="messages"):
        ChatTemplate("{{ messages }}").render(messages)  # type: ignore[arg-type]


def test_templates_are_sandboxed_and_their_refusals_told() -> None:
    with pytest.raises(RequestError, match="refuses"):
        ChatTemplate("{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}").render(MESSAGES)
    with pytest.raises(RequestError, match="only user"):
        ChatTemplate("{{ raise_exception('only user turns') }}").render(MESSAGES)
    with pytest.raises(RequestError, match="cannot be read"):
        ChatTemplate("{% for %}")
