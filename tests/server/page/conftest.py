"""A browser, and servers whose models say what tests of the page want to see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page
from server_running import Running, Start

from browsing import Opened, browser
from tiny import COUNTING, SCRIPT, write_tiny

__all__ = ["browser", "open_page", "talkers"]

MARKDOWN = [
    "# 제목\n\n",
    "**굵게** `code` [링크](https://example.org)\n\n",
    "```python\ndef f():\n    return 42\n```\n\n",
    "| a | b |\n|---|--:|\n| 1 | 2 |\n\n",
    "- 하나\n- 둘\n",
]
HOSTILE = [
    "<script>window.hacked = 1</script>\n\n",
    "<img src=x onerror='window.hacked = 2'>\n\n",
    "[x](javascript:window.hacked=3)\n\n",
    "![x](http://evil.example/pixel.png)\n\n",
    "[y](data:text/html,<script>window.hacked=4</script>)\n\n",
    '```x" onmouseover="window.hacked=5\n<script>window.hacked=6</script>\n```\n',
]
LONG = 1 << 16
"""Tokens of context in which `endless` counts for many seconds."""


@pytest.fixture(scope="session")
def talkers(start_server: Start, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """A server with `answer`, `markdown`, `hostile`, and `endless`, which counts until it is stopped."""
    folder = tmp_path_factory.mktemp("talkers")
    scripts: dict[str, list[Any]] = {"answer": SCRIPT, "markdown": MARKDOWN, "hostile": HOSTILE}
    paths = [write_tiny(folder / f"{name}.gguf", script, max_context=LONG) for name, script in scripts.items()]
    paths.append(write_tiny(folder / "endless.gguf", COUNTING, endless=True, max_context=LONG))
    return start_server(paths=paths, context=LONG)


DESKTOP = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US", "reduced_motion": "reduce"}


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opened]:
    """Opens the page of a server as a new visitor, and fails where the browser has had to complain."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []
    allowed: list[str] = []

    def opened(server: Running, *, expected: tuple[str, ...] = (), path: str = "/", **options: Any) -> Page:
        """expected: complaints that the test brings about."""
        allowed.extend(expected)
        context = browser.new_context(**DESKTOP | options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: complaints.append(asked.url) if not own(asked.url, server) else None)
        page.goto(server.url + path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [text for text in complaints if not any(each in text for each in allowed)] == []


def own(url: str, server: Running) -> bool:
    return url.startswith((server.url + "/", "blob:" + server.url))
