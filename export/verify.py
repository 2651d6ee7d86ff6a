"""A package against PyTorch: the same tokens through both, logits compared position by position.

The reference is PyTorch's greedy path, each prompt alone; the package follows it teacher-forced, its prompts together
in one batch, prefilled in chunks. Weights are rounded to the package's dtype first and then computed in float32, so
that the tolerance covers the graph's arithmetic alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llmx.export.lowering import quiet
from llmx.export.rope import length_rule, untouched
from llmx.runtime.backend import Backend, recompute
from llmx.runtime.errors import VerificationError
from llmx.runtime.manifest import Verification

#: Largest logit difference, as a part of the largest reference logit (or of 1, whichever is more).
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
_NEW_TOKENS = 16
_PROMPT_LENGTHS = (5, 23, 61)
_WHOLE_PROMPT = 150  # where a prefill graph takes whole prompts: longer than the blocks that recurrences work in
_LONGEST = 1100  # a window longer than this is not crossed: the reference would cost more than the export

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReferencePath:
    """One prompt and PyTorch's greedy continuation. `logits` float32 [len(tokens), vocab], at every position.

    `rope_length`: the length of the prompt that these tokens are, or are the beginning of.
    """

    prompt_length: int
    tokens: np.ndarray  # int64 [prompt_length + _NEW_TOKENS]
    logits: np.ndarray
    rope_length: int


def verify(
    backend: Backend,
    load: Callable[[], Any],
    dtype: str,
    windows: list[int],
    by_length: bool,
    progress: Progress,
    stepwise: bool = False,
    min_prefill: int = 1,
) -> Verification:
    """Compare `backend`'s package with PyTorch's model, that `load` returns in float32 with its weights rounded to `dtype`.
    `by_length`: its rotary factors depend on the length. `stepwise`: the package takes prompts token by token, and shorter
    ones than `min_prefill` in any case.

    Raises VerificationError at the first position where logits differ by more than the tolerance, or where the best
    tokens differ though PyTorch's two best lie further apart than twice the tolerance.
    """
    model = load()
    rule = length_rule(model) if by_length else None
    whole = () if backend.chunked else (_WHOLE_PROMPT,)
    lengths = _prompt_lengths(windows, rule.edge if rule else None, backend.max_length, whole)
    if min_prefill > 1:
        lengths[0] = 1
    paths = []
    with fitting(model, dtype):
        for index, length in enumerate(lengths):
            paths.append(reference_path(model, length, seed=index, stepwise=rule is not None))
            progress(index + 1, 2 * len(lengths))
    beyond = _beginning_of_a_long_prompt(model, 2 * rule.edge, backend.max_length) if rule else None
    del model
    worst, positions, tolerance = 0.0, 0, 0.0
    try:
        comparisons = [_compare_prefill(backend, 0, beyond, dtype)] if beyond else []
        comparisons += [_compare_prefill(backend, row, path, dtype) for row, path in enumerate(paths)]
        progress(2 * len(lengths) - 1, 2 * len(lengths))
        comparisons.append(_compare_decode(backend, paths, dtype))
    except VerificationError:
        if stepwise:
            _check_steps(load(), paths)
        raise
    progress(2 * len(lengths), 2 * len(lengths))
    for difference, count, allowed in comparisons:
        if difference >= worst:
            worst, tolerance = difference, allowed
        positions += count
    return Verification("passed", max_abs_diff=worst, tolerance=tolerance, positions=positions)


@contextmanager
def fitting(model: torch.nn.Module, dtype: str) -> Iterator[None]:
    """Raises VerificationError at the end where float32 `model`, run meanwhile, passed values between its modules that
    float16 cannot hold. The CPU provider computes float16 graphs in float32 and would not show it; others overflow.
    """
    largest, place = 0.0, ""

    def note(name: str, tensors: Any) -> None:
        nonlocal largest, place
        for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                top = float(tensor.abs().max())
                if top > largest:
                    largest, place = top, name

    handles = []
    for name, module in model.named_modules() if dtype == "float16" else ():
        handles.append(module.register_forward_hook(lambda _, __, output, name=name: note(name, output)))
        if isinstance(module, torch.nn.Linear):  # products of gates and values pass between modules here alone
            handles.append(module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if largest > torch.finfo(torch.float16).max:
        raise VerificationError(
            f"The model overflows float16, which ends at 65504: {largest:.3g} passes through {place}; export with --dtype "
            "bf16 or fp32."
        )


def _prompt_lengths(windows: list[int], edge: int | None, max_length: int, more: tuple[int, ...] = ()) -> list[int]:
    """Lengths that cross a window, and the `edge` past which rotary factors change: in the prompt, and while decoding."""
    lengths = [*_PROMPT_LENGTHS, *more]
    if edge is not None and edge + 9 <= _LONGEST:
        lengths = [5, max(1, edge - 7), edge + 9]
    crossed = [w + 9 for w in windows if w + 9 > max(lengths) and w + 9 <= _LONGEST]
    lengths += crossed[:1]
    return [length for length in lengths if length + _NEW_TOKENS <= max_length] or [max(1, max_length - _NEW_TOKENS)]


def reference_path(
    model: Any, length: int, seed: int, new_tokens: int = _NEW_TOKENS, stepwise: bool = False
) -> ReferencePath:
    """A random prompt of `length` tokens, continued greedily by PyTorch, with the logits of every position.

    They are what `generate` computes: of a pass over the prompt, then of each step with its cache. `stepwise`: what the cache
    holds depends on the length at which it was written, so that a pass over all of it computes something else.
    """
    prompt = _random_prompt(model, length, seed)
    tokens, steps = _greedy_steps(model, prompt, new_tokens + 1)
    tokens = tokens[:, :-1]
    whole = _logits(model, prompt if stepwise else tokens)
    if not stepwise:
        _check_reference(tokens[0].numpy(), whole, length)
    logits = np.concatenate([whole[:length], steps[1:]])
    return ReferencePath(length, tokens[0].numpy(), logits, length)


def _random_prompt(model: Any, length: int, seed: int) -> torch.Tensor:
    vocab = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


def _logits(model: Any, tokens: torch.Tensor, **more: Any) -> np.ndarray:
    """float32 [tokens, vocab] of the first row, without a cache."""
    # generate's positions: some models would count others themselves
    if "position_ids" in inspect.signature(model.forward).parameters:
        more = {"position_ids": torch.arange(tokens.shape[1])[None]} | more
    with torch.no_grad(), untouched(model, real=True):
        logits: np.ndarray = model(input_ids=tokens, use_cache=False, **more).logits[0].float().numpy()
    return logits


def _beginning_of_a_long_prompt(model: Any, rope_length: int, max_length: int) -> ReferencePath:
    """The first tokens of a prompt of `rope_length`, at the cost of those tokens alone.

    A second row, which stands at the prompt's last position, has transformers choose the long prompt's factors for both.
    """
    length = min(_PROMPT_LENGTHS[-1], rope_length, max_length)
    prompt = _random_prompt(model, length, seed=len(_PROMPT_LENGTHS)).expand(2, -1)
    positions = torch.arange(length).repeat(2, 1)
    positions[1, -1] = rope_length - 1
    logits = _logits(model, prompt, position_ids=positions, attention_mask=torch.ones_like(prompt))
    return ReferencePath(length, prompt[0].numpy(), logits, rope_length)


def _check_reference(tokens: np.ndarray, logits: np.ndarray, length: int) -> None:
    """Raises VerificationError where the model with its cache goes another way than without: there is no truth to equal."""
    for position in range(length, len(tokens)):
        row = logits[position - 1]
        lead = float(row.max() - row[tokens[position]])
        if lead > 2 * TOLERANCE["float32"] * max(1.0, float(np.abs(row).max())):
            raise VerificationError(
                f"PyTorch disagrees with itself at position {position}: with its cache it chooses token {tokens[position]}, "
                f"without {int(row.argmax())} (by {lead:.3g}); report it to transformers."
            )


def _check_steps(model: Any, paths: list[ReferencePath]) -> None:
    """Raises VerificationError where PyTorch's own single steps over a prompt differ from its pass over the whole."""
    for path in paths:
        steps = _stepwise_logits(model, torch.from_numpy(path.tokens)[None])
        difference = float(np.abs(steps - path.logits).max())
        allowed = TOLERANCE["float32"] * max(1.0, float(np.abs(path.logits).max()))
        if not difference <= allowed:
            raise VerificationError(
                f"PyTorch disagrees with itself: its steps over {len(path.tokens)} single tokens, which are all that can be "
                f"traced of this model, give logits that differ by {difference:.3g} (tolerance {allowed:.3g}) from its pass "
                "over all of them at once, so no package can equal both; report it to transformers."
            )


def _stepwise_logits(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """float32 [n, vocab] after each of int64 [1, n] `tokens`, given to PyTorch's model one by one with a cache."""
    from llmx.export.places import probe_carried

    _logits(model, tokens)  # a first call may change parameters, which probing would do as well
    holder, _ = probe_carried(model)
    state, rows = holder.start(model.config), []
    with torch.no_grad(), untouched(model, real=True):
        for at in range(tokens.shape[1]):
            logits = holder.call(model, tokens[:, at : at + 1], torch.tensor([[at]]), state)
            rows.append(logits[0, -1].float().numpy())
    return np.array(rows)


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """transformers' greedy `generate` for exactly `new_tokens` tokens: [1, length] -> [1, length + new_tokens]."""
    return _greedy_steps(model, prompt, new_tokens)[0]


def _greedy_steps(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, np.ndarray]:
    """`greedy`, and the logits [new_tokens, vocab] that each token was chosen from. A fresh model's, whatever ran before."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad(), quiet(), untouched(model, real=True):
        original, model.generation_config = model.generation_config, config
        try:
            result = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        finally:
            model.generation_config = original
    return result.sequences, torch.cat(result.logits).float().numpy()


Comparison = tuple[float, int, float]  # largest difference, positions compared, tolerance


def _compare_prefill(backend: Backend, slot: int, path: ReferencePath, dtype: str) -> Comparison:
    """Prefill `path`'s prompt into `slot`, asking for the logits of every position; in two chunks where the package takes
    chunks.
    """
    worst, tolerance = 0.0, 0.0
    split = max(1, path.prompt_length * 2 // 3) if backend.chunked else path.prompt_length
    for start, end in ((0, split), (split, path.prompt_length)):
        if start < end:
            asked = np.arange(end - start)
            logits = backend.prefill(slot, path.tokens[start:end], start, asked, path.rope_length)
            difference, tolerance = check_logits(
                logits, path.logits[start:end], dtype, f"row {slot}, prefill position", start
            )
            worst = max(worst, difference)
    return worst, path.prompt_length, tolerance


def _compare_decode(backend: Backend, paths: list[ReferencePath], dtype: str) -> Comparison:
    """All rows in one batch, one token a step, fed PyTorch's tokens."""
    worst, tolerance = 0.0, 0.0
    for step in range(_NEW_TOKENS):
        lengths = [path.prompt_length + step for path in paths]
        tokens = np.array([path.tokens[length] for path, length in zip(paths, lengths, strict=True)])
        for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
            if length == backend.recompute_at:
                recompute(backend, row, path.tokens[:length], length)
        logits = backend.decode(tokens, np.array(lengths)).rows()
        for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
            place = f"row {row}, decode position"
            difference, allowed = check_logits(
                logits[row : row + 1], path.logits[length : length + 1], dtype, place, length
            )
            worst, tolerance = max(worst, difference), max(tolerance, allowed)
    return worst, _NEW_TOKENS * len(paths), tolerance


def check_logits(got: np.ndarray, want: np.ndarray, dtype: str, place: str, first: int) -> tuple[float, float]:
    """(largest difference, tolerance) of logits [n, vocab]; raises VerificationError past it."""
    got = got.astype(np.float32)[:, : want.shape[1]]
    tolerance = TOLERANCE[dtype] * max(1.0, float(np.abs(want).max()))
    difference = np.abs(got - want).max(axis=1)
    chosen, best = got.argmax(axis=1), want.argmax(axis=1)
    top_two = np.partition(want, -2, axis=1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > 2 * tolerance
    wrong = ~(difference <= tolerance) | ((chosen != best) & clear)  # `not <=` so that NaN is wrong
    if wrong.any():
        at = int(np.argmax(wrong))
        raise VerificationError(
            f"ONNX and PyTorch disagree at {place} {first + at}: logits differ by {difference[at]:.3g} (tolerance "
            f"{tolerance:.3g}); the best token is {best[at]} in PyTorch ({want[at, best[at]]:.4f}) and {chosen[at]} in "
            f"ONNX ({got[at, chosen[at]]:.4f})."
        )
    return float(difference.max()), tolerance
