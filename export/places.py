"""Where a decoder keeps its state between two calls, found by running it at two lengths under fake tensors.

Most take transformers' cache. Some make a cache of their own class, which they return; some keep tensors in attributes of
their modules beside it; those that keep nothing run all tokens anew for each.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from llmx.export.holders import Carried, Path, children, compare, tensors
from llmx.export.known import KnownValues
from llmx.export.lowering import caller_place, class_place, forward_failed
from llmx.export.rope import length_rule, untouched
from llmx.export.shims import fake_tensors, replaced, shimmed
from llmx.export.trace import output_head
from llmx.runtime.errors import LlmxError, UnsupportedModelError
from torch.overrides import TorchFunctionMode
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

# Lengths of the example prompts: different, above 1, and no size that a model is likely to have.
SEQ, _OTHER_SEQ = 11, 13

Noticed = AbstractContextManager[dict[int, dict[Path, float]]]


@dataclass
class State:
    """What is passed from call to call: a cache, tensors in attributes of modules (by the module's name, then the
    attribute's), the tokens so far.
    """

    cache: Any = None
    modules: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class Holder:
    """Where a model keeps what it keeps: in a cache under the name `argument`, which it is given, or which is of a class of
    its own (`own`): it makes one where it is given none, and returns it. Without either, the tokens are the state, and
    each call runs all of them. `prepares`: its first call changes parameters in place (RWKV scales them).
    """

    argument: str | None
    own: bool = False
    prepares: bool = False

    def start(self, config: Any) -> State:
        """The state before the first token."""
        return State(new_cache(config) if self.argument is not None and not self.own else None)

    def call(self, model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, state: State) -> torch.Tensor:
        """The logits of `input_ids`, whose state is put into `state`."""
        if self.argument is None:
            return self._run_all(model, input_ids, state)
        more: dict[str, Any] = {} if self.own and state.cache is None else {self.argument: state.cache}
        with attributes(model, state.modules) as kept:
            output = _call(model, input_ids, position_ids, use_cache=True, **more)
            state.modules = kept()
        state.cache = output[self.argument] if self.own else state.cache
        logits: torch.Tensor = output.logits
        return logits

    def _run_all(self, model: Any, input_ids: torch.Tensor, state: State) -> torch.Tensor:
        count = input_ids.shape[1]
        state.tokens = input_ids if state.tokens is None else torch.cat([state.tokens, input_ids], dim=1)
        logits: torch.Tensor = _call(
            model, state.tokens, torch.arange(state.tokens.shape[1])[None], use_cache=False
        ).logits
        return logits[:, -count:]


def _call(model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool, **more: Any) -> Any:
    taken = inspect.signature(model.forward).parameters
    more |= {"position_ids": position_ids} if "position_ids" in taken else {}
    more |= {"use_cache": use_cache} if "use_cache" in taken else {}
    return model(input_ids=input_ids, **more, return_dict=True)


@contextmanager
def attributes(model: Any, given: dict[str, dict[str, torch.Tensor]]) -> Iterator[Callable[[], Any]]:
    """`given` tensors are in attributes of `model`'s modules meanwhile, where it keeps its state there (`_is_stateful`, as
    transformers says); yields what tells those that were put there since.
    """
    modules = dict(model.named_modules()) if getattr(model, "_is_stateful", False) else {}
    before = {name: dict(vars(module)) for name, module in modules.items()}

    def kept() -> dict[str, dict[str, torch.Tensor]]:
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, module in modules.items():
            for key, value in vars(module).items():
                new = isinstance(value, torch.Tensor) and value is not before[name].get(key)
                if new or key in given.get(name, ()):
                    found.setdefault(name, {})[key] = value
        return found

    for name, values in given.items():
        modules[name].__dict__.update(values)
    try:
        yield kept
    finally:
        for name, values in kept().items():
            for key in values:
                modules[name].__dict__.pop(key)
                modules[name].__dict__.update({key: before[name][key]} if key in before[name] else {})


def new_cache(config: Any) -> DynamicCache:
    """An empty cache of the kind that `generate` makes, but for sliding windows: their layers keep every position, and the
    model's mask hides what has left the window, so that no size depends on the window in a way that a trace would fix.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
            cache.layers[index] = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
        elif type(layer) is DynamicSlidingWindowLayer:  # a model's own kind of it keeps more
            cache.layers[index] = DynamicLayer()
    return cache


def probe_carried(model: torch.nn.Module) -> tuple[Holder, Carried]:
    """Run `model` at two lengths under fake tensors and compare what it keeps.

    Raises UnsupportedModelError for a model whose state cannot be carried; of the places where it may keep it, the first
    one's reason.
    """
    output_head(model)
    if any(vars(module).get("is_decoder") is False for module in model.modules()):
        # its tokens see those after them, which no cache can hold
        raise UnsupportedModelError("its config says is_decoder: false; export it with --task embed or fill-mask")
    if length_rule(model) is not None:
        raise UnsupportedModelError(
            "its rotary factors depend on the sequence's length, which carried state has no input for"
        )
    reason: UnsupportedModelError | None = None
    for find in (_given_cache, _own_cache):
        try:
            holder = find(model)
            if holder is not None:
                carried, prepares = _probe(model, holder)
                return replace(holder, prepares=prepares), carried
        except UnsupportedModelError as error:
            reason = reason or error
    if reason is not None:
        raise reason
    holder = _no_cache(model)
    return holder, _probe(model, holder)[0]


def prepare(model: torch.nn.Module, holder: Holder) -> None:
    """Let `model` change its parameters as its first call does."""
    with torch.no_grad(), untouched(model, real=True):
        holder.call(
            model, torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), holder.start(model.config)
        )


class _Writes(TorchFunctionMode):
    """Whether parameters are written in place meanwhile."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        self.seen = self.seen or (in_place and bool(args) and isinstance(args[0], torch.nn.Parameter))
        return func(*args, **(kwargs or {}))


def _probe(model: torch.nn.Module, holder: Holder) -> tuple[Carried, bool]:
    """What `model` carries, and whether its call writes parameters."""
    states: list[State] = []
    fills: dict[Path, float] = {}
    with (
        torch.no_grad(),
        untouched(model),
        tracing(),
        fake_tensors(),
        shimmed(),
        _Writes() as writes,
        _written() as places,
    ):
        for length in (SEQ, _OTHER_SEQ):
            state = holder.start(model.config)
            noticed: Noticed = _noticed(model) if holder.own else nullcontext({})
            with noticed as seen, _named_failure():
                holder.call(model, torch.ones(1, length, dtype=torch.long), torch.arange(length)[None], state)
            states.append(state)
            fills = seen.get(id(state.cache), {})
    found = compare(
        states[0],
        states[1],
        (SEQ, _OTHER_SEQ),
        where=lambda layer: places.get(layer) or class_place(type(model)),
    )
    found = [replace(tensor, initial=fills.get(tensor.path[1:], 0.0)) for tensor in found]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}{class_place(type(model))} keeps nothing in the cache that it is given, as it would have to"
        )
    return Carried.of(states[0], found), writes.seen


@contextmanager
def _written() -> Iterator[dict[int, str]]:
    """Where in the model's source each layer of transformers' cache was last written, by its number."""
    places: dict[int, str] = {}
    original = Cache.update

    def update(
        cache: Cache, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        places[layer_idx] = caller_place(sys._getframe(1))
        return original(cache, keys, values, layer_idx, *args, **kwargs)

    with replaced(Cache, "update", update):
        yield places


@contextmanager
def _named_failure() -> Iterator[None]:
    try:
        yield
    except LlmxError:
        raise
    except Exception as error:
        raise forward_failed(error, "it would have to run on transformers' DynamicCache") from error


@contextmanager
def _noticed(model: torch.nn.Module) -> Iterator[dict[int, dict[Path, float]]]:
    """What fills the tensors of each structure (by `id`) that is passed to a module, when that first happens, by their paths
    in it. What is not known to be filled with one number is left out.
    """
    seen: dict[int, dict[Path, float]] = {}
    alive = []  # so that no id is used twice

    def notice(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        for value in (*arguments, *named.values()):
            if id(value) in seen or not children(value):
                continue
            alive.append(value)
            fills = {path: known.fill(tensor) for path, tensor in tensors(value)}
            seen[id(value)] = {path: fill for path, fill in fills.items() if fill is not None}

    handles = [module.register_forward_pre_hook(notice, with_kwargs=True) for module in model.modules()]
    try:
        with KnownValues() as known:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _given_cache(model: Any) -> Holder | None:
    """A model that takes transformers' cache."""
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in parameters), None)
    return Holder(name) if name is not None else None


def _own_cache(model: Any) -> Holder | None:
    """A model that makes a cache itself: an output that is an argument as well, and holds tensors."""
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" not in parameters and "past_key_values" not in parameters:
        return None
    with torch.no_grad(), untouched(model), tracing(), fake_tensors(), shimmed(), _named_failure():
        output = _call(model, torch.ones(1, SEQ, dtype=torch.long), torch.arange(SEQ)[None], use_cache=True)
    names = [name for name in output if name in parameters and children(output[name])]
    return next((Holder(name, own=True) for name in names if any(True for _ in tensors(output[name]))), None)


def _no_cache(model: Any) -> Holder:
    """A model whose tokens are its state; raises UnsupportedModelError where `generate` gives it more than the tokens."""
    ids = torch.ones(1, SEQ, dtype=torch.long)
    with _named_failure():
        inputs = model.prepare_inputs_for_generation(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    settings = ("input_ids", "attention_mask", "position_ids", "cache_position")
    more = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and name not in settings]
    if more or not torch.equal(inputs["input_ids"], ids):
        what = f"gives it {', '.join(more)}" if more else "adds tokens of its own"
        source = inspect.unwrap(type(model).prepare_inputs_for_generation).__code__
        raise UnsupportedModelError(
            f"its prepare_inputs_for_generation {what} ({source.co_filename.rpartition('/')[2]}:{source.co_firstlineno}), so "
            "that a token's logits are not those of the tokens before it alone, which is what a package's graphs compute"
        )
    return Holder(None)


@contextmanager
def tracing() -> Iterator[None]:
    """Fake and traced tensors have no address to mark."""
    with replaced(torch._dynamo, "mark_static_address", lambda *_, **__: None):
        yield
