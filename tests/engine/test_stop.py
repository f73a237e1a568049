"""Stop strings, however the text is cut into pieces, against a search character by character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapji.engine.stop import StopStrings
from dapji.errors import RequestError


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grow the text by a character at a time; stop at the first that completes a stop string, the longest of them."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


letters = st.text("ab한", max_size=30)


@given(
    pieces=st.lists(letters, max_size=12),
    stops=st.lists(st.text("ab한", min_size=1, max_size=5), max_size=3),
)
def test_every_cut_gives_the_same_text(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    passed, fed = "", ""
    for piece in pieces:
        fed += piece
        passed += finder.feed(piece)
        if finder.found is None:  # only what may still become a stop string is held back
            held = fed.removeprefix(passed)
            assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    passed += finder.flush()
    assert (passed, finder.found) == expected("".join(pieces), stops)
    if finder.found is not None:
        assert finder.feed("more") == ""


def test_what_cannot_become_a_stop_string_is_passed_on_at_once() -> None:
    finder = StopStrings(["</answer>", "\n\n"])
    assert finder.feed("one <b") == "one <b"
    assert finder.feed(" two </ans") == " two "
    assert finder.feed("x\n") == "</ansx"
    assert finder.feed("\nrest") == ""
    assert finder.found == "\n\n"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        StopStrings(["a", ""])
