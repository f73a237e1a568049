"""Markdown to HTML that is safe to show: of a whole text, and of one that grows.

No HTML of the text's own, no image is loaded, and links lead to https, http and mailto only: a model may have been
talked into writing anything. Code is highlighted by classes, since the page allows no styles but those of its files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from html import escape
from time import thread_time
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from pygments import format as formatted
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

T = TypeVar("T")

_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)")
_SCHEMES = ("https", "http", "mailto")
_LONGEST = 10_000
"""Characters of a block of code that are still highlighted: it takes about a millisecond for a thousand."""
_PATIENCE = 0.5
"""Seconds of processor time, after which a block stays plain: some texts take many lexers the square of their length.
"""


def render(text: str) -> str:
    """CommonMark with tables and strikethrough."""
    return str(_MARKDOWN.render(text))


class Update(NamedTuple):
    """What of a growing text is new, as HTML."""

    finished: str
    """Blocks that will not change any more."""
    open: str
    """The one after them, which may; it takes the place of the last update's."""


class GrowingMarkdown:
    """A text that is rendered as it grows: each block once when it is finished, and only the last one again and again.

    A block is finished when a whole line of the next one is there: no line after that can change it, but for a link
    whose address is told further down. `render` of the whole text is what counts in the end.
    """

    def __init__(self) -> None:
        self.text = ""
        self._start = 0  # of the open block
        self._references: dict[str, Any] = {}

    def update(self) -> Update:
        """Since the last one."""
        whole_lines = self.text.rfind("\n", self._start) + 1
        finished = ""
        if whole_lines > self._start:
            lines = _LINE.findall(self.text[self._start : whole_lines])
            starts = self._starts(lines)
            if len(starts) > 1:
                done = "".join(lines[: starts[-1]])
                finished = self._render(done, keep=True)
                self._start += len(done)
        return Update(finished, self._render(self.text[self._start :], keep=False))

    def _starts(self, lines: Sequence[str]) -> list[int]:
        """The lines in which blocks begin."""
        tokens = _BLOCKS.parse("".join(lines), {"references": dict(self._references)})
        return [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]

    def _render(self, text: str, *, keep: bool) -> str:
        """keep: links whose addresses stand there are known to what follows."""
        references = self._references if keep else dict(self._references)
        return str(_MARKDOWN.render(text, {"references": references}))


def _is_safe(url: str) -> bool:
    try:
        return urlsplit(url.strip()).scheme.lower() in _SCHEMES
    except ValueError:
        return False


def _link(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: dict[str, Any]
) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return renderer.renderToken(tokens, index, options, env)


def _image(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: dict[str, Any]
) -> str:
    """A link to it: whoever it is loaded from would learn who reads what."""
    token = tokens[index]
    source = str(token.attrs.get("src", ""))
    text = renderer.renderInlineAsText(token.children or [], options, env) or source
    inside = any(each.type == "link_open" for each in tokens[:index]) and _depth(tokens[:index]) > 0
    if inside or not _is_safe(source):
        return escape(text)
    address = escape(source, quote=True)
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer nofollow" class="image">{escape(text)}</a>'


def _depth(tokens: Sequence[Token]) -> int:
    """How many links are open after them."""
    return sum((token.type == "link_open") - (token.type == "link_close") for token in tokens)


def _code(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: dict[str, Any]
) -> str:
    code = tokens[index].content
    language = (tokens[index].info.split() or [""])[0]
    shown = escape(code)
    if language and len(code) <= _LONGEST:
        with suppress(ClassNotFound, TimeoutError):
            lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
            shown = formatted(_in_time(lexer.get_tokens(code)), _FORMATTER)
    return f'<div class="code" data-language="{escape(language, quote=True)}"><pre><code>{shown}</code></pre></div>\n'


def _in_time(tokens: Iterable[T]) -> Iterator[T]:
    """Raises TimeoutError."""
    end = thread_time() + _PATIENCE
    for token in tokens:
        if thread_time() > end:
            raise TimeoutError
        yield token


def _cell(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: dict[str, Any]
) -> str:
    """How it is aligned as a class, not as a style."""
    token = tokens[index]
    style = str(token.attrs.pop("style", ""))
    if style:
        token.attrSet("class", style.replace("text-align:", "align-"))
    return renderer.renderToken(tokens, index, options, env)


def _table(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: dict[str, Any]
) -> str:
    """In a box of its own, which scrolls where the table is wide."""
    return '<div class="table"><table>\n' if tokens[index].nesting == 1 else "</table></div>\n"


def _markdown() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False, "maxNesting": 50}).enable(["table", "strikethrough"])
    made.validateLink = _is_safe  # type: ignore[method-assign]
    rules = {"link_open": _link, "image": _image, "fence": _code, "code_block": _code, "th_open": _cell}
    for name, rule in (rules | {"td_open": _cell, "table_open": _table, "table_close": _table}).items():
        made.add_render_rule(name, rule)
    return made


_FORMATTER = HtmlFormatter(nowrap=True)
_MARKDOWN = _markdown()
_BLOCKS = MarkdownIt("commonmark", {"html": False, "maxNesting": 50}).enable("table").disable("inline")
"""Only tells where blocks begin: what stands inside is not looked at."""
