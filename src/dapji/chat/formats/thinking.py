"""Reasoning between two markers, at the beginning of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dapji.chat.formats.parser import Grammar
from dapji.chat.formats.reader import Reader, Steps


@dataclass(frozen=True, kw_only=True)
class Thinking(Grammar):
    """`<think>…</think>` and its like. White space at both ends of the reasoning belongs to the markers."""

    opener: str
    closer: str
    opened: bool = False
    """The prompt ends with the opener: the answer begins inside."""

    @property
    def markers(self) -> Sequence[str]:
        return (self.opener, self.closer)

    def after(self, prompt: str) -> Thinking:
        return replace(self, opened=prompt.rstrip().endswith(self.opener.rstrip()))

    def steps(self, reader: Reader) -> Steps[None]:
        yield from reader.space()
        if (yield from reader.accept(self.opener)) is None and not self.opened:
            reader.at = 0  # an answer without reasoning, its white space included
            return
        yield from reader.space()
        reader.markup()
        if (yield from reader.pass_until("reasoning", self.closer)) is not None:
            yield from reader.space()
            reader.markup()
