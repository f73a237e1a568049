"""`Written`: a string that knows which of its characters the template wrote.

Control tokens may come from the template's own text alone. So every string constant of a template is `Written`, and
everything else (messages, tools, variables, results of operations that are not followed here) is an ordinary string.
`Safe` is such a string after the filter `safe`.
What is lost track of thus counts as text, never as the template's. Knows neither jinja nor tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, SupportsIndex

import markupsafe

_TEMPLATE, _OTHER = b"\1", b"\0"
_ENTITIES = {"&": "&amp;", ">": "&gt;", "<": "&lt;", "'": "&#39;", '"': "&#34;"}
"""As markupsafe writes them."""


class Written(str):
    """Immutable like any string. Made by a plain call, none of its characters are the template's."""

    __slots__ = ("_origin",)
    _origin: bytes
    """For every character 1 if the template wrote it, else 0."""

    def __new__(cls, text: str = "", origin: bytes | None = None) -> Self:
        made = super().__new__(cls, text)
        made._origin = _OTHER * len(made) if origin is None else origin
        return made

    @classmethod
    def by_template(cls, text: str) -> Self:
        return cls(text, _TEMPLATE * len(text))

    def all_by_template(self, start: int, end: int) -> bool:
        """Whether the template wrote every character from `start` to before `end`."""
        return self._origin.find(_OTHER, start, end) < 0

    def __str__(self) -> Self:
        return self

    def __add__(self, other: Any) -> Any:
        # Markup must get its turn: it escapes what it is added to. So must others, as what is undefined.
        if isinstance(other, markupsafe.Markup) and not isinstance(self, markupsafe.Markup):
            return NotImplemented
        if not isinstance(other, str) and hasattr(other, "__radd__"):
            return NotImplemented
        if not isinstance(other, str):  # as of any string, which the error names
            raise TypeError(f'can only concatenate str (not "{type(other).__name__}") to str')
        return Written(str.__add__(self, other), self._origin + _origin(other))

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, list | tuple):
            kind = type(other).__name__
            raise TypeError(f'can only concatenate {kind} (not "str") to {kind}')
        if not isinstance(other, str):
            return NotImplemented
        return Written(str.__add__(other, self), _origin(other) + self._origin)

    def __getitem__(self, key: SupportsIndex | slice) -> Written:
        origin = self._origin[key] if isinstance(key, slice) else bytes([self._origin[key]])
        return Written(str.__getitem__(self, key), origin)

    def lstrip(self, chars: str | None = None, /) -> Written:
        text = str.lstrip(self, chars)
        return Written(text, self._origin[len(self) - len(text) :])

    def rstrip(self, chars: str | None = None, /) -> Written:
        text = str.rstrip(self, chars)
        return Written(text, self._origin[: len(text)])

    def strip(self, chars: str | None = None, /) -> Written:
        return self.lstrip(chars).rstrip(chars)

    def join(self, items: Iterable[str], /) -> Written:
        items = list(items)
        return Written(str.join(self, items), self._origin.join(map(_origin, items)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        pieces = str.split(self, sep, maxsplit)
        if sep is None:
            return list(pieces)
        found, at = [], 0
        for piece in pieces:
            found.append(Written(piece, self._origin[at : at + len(piece)]))
            at += len(piece) + len(sep)
        return list(found)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return str.replace(self, old, new, count)
        return Written(new, _origin(new)).join(self.split(old, count))

    def lower(self) -> str:
        return self._same_length(str.lower(self))

    def upper(self) -> str:
        return self._same_length(str.upper(self))

    def title(self) -> str:
        return self._same_length(str.title(self))

    def capitalize(self) -> str:
        return self._same_length(str.capitalize(self))

    def _same_length(self, text: str) -> str:
        return Written(text, self._origin) if len(text) == len(self) else text


class Safe(markupsafe.Markup, Written):  # type: ignore[misc]  # str's methods, each in three signatures
    """What the filter `safe` makes: `Markup`, which escapes the strings that it meets, and still knows its origin."""

    __slots__ = ()

    def __new__(cls, value: Any = "") -> Self:
        text = value if isinstance(value, str) else str(value)
        return Written.__new__(cls, text, _origin(text))

    def __str__(self) -> Written:  # type: ignore[override]
        return Written(str.__str__(self), self._origin)

    def __repr__(self) -> str:
        return f"Markup({str.__repr__(self)})"

    @classmethod
    def escape(cls, value: Any, /) -> Self:
        if isinstance(value, markupsafe.Markup):
            return cls(value)
        text = value if isinstance(value, str) else str(value)
        for character, entity in _ENTITIES.items():
            text = text.replace(character, entity)
        return cls(text)


def _origin(text: str) -> bytes:
    return text._origin if isinstance(text, Written) else _OTHER * len(text)


def joined(pieces: Iterable[str]) -> Written:
    """All pieces one after the other."""
    return Written().join(pieces)
