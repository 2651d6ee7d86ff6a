"""Structured outputs: every output has the form asked for, forced tokens cost no step each, failures are clean."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llmx.runtime import (
    LLM,
    AsyncLLM,
    MissingDependencyError,
    RequestError,
    SamplingParams,
    Speculation,
    StructuredOutputsParams,
)
from llmx.runtime.engine import Engine
from llmx.runtime.fake_backend import FakeBackend
from llmx.runtime.grammar import Grammar, GrammarCompiler
from llmx.runtime.history import History
from llmx.runtime.manifest import TokenizerInfo
from llmx.runtime.rules import NO_RULES
from llmx.runtime.sampling import distribution
from llmx.runtime.scheduler import Request
from llmx.runtime.speculation import PromptLookup
from llmx.runtime.speculator import Speculator
from llmx.runtime.tokenizer import Tokenizer
from schemas import schema
from zoo.models import VOCAB, write_tokenizer

POINT = {
    "type": "object",
    "properties": {"longitude": {"type": "integer", "minimum": 0, "maximum": 9}, "kind": {"enum": ["city", "village"]}},
    "required": ["longitude", "kind"],
    "additionalProperties": False,
}


def structured(max_tokens: int = 300, temperature: float = 1.0, seed: int = 0, **form: Any) -> SamplingParams:
    options = {name: form.pop(name) for name in list(form) if name in SamplingParams.__dataclass_fields__}
    wanted = StructuredOutputsParams(**form)
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, structured_outputs=wanted, **options
    )


@pytest.fixture(scope="module")
def llm(demo: Path) -> Iterator[LLM]:
    with LLM(demo, slots=16) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes and a few merges; the end token is 0."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder, TokenizerInfo(eos_token_ids=[0]))


def engine_of(tokenizer: Tokenizer, chunked: bool = True, slots: int = 2) -> Engine:
    backend = FakeBackend(slots, 400, VOCAB)
    backend.chunked = chunked
    return Engine(backend, tokenizer, 16)


def run(engine: Engine, *requests: Request) -> list[Any]:
    while engine.has_work:
        engine.step()
        engine.scheduler.pool.check_integrity()
    for request in requests:
        if request.error is not None:
            raise request.error
    return [request.sequences[0] for request in requests]


def test_200_schemas_at_random_sampling_are_all_valid(llm: LLM) -> None:
    schemas = [schema(number) for number in range(200)]
    params = [structured(900, seed=n, json=each, disable_any_whitespace=n % 8 != 0) for n, each in enumerate(schemas)]
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for each, out in zip(schemas, llm.generate(["ROMEO:\n"] * 200, params), strict=True):
        assert out.outputs[0].finish_reason == "stop"
        jsonschema.Draft202012Validator(each, format_checker=checker).validate(json.loads(out.outputs[0].text))


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"regex": r"[0-9]{3}-[a-z]{2,9}"}, r"[0-9]{3}-[a-z]{2,9}"),
    ({"choice": ["ROMEO", 'JULI"ET\n', "é🎉", "ROMEO and"]}, "ROMEO|JULI\"ET\n|é🎉|ROMEO and"),
    ({"grammar": 'start: "a" pair ("," pair){0,3}\npair: "x" | /[yz]/ "!"'}, "a(x|[yz]!)(,(x|[yz]!)){0,3}"),
    ({"grammar": 'root ::= "a" ("b" | "c") "d"?'}, "a[bc]d?"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "pattern"), FORMS, ids=["regex", "choice", "lark", "gbnf"])
def test_forms(llm: LLM, form: dict[str, Any], pattern: str) -> None:
    params = [structured(seed=seed, **form) for seed in range(12)]
    outs = [out.outputs[0] for out in llm.generate(["KING:\n"] * 12, params)]
    assert all(re.fullmatch(pattern, out.text) for out in outs)
    assert {out.finish_reason for out in outs} == {"stop"}
    assert len({out.text for out in outs}) > 1


def test_a_pydantic_model_and_a_schemas_text(llm: LLM) -> None:
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):  # type: ignore[misc, name-defined]
        name: str = pydantic.Field(max_length=9)
        age: int = pydantic.Field(ge=0, le=99)

    [person] = llm.generate("KING:", structured(json=Person, disable_additional_properties=True))
    assert isinstance(Person.model_validate_json(person.outputs[0].text), Person)
    [text] = llm.generate("KING:", structured(json=json.dumps(POINT), disable_any_whitespace=True, temperature=0.0))
    jsonschema.validate(json.loads(text.outputs[0].text), POINT)


def test_any_json_object(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer)
    each = [structured(380, seed=n, json_object=True).resolved({}) for n in range(16)]
    done = [s for s in run(engine, *(engine.add(None, [5], p) for p in each)) if s.finish_reason == "stop"]
    assert len(done) > 3
    assert all(isinstance(json.loads(sequence.text), dict) for sequence in done)


def test_closed_objects_have_no_other_properties(llm: LLM) -> None:
    open_schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "null"}}}}}
    params = [
        structured(seed=n, json=open_schema, disable_any_whitespace=True, disable_additional_properties=True)
        for n in range(8)
    ]
    for out in llm.generate(["KING:"] * 8, params):
        value = json.loads(out.outputs[0].text)
        assert set(value) <= {"a"} and set(value.get("a", {})) <= {"b"}


def test_alone_and_in_a_batch_and_streamed_the_same(llm: LLM) -> None:
    params = [structured(seed=n, json=schema(n), disable_any_whitespace=True) for n in (3, 4, 5)]
    params += [SamplingParams(max_tokens=30, temperature=1.0, seed=9)]
    together = llm.generate(["JULIET:\n"] * 4, params)
    for each, out in zip(params, together, strict=True):
        pieces = list(llm.stream("JULIET:\n", each))
        assert [token for piece in pieces for token in piece.token_ids] == out.outputs[0].token_ids
        assert "".join(piece.text for piece in pieces) == out.outputs[0].text
        assert pieces[-1].finish_reason == out.outputs[0].finish_reason


def test_n_continuations_follow_the_grammar_apart(llm: LLM) -> None:
    [out] = llm.generate("KING:", structured(n=5, json=POINT, disable_any_whitespace=True))
    texts = [each.text for each in out.outputs]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), POINT)


def test_other_parameters_hold_within_the_grammar(llm: LLM) -> None:
    [out] = llm.generate("KING:", structured(regex="[ab]{8}", no_repeat_ngram_size=3, logprobs=1))
    text = out.outputs[0].text
    assert re.fullmatch("[ab]{8}", text)
    [first] = llm.generate("KING:", structured(temperature=0.0, choice=["yes", "no"], logit_bias={}))
    word = first.outputs[0].text
    [other] = llm.generate("KING:", structured(temperature=0.0, choice=["yes", "no"], bad_words=[word[0], word]))
    assert {first.outputs[0].text, other.outputs[0].text} == {"yes", "no"}


# -- forced tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_forced_tokens_are_run_in_one_chunk(tokenizer: Tokenizer, seed: int) -> None:
    params = structured(seed=seed, json=POINT, disable_any_whitespace=True).resolved({})
    engine = engine_of(tokenizer)
    [sequence] = run(engine, engine.add(None, [5, 6, 7], params))
    jsonschema.validate(json.loads(sequence.text), POINT)
    backend = engine.backend
    assert isinstance(backend, FakeBackend)
    # {"longitude": is forced, then a digit is chosen, then ,"kind":" is forced, then one letter, then the rest
    assert sequence.num_output > 25
    assert backend.num_prefills + backend.num_decodes <= 5


@pytest.mark.parametrize("seed", range(6))
def test_forced_tokens_are_the_same_one_by_one(tokenizer: Tokenizer, seed: int) -> None:
    """Where the state takes no chunks, and where each token's log-probability is asked for."""
    params = structured(seed=seed, json=schema(seed + 20), disable_any_whitespace=True).resolved({})
    noted = structured(seed=seed, json=schema(seed + 20), disable_any_whitespace=True, logprobs=0).resolved({})
    outputs = []
    for chunked, wanted in ((True, params), (False, params), (True, noted)):
        engine = engine_of(tokenizer, chunked)
        other = engine.add(None, [9, 8], SamplingParams(temperature=0.0, max_tokens=40).resolved({}))
        [sequence, plain] = run(engine, engine.add(None, [5, 6, 7], wanted), other)
        outputs.append(sequence.output_ids)
        assert plain.output_ids == FakeBackend(1, 400, VOCAB).greedy([9, 8], 40)
        assert len(sequence.logprobs) == (sequence.num_output if wanted is noted else 0)
    assert outputs[0] == outputs[1] == outputs[2]


class Patient(FakeBackend):
    """Its decode steps end once the masks of what they decide are there (or after seconds, which is noted)."""

    def __init__(self) -> None:
        super().__init__(3, 400, VOCAB)
        self.watched: list[Request] = []
        self.in_time: list[bool] = []

    def decode(self, *args: Any, **more: Any) -> Any:
        deadline = time.monotonic() + 5
        for request in [r for r in self.watched if not r.finished]:
            grammar = request.sequences[0].history._grammar
            while grammar is not None and grammar._mask is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            self.in_time.append(grammar is None or grammar._mask is not None)
        return super().decode(*args, **more)


def test_masks_are_computed_while_the_device_works(tokenizer: Tokenizer) -> None:
    """By another thread, from the tokens that the step starts from; outputs are those of masks computed after it."""
    wanted = [structured(12, regex="[ab]{2}[a-e]{20}"), structured(12, regex="[x-z]{20}", seed=1)]
    backend = Patient()
    engine = Engine(backend, tokenizer, 16)
    plain = engine.add(None, [3], SamplingParams(max_tokens=12, temperature=1.0, seed=2).resolved({}))
    backend.watched = [engine.add(None, [5, index], each.resolved({})) for index, each in enumerate(wanted)]
    got = run(engine, plain, *backend.watched)
    assert len(backend.in_time) >= 20 and all(backend.in_time)
    other = engine_of(tokenizer, slots=3)
    other.masks.during = lambda *_: nullcontext()  # type: ignore[method-assign]
    requests = [other.add(None, [5, index], each.resolved({})) for index, each in enumerate(wanted)]
    assert [s.output_ids for s in run(other, *requests)] == [s.output_ids for s in got[1:]]
    assert other.masks._thread is None and engine.masks._thread is not None
    engine.masks.close()


@pytest.mark.parametrize("verifies", [True, False])
def test_masks_of_first_tokens_and_of_guesses_are_computed_ahead(
    tokenizer: Tokenizer, verifies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None by the thread that steps; outputs are those without speculation."""
    makers: list[str] = []
    prepare = Grammar.prepare

    def noted(self: Grammar) -> None:
        makers.append(threading.current_thread().name)
        prepare(self)

    wanted = [structured(40, regex="(ab|cd|abc){30}", n=2), structured(40, regex="[x-z]{40}", seed=1)]
    outputs = []
    for guesses in (0, 3):
        backend = FakeBackend(4, 400, VOCAB)
        backend.verifies_batches = verifies
        settings = Speculation(prompt_lookup=True, min_ngram=1, num_tokens=3)
        speculator = Speculator(settings, backend, PromptLookup(4, 1)) if guesses else None
        engine = Engine(backend, tokenizer, 16, speculator=speculator)
        with monkeypatch.context() as patch:
            patch.setattr(Grammar, "prepare", noted)
            requests = [engine.add(None, [5, index], each.resolved({})) for index, each in enumerate(wanted)]
            outputs.append([s.output_ids for s in run(engine, *requests)])
        engine.masks.close()
        assert speculator is None or 0 < speculator.counts[2] < speculator.counts[1]  # some guesses stood, not all
    assert outputs[0] == outputs[1]
    assert len(makers) > 60 and all(name.startswith("llmx-grammar") for name in makers)


def test_taken_back_tokens_leave_the_masks_right(tokenizer: Tokenizer) -> None:
    """Whatever is appended, taken back, and looked at ahead: a mask is that of a grammar that only went forwards."""
    compiler, rng = GrammarCompiler(tokenizer, VOCAB), np.random.default_rng(3)
    form = StructuredOutputsParams(regex="(ab|cd|abc|[x-z]{2}){80}")
    for _ in range(20):
        history, tokens = History([1], NO_RULES, compiler.compile(form)), list[int]()

        def mask(tokens: list[int]) -> np.ndarray:
            grammar = History([1], NO_RULES, compiler.compile(form))
            for token in tokens:
                grammar.append(token)
            found = grammar.grammar()
            assert found is not None
            return found.mask()

        for _ in range(30):
            allowed = np.flatnonzero(mask(tokens))
            move = rng.integers(4)
            if move == 0 and tokens:
                length = int(rng.integers(len(tokens) + 1))
                del tokens[length:]
                history.truncate(1 + length)
            elif move == 1:
                guesses = [int(rng.choice(allowed)), *rng.integers(0, VOCAB, 2).tolist()]
                found = history.grammar()
                assert found is not None
                found.prepare_along(guesses)
            elif len(allowed) and len(tokens) < 60:
                tokens.append(int(rng.choice(allowed)))
                history.append(tokens[-1])
            found = history.grammar()
            assert found is not None and np.array_equal(found.mask(), mask(tokens))


def test_max_tokens_within_forced_tokens_ends_with_length(tokenizer: Tokenizer) -> None:
    params = structured(5, json=POINT, disable_any_whitespace=True).resolved({})
    engine = engine_of(tokenizer)
    [sequence] = run(engine, engine.add(None, [5], params))
    assert (sequence.finish_reason, sequence.num_output, sequence.text) == ("length", 5, '{"lon')


def test_a_stop_string_within_forced_tokens(tokenizer: Tokenizer) -> None:
    params = structured(json=POINT, disable_any_whitespace=True, stop="git").resolved({})
    engine = engine_of(tokenizer)
    [sequence] = run(engine, engine.add(None, [5], params))
    assert (sequence.finish_reason, sequence.stop_reason, sequence.text) == ("stop", "git", '{"lon')


def test_long_forced_text_goes_in_chunks(tokenizer: Tokenizer) -> None:
    text = "to be or not " * 9
    engine = engine_of(tokenizer)
    params = structured(json={"enum": [f"{text}x", f"{text}y"]}, disable_any_whitespace=True).resolved({})
    [sequence] = run(engine, engine.add(None, [5], params))
    assert json.loads(sequence.text) in (f"{text}x", f"{text}y")
    assert engine.backend.num_prefills == 1 + -(-(sequence.num_output - 2) // 16)  # type: ignore[attr-defined]


# -- going back and forking --------------------------------------------------------------------------------------------


def test_history_takes_tokens_back_and_forks(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer)
    row = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)
    params = structured(regex="(ab|ac)[0-9]{4}!").resolved({})

    def fresh(*output: str) -> History:
        assert params.structured_outputs is not None
        history = History([5], NO_RULES, engine.grammars.compile(params.structured_outputs))  # type: ignore[arg-type]
        for token in tokenizer.encode("".join(output)):
            history.append(token)
        return history

    def look(history: History) -> list[int]:
        return distribution(row, params, history).ids.tolist()

    history = fresh("ac12")
    wanted = look(history)
    twin = history.fork()
    history.truncate(3)
    assert look(history) == look(fresh("ac"))
    assert look(twin) == wanted
    for token in tokenizer.encode("777"):
        history.append(token)
    assert look(history) == look(fresh("ac777"))
    history.append(tokenizer.encode("x")[0])  # no such output
    with pytest.raises(RequestError, match="No token is left"):
        look(history)
    history.truncate(len(history.tokens) - 1)
    assert look(history) == look(fresh("ac777"))
    assert history.forced() == []
    assert fresh().forced() == tokenizer.encode("a")


def test_a_tokenizer_with_more_tokens_than_its_model(tmp_path: Path) -> None:
    """Special tokens that no row of the model stands for: the mask has another size than the logits."""
    write_tokenizer(tmp_path)
    small = Tokenizer.load(tmp_path, TokenizerInfo(eos_token_ids=[0]))
    size = small.vocab_size
    small._backend.add_special_tokens([f"<|extra{n}|>" for n in range(70)])
    assert small.vocab_size == size + 70
    engine = Engine(FakeBackend(1, 400, size), small, 16)
    params = structured(json=POINT, disable_any_whitespace=True).resolved({})
    [sequence] = run(engine, engine.add(None, [5], params))
    jsonschema.validate(json.loads(sequence.text), POINT)


def test_async_compiles_beside_the_event_loop(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[bool] = []
    original = llm.engine.grammars._matcher

    def spy(params: Any) -> Any:
        compiled.append(threading.current_thread() is threading.main_thread())
        return original(params)

    async def work() -> None:
        aio = AsyncLLM(llm=llm)
        [out] = await aio.generate("KING:", structured(regex="x[ab]{4}"))
        assert re.fullmatch("x[ab]{4}", out.outputs[0].text)
        text = "".join([piece.text async for piece in aio.stream("KING:", structured(regex="y[ab]{4}"))])
        assert re.fullmatch("y[ab]{4}", text)
        with pytest.raises(RequestError, match="unclosed group"):
            await aio.generate("KING:", structured(regex="(a"))
        aio._stop = True  # the module's LLM stays open
        aio._wake.set()
        llm._driver.wake()
        aio._thread.join()

    monkeypatch.setattr(llm.engine.grammars, "_matcher", spy)
    asyncio.run(work())
    assert compiled == [False, False, False]


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar or json_object, and has none"),
        ({"regex": "a", "json_object": True}, "exactly one of .*, and has regex and json_object"),
        ({"json_object": False}, "exactly one of .* and has none"),
        ({"json": "{"}, "structured_outputs.json is no JSON schema: "),
        ({"json": "7"}, "structured_outputs.json must be a JSON schema"),
        ({"json": 3}, "structured_outputs.json must be a JSON schema"),
        ({"json": {"a": {1, 2}}}, "structured_outputs.json is no JSON schema"),
        ({"regex": ""}, "structured_outputs.regex must be a string that is not empty"),
        ({"choice": []}, "structured_outputs.choice must be a list of at least one string"),
        ({"choice": "abc"}, "structured_outputs.choice must be a list of at least one string"),
        ({"choice": ["a", 3]}, "structured_outputs.choice must be a list of at least one string"),
        ({"grammar": 3}, "structured_outputs.grammar must be a string that is not empty"),
        ({"xml": "a"}, "structured_outputs has no field 'xml'; give one of json"),
    ],
)
def test_bad_forms_are_refused_in_one_sentence(form: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(structured_outputs=form)
    assert "\n" not in str(caught.value)


def test_params_take_a_mapping_and_nothing_else() -> None:
    params = SamplingParams(structured_outputs={"choice": ["a", "b"]})
    assert params.structured_outputs == StructuredOutputsParams(choice=("a", "b"))
    assert hash(params) == hash(SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a", "b"])))
    with pytest.raises(RequestError, match="must be StructuredOutputsParams or a mapping"):
        SamplingParams(structured_outputs="json")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"type": "object", "not": {}}}, 'Unimplemented keys: \\["not"\\]'),
        ({"json": {"type": "strange"}}, "Invalid type: strange"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "cannot be compiled"),
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: nothing"}, 'unknown name: "nothing"'),
    ],
)
def test_what_cannot_be_compiled_is_refused_up_front(llm: LLM, form: dict[str, Any], message: str) -> None:
    good = SamplingParams(max_tokens=2, temperature=0.0)
    for call in (llm.stream, llm.generate):
        with pytest.raises(RequestError, match=message) as caught:
            call("KING:", structured(**form))
        assert str(caught.value).startswith("structured_outputs cannot be compiled: ")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    assert len(llm.generate("KING:", good)[0].outputs[0].token_ids) == 2


def test_a_grammar_that_breaks_ends_its_request_alone(tokenizer: Tokenizer) -> None:
    engine = engine_of(tokenizer)
    other = engine.add(None, [9, 8], SamplingParams(temperature=0.0, max_tokens=9).resolved({}))
    # the grammar has letters alone come, and these are not allowed
    params = structured(regex="[ab]+", allowed_token_ids=tokenizer.encode("x")).resolved({})
    request = engine.add(None, [5], params)
    [plain] = run(engine, other)
    assert isinstance(request.error, RequestError)
    assert "No token is left to choose" in str(request.error)
    assert plain.output_ids == FakeBackend(1, 400, VOCAB).greedy([9, 8], 9)


def test_without_llguidance_one_sentence_says_what_to_install(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r'structured_outputs needs llguidance: pip install "llmx\[struc'):
        engine_of(tokenizer).add(None, [5], structured(regex="a").resolved({}))


def test_a_vocabulary_of_words_is_refused() -> None:
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers import models

    words = Tokenizer(RawTokenizer(models.WordLevel({"a": 0}, unk_token="a")), TokenizerInfo())
    with pytest.raises(RequestError, match="This package's tokenizer cannot be used with structured_outputs: "):
        engine_of(words).add(None, [0], structured(regex="a").resolved({}))
