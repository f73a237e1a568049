"""A browser, and what tests of pages do in it again and again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

Opened = Callable[..., Page]


# A browser for each module: while one is driven, this thread has a running event loop, which other tests cannot have.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: tests/server/page/setup.sh")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield opened
        opened.close()


def ready(page: Page, model: str | None = None) -> None:
    """Waits for the models, and chooses one."""
    page.locator("#model option").first.wait_for(state="attached")
    if model is not None:
        page.locator("#model").select_option(model)


def say(page: Page, text: str) -> None:
    """Sends a message and waits for its answer."""
    page.locator("#box").fill(text)
    page.locator("#send").click()
    page.locator(".turn.user", has_text=text).last.wait_for()
    page.locator("#thread > li:last-child .figures").wait_for()


def axe_source() -> str:
    found = Path(__file__).parents[1] / "build" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
    if not found.exists():
        pytest.skip("axe-core is not installed: tests/server/page/setup.sh")
    return found.read_text(encoding="utf-8")


def serious_violations(page: Page) -> list[str]:
    """Of what axe-core calls serious or critical (https://github.com/dequelabs/axe-core)."""
    page.evaluate(axe_source())
    found = page.evaluate("axe.run().then((result) => result.violations)")
    return [
        f"{each['id']}: {each['nodes'][0]['html']} {each['nodes'][0].get('failureSummary', '')}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
