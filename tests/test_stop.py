"""Stop strings in a streamed text: the same result however the text is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.generate import StopStrings


def stream(stops: Sequence[str], pieces: Sequence[str]) -> tuple[list[str], str, str | None]:
    """What is shown of `pieces`, piece by piece, what the end flushes, and the stop string found."""
    matcher = StopStrings(stops)
    shown = [matcher.push(piece) for piece in pieces]
    return shown, matcher.flush(), matcher.matched


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "flushed", "matched"),
    [
        ((), ["a", "b"], ["a", "b"], "", None),
        (("END",), ["one E", "N", "D two"], ["one ", "", ""], "", "END"),
        (("END",), ["one E", "N", "d"], ["one ", "", "ENd"], "", None),
        (("END",), ["one EN"], ["one "], "EN", None),
        (("END",), ["ENEND"], ["EN"], "", "END"),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""], "", "aab"),
        (("\n\n", "User:"), ["Hi\n", "User", ": x"], ["Hi", "\n", ""], "", "User:"),
        (("bc", "abcd"), ["abcd"], ["a"], "", "bc"),
        (("bc", "abc"), ["xabc"], ["x"], "", "abc"),
        (("ab", "abc"), ["abc"], [""], "", "ab"),
        (("停止。",), ["好的停", "止", "。再见"], ["好的", "", ""], "", "停止。"),
        (("👩‍💻",), ["a👩", "‍", "💻b"], ["a", "", ""], "", "👩‍💻"),
        (("é",), ["e", "\u0301", "é"], ["e", "\u0301", ""], "", "é"),
    ],
)
def test_examples(
    stops: tuple[str, ...], pieces: list[str], shown: list[str], flushed: str, matched: str | None
) -> None:
    assert stream(stops, pieces) == (shown, flushed, matched)


letters = st.text(alphabet="abé", max_size=30)


@given(text=letters, stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3), data=st.data())
def test_the_cut_does_not_matter_and_nothing_is_shown_too_early(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    pieces = list[str]()
    while (done := len("".join(pieces))) < len(text):
        pieces.append(text[done : done + data.draw(st.integers(1, 5))])

    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    _, cut, matched = min(ends) if ends else (0, len(text), None)
    shown, flushed, found = stream(stops, pieces)
    assert "".join(shown) + flushed == text[:cut]
    assert found == matched

    for n in range(len(pieces)):  # all that is held back could still become a stop string
        so_far = "".join(pieces[: n + 1])
        held = so_far[len("".join(shown[: n + 1])) :]
        if held and not any(stop in so_far for stop in stops):
            assert any(stop.startswith(held) for stop in stops)


def test_nothing_comes_after_the_stop_string() -> None:
    matcher = StopStrings(["."])
    assert matcher.push("a.b") == "a"
    assert matcher.push("c") == ""
    assert matcher.flush() == ""
