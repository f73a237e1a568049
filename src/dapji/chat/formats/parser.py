"""`Parser`: an answer, piece by piece, into content, reasoning and tool calls, by the grammars of one model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dapji.chat.formats.events import Event
from dapji.chat.formats.reader import Malformed, Marks, Reader, Steps
from dapji.chat.formats.rules import Form, Rules, Wanted

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Grammar(ABC):
    """What some models' answers, or a part of them, look like."""

    @property
    @abstractmethod
    def markers(self) -> Sequence[str]:
        """Every marker whose control tokens `steps` looks for."""

    @abstractmethod
    def steps(self, reader: Reader) -> Steps[None]:
        """Reads its part of an answer, to its own end or to that of the answer. Never raises."""

    def after(self, prompt: str) -> Grammar:
        """As it is for an answer to this prompt, which may have begun it."""
        return self


class WholeAnswers(Grammar):
    """Of a format that says of every part of an answer what it is."""

    @abstractmethod
    def answer(self, rules: Rules, wanted: Wanted) -> str:
        """The expression of an answer. Raises RequestError for what it cannot write."""


class Calls(Grammar):
    """Tool calls that begin with a marker, anywhere in the text."""

    def forms(self, rules: Rules, wanted: Wanted) -> Sequence[Form]:
        """How calls are written, for an answer that must have nothing else. None: this format's cannot be written.
        Raises RequestError for tools that it cannot write."""
        return ()

    def written(self) -> Calls:
        """As it is for an answer that is held to `forms`: what looks like a call in another way is text."""
        return self

    @property
    @abstractmethod
    def openers(self) -> Sequence[str]:
        """The markers that begin a call."""

    @abstractmethod
    def call(self, reader: Reader, opener: str) -> Steps[None]:
        """Reads on after an opener. Raises Malformed where that began no call."""

    def steps(self, reader: Reader) -> Steps[None]:
        while (opener := (yield from reader.pass_until("content", *self.openers))) is not None:
            yield from self.attempt(reader, self.call(reader, opener))

    @staticmethod
    def attempt(reader: Reader, call: Steps[None]) -> Steps[None]:
        """A call, or what was read of it as malformed content. White space from it to the answer's end is markup."""
        try:
            yield from call
        except Malformed:
            reader.content(malformed=True)
            return
        yield from reader.space()
        if reader.at < len(reader.text):
            reader.at = 0
        reader.markup()


@dataclass(frozen=True, kw_only=True)
class MarkedCalls(Calls):
    """Calls between two markers."""

    opener: str
    closer: str | None
    """None: their text tells where they end."""

    @property
    def openers(self) -> Sequence[str]:
        return (self.opener,)

    @property
    def markers(self) -> Sequence[str]:
        return (self.opener,) if self.closer is None else (self.opener, self.closer)


class Parser:
    """Reads one answer. Not for several threads at once."""

    def __init__(
        self,
        *grammars: Grammar,
        control: Iterable[str] = (),
        tools: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """grammars: of the answer's parts, in order; what is left after the last one is content.
        control: spellings of the model's control tokens. A marker that is one counts only where it comes as one.
        tools: JSON schemas, as templates get them; formats that write arguments as plain text read types from them.
        """
        markers = [marker for grammar in grammars for marker in grammar.markers]
        self._reader = Reader(Marks(markers, control), argument_schemas(tools))
        self._run = self._steps(grammars)

    def wants(self, spelling: str) -> bool:
        """Whether a control token is a marker here. All others are no text and need not be fed."""
        return spelling in self._reader.marks

    def feed(self, text: str, *, control: bool = False) -> list[Event]:
        """The events that the next piece completes. `control`: the piece is the spelling of one control token."""
        self._reader.text += self._reader.marks.encode(text) if control else text
        return self._events()

    def finish(self) -> list[Event]:
        """The rest, when no more text comes."""
        self._reader.ended = True
        return self._events()

    def _events(self) -> list[Event]:
        next(self._run, None)
        events, self._reader.events = self._reader.events, []
        return events

    def _steps(self, grammars: Iterable[Grammar]) -> Steps[None]:
        for grammar in grammars:
            yield from grammar.steps(self._reader)
        yield from self._reader.pass_until("content")


def argument_schemas(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By name. A tool is a function's schema, or that under the key `function`."""
    schemas = {}
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters", _NO_PARAMETERS)
            schemas[function["name"]] = parameters if isinstance(parameters, Mapping) else {}
    return schemas
