"""`Rules`: the rules of one answer's grammar, as llguidance reads them (Lark's notation with its extensions).

What formats write them with: text and markers, JSON of a schema, and free text that ends where a marker stands. Knows
no format; control tokens come as spellings with their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dapji.chat.formats.reader import Marks
from dapji.chat.schema import prepared
from dapji.errors import RequestError

CONTENT = "@content"
"""The expression of what the content must be: a grammar of its own."""
SPACE = r"[ \t\r\n]{0,16}"
"""A regular expression of what may stand between markers, where it means nothing: bounded, as models go on and on."""
_ANY = "(?s:.*)"


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """Which tools an answer may call."""

    required: bool = False
    """It consists of calls, besides its reasoning."""
    names: frozenset[str] | None = None
    """Of the tools that it may call; None: all."""
    parallel: bool = True
    """It may have several calls."""

    def of(self, tools: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those that may be called. Raises RequestError for a name that none of them or two have, and where there are
        none to call."""
        named: dict[Any, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if name in named and name is not None:
                raise RequestError(f"two tools are called {name!r}")
            named[name] = tool
        if unknown := (self.names or frozenset()) - named.keys():
            told = ", ".join(sorted(map(str, named))) or "there are none"
            raise RequestError(f"tool_choice names {min(unknown)!r}, which is not among the tools: {told}")
        chosen = [tool for name, tool in named.items() if self.names is None or name in self.names]
        if self.required and not chosen:
            raise RequestError("tool_choice asks for a call, and there are no tools to call")
        return chosen


ANY_TOOL = ToolChoice()
"""Content, or calls of any tools."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way to write calls: how they begin, and what follows that."""

    opener: str
    """A marker, anywhere in the text; with `bare` a regular expression (that Python and llguidance read alike) that the
    whole answer begins with."""
    rest: str
    """An expression."""
    bare: bool = False
    last: bool = False
    """Nothing may follow."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an answer must be."""

    tools: Mapping[str, Mapping[str, Any]]
    """Those that may be called: name -> JSON schema of its arguments."""
    required: bool
    """It must be calls."""
    parallel: bool
    """There may be several."""
    content: bool
    """Where there are no calls, it is `CONTENT`; else text."""

    @property
    def free(self) -> bool:
        """Whether there may be text that is anything."""
        return not (self.required or self.content)


class Rules:
    """Of one answer. Expressions are text; methods that give one add the rules that it refers to."""

    def __init__(self, markers: Iterable[str], control: Mapping[str, int]) -> None:
        """markers: all of the format; those among `control` are written as tokens."""
        self._marks = Marks(markers, control)
        self._tokens = {self._marks.encode(s): f"<[{id}]>" for s, id in control.items() if s in self._marks}
        self._lines: list[str] = []
        self._names: dict[str, str] = {}
        self.space = self.rule(f"/{SPACE.replace('{0,', '{1,')}/") + "?"
        """An expression of `SPACE`."""

    def source(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {start}", *self._lines, ""])

    def rule(self, body: str, attributes: str = "") -> str:
        """The name of the rule with this body."""
        known = self._names.get(attributes + body)
        if known is None:
            known = self._names[attributes + body] = f"r{len(self._names)}"
            self.define(known + attributes, body)
        return known

    def define(self, name: str, body: str) -> None:
        """A rule with a name of its own, so that it can refer to itself."""
        self._lines.append(f"{name}: {body}")

    def json(self, schema: Any, where: str) -> str:
        """JSON that is valid under a schema. Raises RequestError, which says where."""
        return self.rule(f"%json {json.dumps(prepared(schema, where), ensure_ascii=False)}")

    def text(self, text: str) -> str:
        """This text; markers in it as such."""
        parts: list[str] = []
        for part in re.findall(r"[\ud800-\udfff]|[^\ud800-\udfff]+", self._marks.encode(text)):
            parts.append(self._tokens.get(part) or self.literal(part))
        return " ".join(parts)

    @staticmethod
    def literal(text: str) -> str:
        """This text, without markers."""
        return json.dumps(text, ensure_ascii=False)

    def terminal(self, body: str) -> str:
        """The name of a terminal: one lexeme, in which `&`, `~` and `|` are of whole languages."""
        known = self._names.get(body)
        if known is None:
            known = self._names[body] = f"T{len(self._names)}"
            self.define(known, body)
        return known

    def one_of(self, expressions: Iterable[str]) -> str:
        return self.rule(" | ".join(expressions))

    def is_token(self, marker: str) -> bool:
        """Whether a marker begins with a control token, so that no text can be taken for it."""
        return self._marks.encode(marker)[0] in self._tokens

    def begun(self, form: Form) -> str:
        """The form alone, with no text before it."""
        begin = self.rule(f"/{form.opener}/", "[lazy]") if form.bare else self.text(form.opener)
        return f"{begin} {form.rest}"

    def until(self, *forms: Form, end: bool = False) -> str:
        """Free text up to the first of the forms, and that. end: or to the end of the answer, or nothing at all."""
        bare = [form for form in forms if form.bare]
        tokens = [form for form in forms if not form.bare and self.is_token(form.opener)]
        letters = [form for form in forms if not form.bare and not self.is_token(form.opener)]
        # What ends free text is lazy: it counts where it stands first. Text that may go on is greedy, and without it.
        without = [rf"/{form.opener}{_ANY}/" for form in bare]
        without += [f"/{_ANY}{pattern_of(form.opener)}{_ANY}/" for form in letters]
        text = self.terminal(" & ~".join(["/(?s:.+)/", *without])) + "?"
        found = [self.begun(form) for form in bare]
        found += [self.rule(f"/{_ANY}{pattern_of(form.opener)}/", "[lazy]") + f" {form.rest}" for form in letters]
        found += [f"{text} {self.begun(form)}" for form in tokens]
        if end:
            found.append(text)
        return f"({' | '.join(found)})"


def pattern_of(text: str) -> str:
    """A regular expression of exactly this text, for Python, llguidance and Lark's slashes alike."""
    return "".join(c if c.isalnum() or ord(c) > 127 else f"\\x{ord(c):02x}" for c in text)
