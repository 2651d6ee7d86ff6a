"""Request fields that come from SamplingParams: every one that it has, under its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from llmx.runtime.params import SamplingParams
from llmx.serve.errors import bad_request
from pydantic import BaseModel, ConfigDict, create_model

#: SamplingParams' fields that have a meaning, or a form, of their own in the API.
_OWN = {"n", "max_tokens", "logprobs", "stop", "prompt_logprobs", "logit_bias", "structured_outputs"}
#: OpenAI's sampling fields: declared whether or not SamplingParams has them yet.
_OPENAI: dict[str, Any] = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "structured_outputs": {}}


class Body(BaseModel):
    """A request body: JSON types as they are, unknown fields refused."""

    model_config = ConfigDict(strict=True, extra="forbid")


def _simple() -> dict[str, Any]:
    """Fields of plain JSON types, each optional."""
    hints = get_type_hints(SamplingParams)
    found: dict[str, Any] = {}
    for field in fields(SamplingParams):
        hint = hints[field.name]
        if field.name not in _OWN and _is_plain(hint):
            found[field.name] = (_json_type(hint) | None, None)
    return found


def _is_plain(hint: Any) -> bool:
    parts = getattr(hint, "__args__", None)
    if parts:
        return all(_is_plain(part) for part in parts)
    return hint in (int, float, bool, str, type(None))


def _json_type(hint: Any) -> Any:
    """`Sequence[int]` as the list that JSON has."""
    from collections.abc import Sequence
    from typing import get_args, get_origin

    if get_origin(hint) is Sequence:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    if get_origin(hint) is Mapping:
        return dict[get_args(hint)]  # type: ignore[misc]
    members = get_args(hint)
    if members:
        union = _json_type(members[0])
        for member in members[1:]:
            union = union | _json_type(member)
        return union
    return hint


if TYPE_CHECKING:

    class SamplingFields(Body):
        seed: int | None = None

else:
    SamplingFields = create_model("SamplingFields", __base__=Body, **_simple())


class Sampling(SamplingFields):
    """What completions and chat have in common."""

    n: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None


def sampling_params(body: Sampling, **given: Any) -> SamplingParams:
    """`body`'s sampling fields and `given`, None meaning "not given". Raises RequestError naming the field, ApiError for a
    field that this llmx does not have.
    """
    known = {field.name for field in fields(SamplingParams)}
    values: dict[str, Any] = {}
    for name in (known | set(_OPENAI)) & set(type(body).model_fields):
        value = getattr(body, name)
        if value is None or name in given:
            continue
        if name in known:
            values[name] = _bias(value) if name == "logit_bias" else value
        elif value != _OPENAI[name]:
            raise bad_request(f"{name} is not supported by this version; leave it out.", name, "unsupported_parameter")
    return SamplingParams(**values, **{name: value for name, value in given.items() if value is not None})


def places(body: Sampling, prompts: int = 1) -> tuple[int, str]:
    """How many slots a request may hold at a time, and the field that says so."""
    beams = getattr(body, "num_beams", None) or 1
    wanted = {"n": body.n or 1, "num_beams": beams, "best_of": getattr(body, "best_of", None) or 1}
    param = max(wanted, key=lambda name: wanted[name])
    return prompts * wanted[param], param if wanted[param] > 1 else "prompt"


def _bias(value: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise bad_request("logit_bias must map token ids to numbers from -100 to 100.", "logit_bias") from None
