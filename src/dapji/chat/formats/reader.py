"""`Reader`: a cursor over text that is still arriving, with the steps that grammars of answers are made of.

A step is a generator: it yields where it needs more text, and is resumed when there is more or the text has ended. So a
grammar reads like a parser of a whole text, and every cut of a stream gives the same events. Knows no format.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping
from typing import Any, TypeVar

from dapji.chat.formats.events import Content, Event, Markup, Reasoning, ToolCall
from dapji.chat.schema import resolved, with_definitions

T = TypeVar("T")
Steps = Generator[None, None, T]

MAX_DEPTH = 64
"""Of brackets in arguments."""
_SPACE = re.compile(r"\s*")
PLAIN_NAME = re.compile(r"[^\s()\[\]{}<>\"'`,;=\ud800-\udfff]*")
_NOTATIONS = {
    "json": (re.compile(r'[^"\[\]{}]+|["\[\]{}]'), '"', "[{", "]}"),
    "python": (re.compile(r"[^\"'()\[\]{}]+|[\"'()\[\]{}]"), "\"'", "([{", ")]}"),
}
"""What stands outside strings, quotation marks, brackets."""
_INSIDE = {
    quote: re.compile(rf"[^{quote[0]}\\]+|\\.|{quote}|{quote[0]}", re.DOTALL) for quote in ('"', "'", '"""', "'''")
}
_FIRST_MARK = 0xD800


class Malformed(Exception):
    """The text is not what the format has here."""


class Marks:
    """Control tokens as characters, so that a marker and the same letters typed as text stay apart.

    A control token that occurs in a format's markers stands in the text as one surrogate, a code point that no decoded
    text has. Markers that are no control tokens of this model are ordinary letters.
    """

    def __init__(self, markers: Iterable[str], control: Iterable[str]) -> None:
        found = sorted({s for s in control if any(s in marker for marker in markers)}, key=lambda s: (-len(s), s))
        self._characters = {spelling: chr(_FIRST_MARK + i) for i, spelling in enumerate(found)}
        self._spellings = {ord(char): spelling for spelling, char in self._characters.items()}
        self._known: dict[str, str] = {}

    def __contains__(self, spelling: str) -> bool:
        return spelling in self._characters

    def encode(self, marker: str) -> str:
        """The marker as it stands in the text."""
        if marker not in self._known:
            encoded = marker
            for spelling, char in self._characters.items():  # the longest first
                encoded = encoded.replace(spelling, char)
            self._known[marker] = encoded
        return self._known[marker]

    def decode(self, text: str) -> str:
        """With the spellings of control tokens."""
        return text.translate(self._spellings)


class Reader:
    """The text from the first character that no event has yet. Markers are given to steps as they are spelled."""

    def __init__(self, marks: Marks, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        """`schemas`: name of a tool -> JSON schema of its arguments; empty where the tools are not known."""
        self.marks = marks
        self.schemas = schemas
        self.text = ""
        self.at = 0
        """The cursor; what is before it waits for its event."""
        self.ended = False
        self.events: list[Event] = []

    # Events: each takes the text up to the cursor.

    def _take(self) -> str:
        taken, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        return self.marks.decode(taken)

    def content(self, *, malformed: bool = False) -> None:
        if self.at:
            self.events.append(Content(text=self._take(), malformed=malformed))

    def reasoning(self) -> None:
        if self.at:
            self.events.append(Reasoning(text=self._take()))

    def markup(self) -> None:
        if self.at:
            self.events.append(Markup(text=self._take()))

    def tool_call(self, name: str, arguments: str, id: str | None = None) -> None:
        self.events.append(ToolCall(text=self._take(), name=name, arguments=arguments, id=id))

    def schema(self, tool: str, argument: str) -> Any:
        """JSON schema of an argument; None where it is not known."""
        root = self.schemas.get(tool, {})
        whole = resolved(root, root)
        properties = whole.get("properties") if isinstance(whole, Mapping) else None
        found = properties.get(argument) if isinstance(properties, Mapping) else None
        return with_definitions(found, root) if isinstance(found, Mapping) else None

    # Steps. The texts that they give have control tokens by their spelling.

    def more(self) -> Steps[None]:
        """Wait for more text; raises Malformed at the end of the answer, with all text behind the cursor."""
        if self.ended:
            self.at = len(self.text)
            raise Malformed
        yield

    def space(self) -> Steps[None]:
        """Over white space; the text after it has begun, or ended."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.at = match.end()
            if self.at < len(self.text) or self.ended:
                return
            yield

    def sees(self, *markers: str) -> Steps[str | None]:
        """The longest of the markers that stands at the cursor; None where there is none."""
        encoded = sorted(((self.marks.encode(marker), marker) for marker in markers), key=lambda pair: -len(pair[0]))
        while True:
            rest = self.text[self.at : self.at + len(encoded[0][0])]
            for mark, marker in encoded:
                if rest.startswith(mark):
                    return marker
                if mark.startswith(rest) and not self.ended:
                    break  # it may become this one
            else:
                return None
            yield

    def accept(self, *markers: str) -> Steps[str | None]:
        """As `sees`; and over that marker."""
        found = yield from self.sees(*markers)
        if found is not None:
            self.at += len(self.marks.encode(found))
        return found

    def expect(self, *markers: str) -> Steps[str]:
        """As `accept`; raises Malformed where there is none."""
        found = yield from self.accept(*markers)
        if found is None:
            raise Malformed
        return found

    def closed_by(self, marker: str | None) -> Steps[bool]:
        """Over white space and the marker: whether it is there. The answer's end stands for it; None always is."""
        if marker is None:
            return True
        yield from self.space()
        return (yield from self.accept(marker)) is not None or (self.ended and self.at == len(self.text))

    def name(self) -> Steps[str]:
        """Over a function's or a parameter's name. Raises Malformed where there is none."""
        while True:
            match = PLAIN_NAME.match(self.text, self.at)
            assert match is not None
            if match.end() == len(self.text):
                yield from self.more()
                continue
            if not match[0]:
                raise Malformed
            self.at = match.end()
            return match[0]

    def until(self, *markers: str) -> Steps[tuple[str, str]]:
        """Over the first of the markers: the text before it, and which it is. Raises Malformed where none comes."""
        begin = searched = self.at
        pattern, names = self._pattern(markers)
        longest = max(map(len, names))
        while (match := pattern.search(self.text, searched)) is None:
            searched = max(begin, len(self.text) - longest + 1)
            yield from self.more()
        self.at = match.end()
        return self.marks.decode(self.text[begin : match.start()]), names[match[0]]

    def pass_until(self, kind: str, *markers: str) -> Steps[str | None]:
        """Make `content` or `reasoning` of all text before the first of the markers, as it comes; go over that marker.

        White space before a marker is held back and belongs to it. None: the answer ended without one.
        """
        emit = self.content if kind == "content" else self.reasoning
        pattern, names = self._pattern(markers)
        while True:
            match = pattern.search(self.text) if markers else None
            if match is None and self.ended:
                self.at = len(self.text)
                emit()
                return None
            self.at = match.start() if match else len(self.text) - self._begun(names)
            if markers:
                self.at = len(self.text[: self.at].rstrip())
            after = match.end() - self.at if match else 0
            emit()
            if match:
                self.at = after
                return names[match[0]]
            yield

    def bracketed(self, language: str) -> Steps[str]:
        """Over a list or mapping of "json" or "python": all from its bracket to the one that closes it.

        Brackets in strings do not count. Whether the inside is right is not looked at. Raises Malformed.
        """
        while self.at == len(self.text):
            yield from self.more()
        if self.text[self.at] not in "[{":
            raise Malformed
        outside, quotes, opening, closing = _NOTATIONS[language]
        begin, depth, quote = self.at, 0, ""
        while True:
            match = (_INSIDE[quote] if quote else outside).match(self.text, self.at)
            token = match[0] if match else ""
            if not token or (language == "python" and token in quotes and self._may_grow(token)):
                yield from self.more()
                continue
            if quote:
                quote = "" if token == quote else quote
            elif token in quotes:
                triple = self.text[self.at : self.at + 3]
                quote = token = triple if language == "python" and triple == token * 3 else token
            elif token in opening:
                depth += 1
            elif token in closing:
                depth -= 1
            self.at += len(token)
            if depth > MAX_DEPTH:
                raise Malformed
            if depth == 0 and not quote:
                return self.marks.decode(self.text[begin : self.at])

    def _may_grow(self, quote: str) -> bool:
        """Whether a quotation mark at the end of the text may become one of three."""
        return not self.ended and self.text[self.at :] in (quote, quote * 2)

    def _pattern(self, markers: Iterable[str]) -> tuple[re.Pattern[str], dict[str, str]]:
        names = {self.marks.encode(marker): marker for marker in markers}
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))), names

    def _begun(self, markers: Iterable[str]) -> int:
        """Length of the longest end of the text that begins a marker."""
        longest = max(map(len, markers), default=1) - 1
        ends = (self.text[-n:] for n in range(min(longest, len(self.text)), 0, -1))
        return next((len(end) for end in ends if any(marker.startswith(end) for marker in markers)), 0)
