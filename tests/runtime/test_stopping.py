"""Stop strings in a stream against a naive reading, one character at a time, of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmx.runtime.stopping import StopChecker


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Read on until what was read ends with a stop string (the longest of several, which starts first)."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[list[str], str | None]:
    checker = StopChecker(stops, include)
    return [*(checker.push(piece) for piece in pieces), checker.finish()], checker.matched


ALPHABET = st.text("ab\n", max_size=5)


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(ALPHABET, max_size=14),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_equals_reading_character_by_character(pieces: list[str], stops: list[str], include: bool) -> None:
    shown, matched = run(pieces, stops, include)
    assert ("".join(shown), matched) == naive("".join(pieces), stops, include)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(ALPHABET, max_size=14), stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4))
def test_holds_back_the_least_that_is_safe(pieces: list[str], stops: list[str]) -> None:
    checker = StopChecker(stops)
    shown, read = "", ""
    for piece in pieces:
        shown += checker.push(piece)
        read += piece
        if checker.matched is not None:
            return
        held = read[len(shown) :]
        # Everything held is the beginning of some stop string, and no longer suffix of the text is one.
        assert held == "" or any(stop.startswith(held) for stop in stops)
        longer = [read[at:] for at in range(len(shown))]
        assert not any(stop.startswith(suffix) for stop in stops for suffix in longer)


def test_across_pieces() -> None:
    assert run(["one S", "TO", "P two"], ["STOP"]) == (["one ", "", "", ""], "STOP")
    assert run(["one S", "TO", "P two"], ["STOP"], include=True) == (["one ", "", "STOP", ""], "STOP")


def test_a_false_alarm_is_shown_in_full() -> None:
    assert run(["a ST", "OR", "E"], ["STOP"]) == (["a ", "STOR", "E", ""], None)
    assert run(["aab", "aac"], ["aabaad"]) == (["", "aabaac", ""], None)
    assert run(["x ST"], ["STOP"]) == (["x ", "ST"], None)


def test_what_restarts_inside_a_failed_match_is_found() -> None:
    assert run(["aaa", "ab"], ["aab"]) == (["a", "a", ""], "aab")


def test_the_match_complete_first_wins_then_the_one_that_starts_first() -> None:
    assert run(["abcd"], ["abcd", "bc"]) == (["a", ""], "bc")
    assert run(list("abcd"), ["abcd", "bc"])[1] == "bc"
    assert run(["xabc"], ["bc", "abc"]) == (["x", ""], "abc")
    assert run(["xabc"], ["abc", "bc"]) == (["x", ""], "abc")


def test_nothing_follows_a_match() -> None:
    checker = StopChecker(["."])
    assert checker.push("a. b. c") == "a"
    assert (checker.push("more"), checker.finish(), checker.matched) == ("", "", ".")


def test_text_before_min_tokens_is_no_match() -> None:
    checker = StopChecker(["END"])
    assert checker.push("END E", armed=False) == "END E"
    assert checker.push("ND") == "ND"
    assert checker.push("END") == ""
    assert checker.matched == "END"


@pytest.mark.parametrize("include", [True, False])
def test_no_stop_strings(include: bool) -> None:
    assert run(["a", "", "b"], [], include) == (["a", "", "b", ""], None)


def test_long_stop_strings_stay_cheap() -> None:
    stop = "ab" * 2000 + "!"
    pieces = ["ab"] * 3000
    shown, matched = run(pieces, [stop])
    assert ("".join(shown), matched) == ("ab" * 3000, None)
