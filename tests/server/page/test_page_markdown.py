"""Markdown of answers as safe HTML: what must not get through, and that a growing text ends as the whole one."""

from __future__ import annotations

import random
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dapji.server.page.markdown import GrowingMarkdown, render

ROOT = Path(__file__).parents[3]

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "a <b onmouseover=alert(1)>b</b>",
    "<!-- --><iframe src=//evil></iframe>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](<java\tscript:alert(1)>)",
    "[x](\x01javascript:alert(1))",
    "[x](vbscript:x)",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](file:///etc/passwd)",
    "[x](/page/conversations)",
    "[x](//evil.example)",
    "[x][y]\n\n[y]: javascript:alert(1)",
    "<javascript:alert(1)>",
    '[x](https://a.example "\\" onclick=alert(1) x=\\"")',
    '[x](https://a.example/"onclick="alert(1))',
    "![x](https://evil.example/pixel.png)",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    '![" onerror=alert(1)](javascript:x)',
    "[![x](https://evil.example/p.png)](javascript:alert(1))",
    '```x" onclick=alert(1)\n<script>alert(1)</script>\n```',
    "```html\n<script>alert(1)</script><img src=x>\n```",
    "    <script>alert(1)</script>",
    "`<script>alert(1)</script>`",
    "| <script>alert(1)</script> |\n|:-:|\n| <img src=x onerror=alert(1)> |",
    "# <script>alert(1)</script>",
    "> <style>*{display:none}</style>",
    "<form action=//evil><input autofocus onfocus=alert(1)>",
    "<a href=javascript:alert(1)>x</a>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\x00<script>alert(1)</script>",
]
TAGS = {
    *("p", "a", "em", "strong", "s", "code", "pre", "div", "span", "br", "hr", "blockquote", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {"href", "title", "target", "rel", "class", "data-language", "start"}


class Elements(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_gets_through_that_runs_loads_or_leads_elsewhere(text: str) -> None:
    for html in (render(text), *(grown(text, seed=seed) for seed in range(3))):
        for tag, attributes in Elements(html).found:
            assert tag in TAGS, html
            assert attributes.keys() <= ATTRIBUTES, html
            assert (attributes.get("href") or "https://").startswith(("https://", "http://", "mailto:")), html


def test_images_are_links() -> None:
    (tag, attributes), *_ = Elements(render("![a *b*](https://a.example/p.png)")).found[1:]
    assert (tag, attributes["href"], attributes["rel"]) == (
        "a",
        "https://a.example/p.png",
        "noopener noreferrer nofollow",
    )
    assert ">a b</a>" in render("![a *b*](https://a.example/p.png)")
    assert render("[![a](https://b.example/p.png)](https://c.example)").count("<a ") == 1


def test_tables_are_aligned_by_classes_and_code_is_highlighted() -> None:
    html = render("| a | b |\n|--:|---|\n| 1 | 2 |\n\n```python\ndef f(): pass\n```\n\n```unheard-of\n<x>\n```")
    assert '<th class="align-right">a</th>' in html
    assert "style" not in html
    assert '<div class="code" data-language="python"><pre><code><span class="k">def</span>' in html
    assert '<div class="code" data-language="unheard-of"><pre><code>&lt;x&gt;' in html


def grown(text: str, seed: int) -> str:
    """The HTML of a text that came in pieces."""
    draw, growing, finished, at = random.Random(seed), GrowingMarkdown(), "", 0
    while at < len(text):
        n = draw.randint(1, 12)
        growing.text += text[at : at + n]
        at += n
        update = growing.update()
        finished += update.finished
    return finished + growing.update().open


TRICKY = """\
para
===

1. a

2. b
- c
  - d

    e
lazy

> quote
lazy

    code

    more
* x

  y
* * *

[z]: https://a.example
[z] and [z][z]

a | b
--- | ---
1 | 2

```python
# no heading

def f(): ...
```
~~~
open
"""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["README.ko.md", "docs/server.md", "tricky"])
def test_a_text_that_grows_ends_as_the_whole_one(name: str, seed: int) -> None:
    text = TRICKY * 2 if name == "tricky" else (ROOT / name).read_text(encoding="utf-8")
    assert grown(text, seed) == render(text)


@pytest.mark.parametrize("seed", range(3))
def test_other_ends_of_lines_change_nothing(seed: int) -> None:
    for end in ("\r\n", "\r"):
        assert grown(TRICKY.replace("\n", end), seed) == render(TRICKY)


def test_finished_blocks_come_once() -> None:
    growing = GrowingMarkdown()
    growing.text = "one\n\ntwo"
    assert growing.update() == ("", "<p>one</p>\n<p>two</p>\n")  # "two" may become what belongs to "one"
    growing.text += " is longer\n"
    assert growing.update() == ("<p>one</p>\n", "<p>two is longer</p>\n")
    growing.text += "\nthree"
    assert growing.update().finished == ""


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("make\n" + "a" * 10_000, id="the square of its length"),
        pytest.param("python\n" + "x = 1\n" * 2_000, id="long"),
    ],
)
def test_code_that_takes_a_lexer_too_long_stays_plain(text: str) -> None:
    shown = render(f"```{text}\n```")
    assert "<span" not in shown
    assert text.partition("\n")[2] in shown
    assert "<span" in render("```python\nx = 1\n```")
