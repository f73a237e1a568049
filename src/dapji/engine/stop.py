"""`StopStrings`: finds stop strings in text that arrives in pieces, and holds back what may become one.

Pure strings: knows neither tokens nor tokenizers. The layer that turns tokens into text feeds it (`Request.stop`).
"""

from __future__ import annotations

from collections.abc import Iterable

from dapji.errors import RequestError


class StopStrings:
    """Passes text on up to the first stop string; the outcome does not depend on where the pieces are cut.

    The first stop string to be complete wins; of several complete at the same character, the longest.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """Raises RequestError for an empty stop string."""
        self._stops = tuple(stops)
        if "" in self._stops:
            raise RequestError(f"a stop string must not be empty, got {self._stops!r}", hint="leave it out")
        self._held = ""
        self.found: str | None = None
        """The stop string that was met; nothing is passed on after it."""

    def feed(self, text: str) -> str:
        """Takes the next piece; returns what can no longer be part of a stop string ("" once one is found)."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = self._held_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held back, when the text ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)
