"""What penalties and n-grams count, against counting anew: after any appends, truncations and forks."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime.history import History

TOKENS = st.integers(0, 5)


def check(history: History, prompt: list[int], output: list[int], size: int) -> None:
    assert history.tokens == prompt + output
    assert (history.num_prompt, history.num_output) == (len(prompt), len(output))
    ids, counts = history.counts()
    found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    assert len(found) == len(ids)
    assert found == {token: Counter(output)[token] for token in {*prompt, *output}}
    tokens, before = prompt + output, size - 1
    runs = [tokens[at : at + size] for at in range(len(tokens) - before)]
    expected = [run[-1] for run in runs if run[:-1] == tokens[len(tokens) - before :]]
    assert sorted(set(history.completions(size))) == sorted(set(expected))


@settings(max_examples=300, deadline=None)
@given(prompt=st.lists(TOKENS, max_size=12), size=st.integers(1, 4), data=st.data())
def test_equals_counting_anew(prompt: list[int], size: int, data: st.DataObject) -> None:
    history, output = History(prompt), []
    for _ in range(data.draw(st.integers(1, 12))):
        step = data.draw(st.sampled_from(["append", "append", "look", "truncate", "fork"]))
        if step == "append":
            more = data.draw(st.lists(TOKENS, min_size=1, max_size=5))
            output = output + more
            for token in more:
                history.append(token)
        elif step == "truncate":
            output = output[: data.draw(st.integers(0, len(output)))]
            history.truncate(len(prompt) + len(output))
        elif step == "fork":
            twin = history.fork()
            for token in data.draw(st.lists(TOKENS, max_size=3)):
                history.append(token)
            history.counts(), history.completions(size)
            history = twin  # what the other did is not seen
        else:
            check(history, prompt, output, size)
    check(history, prompt, output, size)


def test_many_tokens_and_back() -> None:
    tokens = np.random.default_rng(0).integers(0, 5000, 3000).tolist()
    history = History(tokens[:10])
    for token in tokens[10:]:
        history.append(token)
    check(history, tokens[:10], tokens[10:], 2)
    history.truncate(200)
    check(history, tokens[:10], tokens[10:200], 2)
