"""The operator's page and that of the routes, in a browser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect
from server_running import Running, Start

from browsing import Opened, serious_violations
from dapji.server.keys import Keys
from dapji.server.page import status
from dapji.server.settings import Settings

HELLO = [{"role": "user", "content": "안녕\n"}]


@pytest.fixture(scope="module")
def busy(start_server: Start) -> Iterator[Running]:
    """A server that has answered, with a sample for every part of a second."""
    asked = {"model": "answer", "messages": HELLO, "temperature": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status, "INTERVAL", 0.2)
        server = start_server()
        for _ in range(3):
            assert httpx.post(f"{server.url}/v1/chat/completions", json=asked).status_code == 200
            time.sleep(0.4)
        yield server


def test_the_status_says_what_was_done(busy: Running) -> None:
    told = httpx.get(f"{busy.url}/page/status").json()
    assert told["totals"]["generated_tokens"] == 3 * 8
    assert told["totals"]["prompt_tokens"] > 0
    assert told["totals"]["first_tokens"] == 3
    assert told["queue"] == {"running": 0, "max_running": 64, "waiting": 0, "max_waiting": 256}
    states = {model["id"]: model["open"] for model in told["models"]}
    assert states == {"answer": True, "endless": False}
    samples = told["samples"]
    assert max(sample["generated"] for sample in samples) > 0
    assert [sample["time"] for sample in samples] == sorted(sample["time"] for sample in samples)
    waits = [sample["first_token"] for sample in samples if sample["first_token"] is not None]
    assert waits
    assert min(waits) > 0
    later = httpx.get(f"{busy.url}/page/status", params={"since": samples[-1]["time"]}).json()["samples"]
    assert all(sample["time"] > samples[-1]["time"] for sample in later)
    for query in ("since=x", "since=1&since=2", "until=1"):
        assert httpx.get(f"{busy.url}/page/status?{query}").status_code == 400


def test_the_operator_sees_models_and_plots(open_page: Opened, busy: Running) -> None:
    page = open_page(busy, path="/status")
    expect(page.locator("#models tbody tr")).to_have_count(2)
    expect(page.locator("#models tbody tr").first).to_contain_text("answer")
    expect(page.locator("#models tbody tr").first).to_contain_text("open, unused for")
    expect(page.locator("#models tbody tr").last).to_contain_text("closed")
    expect(page.locator(".tiles > div").nth(2)).to_contain_text("24 since the start")
    expect(page.locator("polyline.first").first).to_be_attached()
    plot = page.locator(".plot svg").first
    expect(plot).to_have_attribute("aria-label", "Speed: Written, tokens/s 0, Read, tokens/s 0")
    page.locator(".plot").first.hover()
    expect(page.locator(".plot figcaption").first).to_contain_text(":")
    page.get_by_role("button", name="한국어").click()
    expect(page.locator("h1")).to_have_text("상태")
    assert page.title() == "상태 · Dapji"


def test_a_route_can_be_read_and_tried(open_page: Opened, busy: Running) -> None:
    page = open_page(busy, path="/docs")
    count = sum(map(len, httpx.get(f"{busy.url}/openapi.json").json()["paths"].values()))
    expect(page.locator(".route")).to_have_count(count)
    route = page.locator(".route", has_text="/tokenize").first
    route.locator("summary").click()
    expect(route.locator("tbody th")).to_have_text(["model", "prompt", "messages", "add_special_tokens"])
    route.get_by_label("Body").fill('{"model": "answer", "prompt": "ab"}')
    route.get_by_role("button", name="Send").click()
    expect(route.get_by_role("status")).to_contain_text('"count": 2')
    route = page.locator(".route", has_text="/v1/chat/completions").first
    route.locator("summary").click()
    expect(route.locator("tbody tr", has_text="messages").first).to_contain_text("required")


def test_the_status_wants_a_key(open_page: Opened, start_server: Start, keys: Keys, tmp_path: Path) -> None:
    key = keys.add("operator")
    server = start_server(Settings(folder=tmp_path), keys=keys)
    assert httpx.get(f"{server.url}/page/status").status_code == 401
    page = open_page(server, path="/status", expected=("401",))
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#models tbody tr")).to_have_count(2)


@pytest.mark.parametrize("path", ["/status", "/docs"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_sheets(open_page: Opened, busy: Running, path: str, theme: str) -> None:
    page = open_page(busy, path=path, color_scheme=theme, locale="ko-KR")
    page.locator("tbody tr, .route").first.wait_for()
    if path == "/docs":
        page.locator(".route summary").nth(3).click()
    assert serious_violations(page) == []
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
