"""HTML and SVG that is safe by how it is made: whatever is no `Markup` is escaped. Knows neither runs nor plots."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TypeAlias

_VOID = frozenset({"meta"})
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
"""Control characters, which HTML may not hold, -> their picture in Unicode's block Control Pictures."""


class Markup(str):
    """Text that is markup already. Made by `h` and `join` alone."""

    __slots__ = ()


Child: TypeAlias = "str | Markup | None"


def h(tag: str, attributes: dict[str, object] | None = None, *children: Child) -> Markup:
    """An element. Attributes that are None or False are left out, True ones have no value; children that are None are
    left out."""
    given = "".join(
        f" {name}" if value is True else f' {name}="{html.escape(_plain(value))}"'
        for name, value in (attributes or {}).items()
        if value is not None and value is not False
    )
    if tag in _VOID:
        return Markup(f"<{tag}{given}>")
    return Markup(f"<{tag}{given}>{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Markup:
    """One after another."""
    return Markup("".join(_escaped(child) for child in children if child is not None))


def table(head: Sequence[Child], rows: Sequence[Sequence[Child]]) -> Markup:
    """Of cells, th and td; it is scrolled where it is wider than the page."""
    body = h("tbody", None, *(h("tr", None, *row) for row in rows))
    return h("div", {"class": "wide", "tabindex": 0}, h("table", None, h("thead", None, h("tr", None, *head)), body))


def _escaped(child: str) -> str:
    return child if isinstance(child, Markup) else html.escape(_plain(child), quote=False)


def _plain(value: object) -> str:
    """Without what no file of HTML may hold: control characters and lone surrogates."""
    return str(value).translate(_VISIBLE).encode("utf-8", "replace").decode("utf-8")
