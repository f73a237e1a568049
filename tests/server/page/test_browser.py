"""The page in a browser: a conversation, and all that can be done with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from server_running import Running, Start

from browsing import Opened, ready, say, serious_violations
from dapji.server.keys import Keys
from dapji.server.settings import Settings
from tiny import ANSWER

STATIC = Path(__file__).parents[3] / "src" / "dapji" / "server" / "page" / "static"


def test_a_conversation_stays(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "answer")
    say(page, "안녕?")
    expect(page.locator(".turn.user .text")).to_have_text("안녕?")
    expect(page.locator(".turn.assistant .content")).to_have_text(ANSWER)
    expect(page.locator(".figures")).to_contain_text("8 tokens")
    expect(page.locator(".figures")).to_contain_text("Context 0 % full")
    expect(page.locator("#announce")).to_have_text(f"Answer complete. {ANSWER}")
    expect(page.locator("#list [aria-current]")).to_have_text("안녕?")
    assert page.title() == "안녕? · Dapji"
    say(page, "또?")
    page.reload()
    expect(page.locator(".turn")).to_have_count(4)
    expect(page.locator(".turn.assistant .content").last).to_have_text(ANSWER)
    expect(page.locator("#model")).to_have_value("answer")


def test_markdown_is_shown(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "markdown")
    say(page, "보여 줘")
    content = page.locator(".turn.assistant .content")
    for _ in range(2):
        expect(content.locator("h1")).to_have_text("제목")
        expect(content.locator("td.align-right")).to_have_text("2")
        expect(content.locator(".code .title")).to_have_text("python")
        expect(content.locator(".code .k").first).to_have_text("def")
        expect(content.get_by_role("link")).to_have_attribute("rel", "noopener noreferrer nofollow")
        page.reload()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    content.get_by_role("button", name="Copy code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "def f():\n    return 42\n"
    expect(content.get_by_role("button", name="Copied")).to_be_visible()


def test_nothing_that_a_text_says_is_run_or_loaded(open_page: Opened, talkers: Running) -> None:
    hostile = "<script>window.hacked = 7</script><img src=x onerror='window.hacked = 8'>"
    page = open_page(talkers)
    ready(page, "hostile")
    say(page, hostile)
    page.locator(".code").hover()
    for _ in range(2):
        expect(page.locator(".turn.user .text")).to_have_text(hostile)
        expect(page.locator("#thread img, #thread script, #thread [onmouseover]")).to_have_count(0)
        assert page.locator("#thread a").evaluate_all("all => all.map((a) => a.href)") == [
            "http://evil.example/pixel.png"
        ]
        page.reload()
        page.locator(".figures").wait_for()
    name = page.evaluate("location.hash.slice(1)")
    page.request.patch(f"{talkers.url}/page/conversations/{name}", data={"title": hostile})
    page.reload()
    expect(page.locator("#list a").first).to_have_text(hostile)
    assert page.evaluate("window.hacked") is None


def test_the_policy_stops_what_would_get_through(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers, expected=("Content Security Policy", "evil.example"))
    ready(page)
    blocked = page.evaluate(
        """() => new Promise((resolve) => {
            const seen = [];
            document.addEventListener("securitypolicyviolation", (event) => {
                seen.push(event.effectiveDirective);
                if (seen.length === 4) resolve(seen.sort());
            });
            const div = document.createElement("div");
            div.innerHTML = "<img src='http://evil.example/x.png'><b style='color: red' onclick='1'>x</b>";
            document.body.append(div);
            const script = document.createElement("script");
            script.textContent = "window.hacked = 9";
            document.body.append(script);
        })"""
    )
    assert page.evaluate("window.hacked") is None
    assert "img-src" in blocked
    assert any(each.startswith("script-src") for each in blocked)


def test_edit_answer_again_and_switch_between_versions(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "answer")
    say(page, "첫째")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".turn.assistant .versions")).to_contain_text("2/2")
    page.get_by_role("button", name="Edit", exact=True).click()
    page.get_by_label("Edit your message").fill("둘째")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.user .text")).to_have_text("둘째")
    expect(page.locator(".turn.user .versions")).to_contain_text("2/2")
    expect(page.locator(".turn.assistant .content")).to_have_text(ANSWER)
    page.locator(".turn.user").get_by_role("button", name="Version before").click()
    expect(page.locator(".turn.user .text")).to_have_text("첫째")
    expect(page.locator(".turn.user").get_by_role("button", name="Next version")).to_be_focused()
    page.locator(".turn.assistant").get_by_role("button", name="Version before").click()
    expect(page.locator(".turn.assistant .versions")).to_contain_text("1/2")
    expect(page.locator(".turn.assistant").get_by_role("group")).to_have_attribute("aria-label", "Version 1 of 2")
    page.wait_for_load_state("networkidle")
    page.reload()
    expect(page.locator(".turn.user .text")).to_have_text("첫째")
    expect(page.locator(".turn.assistant .versions")).to_contain_text("1/2")


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_a_stopped_answer_stays(open_page: Opened, talkers: Running, by: str) -> None:
    page = open_page(talkers)
    ready(page, "endless")
    page.locator("#box").fill("세어 봐")
    page.keyboard.press("Enter")
    expect(page.locator(".writing .content")).to_contain_text("하나 둘 셋")
    expect(page.locator(".writing")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#send")).to_be_hidden()
    if by == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".turn.assistant .note")).to_have_text("Stopped.")
    expect(page.locator("#send")).to_be_visible()
    written = page.locator(".turn.assistant .content").inner_text()
    assert written.startswith("하나 둘 셋")
    page.reload()
    expect(page.locator(".turn.assistant .content")).to_have_text(written)


def test_who_reloads_amid_an_answer_finds_it(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "endless")
    page.locator("#box").fill("세어 봐")
    page.keyboard.press("Enter")
    expect(page.locator(".writing .content")).to_contain_text("하나 둘 셋")
    page.reload()
    expect(page.locator(".turn.assistant .note")).to_have_text("Stopped.")
    expect(page.locator(".turn.assistant .content")).to_contain_text("하나 둘 셋")


def test_an_answer_goes_on_while_another_conversation_is_looked_at(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "endless")
    page.locator("#box").fill("오래")
    page.keyboard.press("Enter")
    expect(page.locator(".writing .content")).to_contain_text("하나")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    ready(page, "answer")
    say(page, "짧게")
    page.locator("#list a", has_text="오래").first.click()
    expect(page.locator(".writing .content")).to_contain_text("하나")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn.assistant .note")).to_have_text("Stopped.")


def test_search_rename_delete(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "answer")
    say(page, "여름바다 이야기")
    name = page.evaluate("location.hash.slice(1)")
    page.get_by_role("button", name="New chat").click()
    say(page, "겨울산 이야기")
    page.keyboard.press("Control+k")
    page.keyboard.type("바다")
    expect(page.locator("#list li")).to_have_count(1)
    expect(page.locator("#list mark")).to_have_text("바다")
    expect(page.locator("#list-note")).to_have_text("1 found")
    page.locator("#list a").click()
    expect(page.locator(".turn.user .text")).to_have_text("여름바다 이야기")

    page.locator("#list li").get_by_role("button").click()
    page.keyboard.press("Enter")  # the first of the menu
    page.get_by_label("Title").fill("휴가와 바다")
    page.keyboard.press("Enter")
    expect(page.locator("#list a span")).to_have_text("휴가와 바다")
    expect(page.locator("#heading")).to_have_text("휴가와 바다")

    page.locator("#list li").get_by_role("button").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.locator("#list li")).to_have_count(1)
    page.locator("#list li").get_by_role("button").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#list-note")).to_have_text("Nothing found for “바다”.")
    expect(page.locator(".turn")).to_have_count(0)
    assert page.request.get(f"{talkers.url}/page/conversations/{name}").status == 404
    page.reload()
    expect(page.locator("#list a", has_text="겨울산").first).to_be_visible()
    expect(page.locator("#list a", has_text="휴가")).to_have_count(0)


def test_export_and_import(open_page: Opened, talkers: Running, tmp_path: Path) -> None:
    page = open_page(talkers)
    ready(page, "answer")
    say(page, "내보낼 말")
    for kind, suffix in (("Markdown", "md"), ("JSON", "json")):
        page.locator("#list li").first.get_by_role("button").click()
        with page.expect_download() as download:
            page.get_by_role("menuitem", name=f"Export as {kind}").click()
        assert download.value.suggested_filename == f"내보낼 말.{suffix}"
        download.value.save_as(tmp_path / f"exported.{suffix}")
    text = (tmp_path / "exported.md").read_text(encoding="utf-8")
    assert text == f"# 내보낼 말\n\n## User\n\n내보낼 말\n\n## Assistant (answer)\n\n{ANSWER}\n"
    before = page.url
    page.locator("#pick-import").set_input_files(tmp_path / "exported.json")
    page.wait_for_url(lambda url: url != before)
    expect(page.locator(".turn.assistant .content")).to_have_text(ANSWER)
    page.locator("#pick-import").set_input_files(tmp_path / "exported.md")
    expect(page.locator("#composer-note")).to_contain_text("exported.md is no exported conversation")


def drop(page: Page, name: str, data: bytes) -> None:
    """As one drags a file onto the page."""
    script = """([name, data]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(data)], name));
        for (const kind of ["dragover", "drop"]) {
            const event = new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
            document.querySelector("#scroll").dispatchEvent(event);
        }
    }"""
    page.evaluate(script, [name, list(data)])


def test_text_files_go_with_a_message(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "answer")
    drop(page, "메모.txt", "외울 것".encode())
    drop(page, "예전.txt", "옛 글".encode("euc-kr"))
    drop(page, "창.txt", "윈도".encode("utf-16"))
    drop(page, "뺄 것.txt", b"x")
    expect(page.locator("#composer .files li")).to_have_count(4)
    page.get_by_role("button", name="Remove 뺄 것.txt").click()
    drop(page, "그림.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    expect(page.locator("#composer-note")).to_have_text("그림.png is no text file.")
    page.evaluate("import('/static/state.js').then(({ state }) => (state.limits.max_body_bytes = 4096))")
    drop(page, "큰 것.txt", b"x" * 3000)
    expect(page.locator("#composer-note")).to_contain_text("큰 것.txt is too large: 3 KiB")
    say(page, "이걸 봐")
    page.reload()
    expect(page.locator(".turn.user summary")).to_have_text(["메모.txt", "예전.txt", "창.txt"])
    texts = page.locator(".turn.user .file pre").all_text_contents()
    assert texts == ["외울 것", "옛 글", "윈도"]
    name = page.evaluate("location.hash.slice(1)")
    exported = page.request.get(f"{talkers.url}/page/conversations/{name}/export").json()
    assert exported["messages"][0]["content"].startswith("메모.txt:\n```\n외울 것\n```\n\n")
    assert exported["messages"][0]["content"].endswith("\n\n이걸 봐")


@pytest.mark.parametrize("keep", [False, True])
def test_a_key_is_asked_for(open_page: Opened, start_server: Start, keys: Keys, tmp_path: Path, keep: bool) -> None:
    key = keys.add("me")
    server = start_server(Settings(folder=tmp_path), keys=keys)
    page = open_page(server, expected=("status of 401",))
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("This key is not known here.")
    dialog.get_by_label("Key", exact=True).fill(key)
    if keep:
        dialog.get_by_label("Keep it").check()
    dialog.get_by_role("button", name="Use key").click()
    expect(dialog).to_have_count(0)
    ready(page, "answer")
    say(page, "안녕")
    page.reload()
    expect(page.locator(".turn.assistant .content")).to_have_text(ANSWER)
    assert page.evaluate("localStorage.getItem('key')") == (key if keep else None)
    assert page.evaluate("sessionStorage.getItem('key')") == (None if keep else key)


def test_enter_that_ends_a_syllable_does_not_send(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "answer")
    page.locator("#box").focus()
    session = page.context.new_cdp_session(page)
    session.send("Input.imeSetComposition", {"text": "한", "selectionStart": 1, "selectionEnd": 1})
    seen = """() => { window.seen = []; addEventListener("keydown", (e) => window.seen.push(e.isComposing), true); }"""
    page.evaluate(seen)
    page.keyboard.press("Enter")
    assert page.evaluate("window.seen") == [True]
    expect(page.locator(".turn")).to_have_count(0)
    page.locator("#box").fill("한")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("둘째 줄")
    expect(page.locator(".turn")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator(".turn.user .text")).to_contain_text("둘째 줄")
    assert (page.locator(".turn.user .text").text_content() or "").startswith("한\n둘째 줄")


def test_reasoning_is_folded_and_calls_are_shown(open_page: Opened, agents: Running) -> None:
    page = open_page(agents)
    ready(page, "thinker")
    say(page, "생각해 봐")
    details = page.locator("details.reasoning")
    expect(details.locator("> div")).to_be_hidden()
    details.locator("summary").click()
    expect(details.locator("> div")).to_have_text("음, 생각")
    expect(page.locator(".turn.assistant .content")).to_have_text("42입니다.")
    say(page, "더 생각해 봐")
    expect(details.first.locator("> div")).to_be_visible()  # what was opened stays open
    expect(details.last.locator("> div")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("dialog").get_by_label("Reasoning").select_option("Off")
    page.keyboard.press("Escape")

    page.get_by_role("button", name="New chat").click()
    page.locator("#model").select_option("caller")
    page.get_by_role("button", name="Settings").click()
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    page.get_by_label("Tools").fill("[")
    page.get_by_label("Tools").blur()
    expect(page.get_by_role("dialog")).to_contain_text("This is not a list in JSON.")
    page.get_by_label("Tools").fill(json.dumps([tool]))
    page.get_by_label("Tools").blur()
    page.keyboard.press("Escape")
    say(page, "날씨?")
    expect(page.locator(".call .title")).to_have_text("Call of weather")
    assert json.loads(page.locator(".call pre").text_content() or "") == {"city": "서울"}


def test_settings_are_those_of_the_conversation(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "answer")
    page.get_by_role("button", name="Settings").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("System prompt").fill("짧게")
    expect(dialog.get_by_label("Reasoning")).to_have_count(0)
    dialog.get_by_label("Temperature").fill("-1")
    dialog.get_by_label("Longest answer").fill("2")
    expect(dialog).to_contain_text("Not a number from 0 to 100.")
    dialog.get_by_label("Temperature").fill("0,5")
    dialog.get_by_role("button", name="Close").click()
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    say(page, "안녕")
    expect(page.locator(".turn.assistant .note")).to_have_text("Cut off: there was no more room.")
    name = page.evaluate("location.hash.slice(1)")
    known = page.request.get(f"{talkers.url}/page/conversations/{name}").json()
    assert known["settings"] == {"model": "answer", "system": "짧게", "temperature": 0.5, "max_tokens": 2}
    page.get_by_role("button", name="Settings").click()
    dialog.get_by_label("Longest answer").fill("")
    dialog.get_by_label("Longest answer").blur()
    page.wait_for_load_state("networkidle")
    assert "max_tokens" not in page.request.get(f"{talkers.url}/page/conversations/{name}").json()["settings"]


def test_what_fails_is_told_in_its_place_and_can_be_tried_again(open_page: Opened, start_server: Start) -> None:
    page = open_page(start_server(), expected=("status of 400",))
    ready(page, "answer")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("길다 " * 200)
    page.get_by_label("System prompt").blur()
    page.keyboard.press("Escape")
    page.locator("#box").fill("안녕")
    page.keyboard.press("Enter")
    expect(page.locator("#thread").get_by_role("alert")).to_contain_text("leaves no room for an answer")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("")
    page.get_by_label("System prompt").blur()
    page.keyboard.press("Escape")
    page.wait_for_load_state("networkidle")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".turn.assistant .content")).to_have_text(ANSWER)


def test_a_server_that_is_gone(open_page: Opened, start_server: Start) -> None:
    page = open_page(start_server(), expected=("net::ERR_FAILED",))
    ready(page, "answer")
    page.route("**/page/**", lambda route: route.abort())
    page.locator("#box").fill("안녕")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    expect(page.locator("#box")).to_have_value("안녕")
    page.unroute("**/page/**")
    page.locator("#box").press("Enter")
    expect(page.locator(".turn.assistant .content")).to_have_text(ANSWER)


def test_an_address_that_leads_nowhere(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers, expected=("status of 404",), path="/#conv-none")
    expect(page.locator("#composer-note")).to_have_text("there is no conversation 'conv-none' here")
    ready(page, "answer")
    say(page, "안녕")


def test_what_is_answered_can_be_deleted(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers, expected=("status of 404",))
    ready(page, "endless")
    page.locator("#box").fill("지울 것")
    page.keyboard.press("Enter")
    expect(page.locator(".writing .content")).to_contain_text("하나")
    page.locator("#list li", has_text="지울 것").get_by_role("button").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#list li", has_text="지울 것")).to_have_count(0)
    ready(page, "answer")
    say(page, "안녕")
    talkers.wait_until_idle()


@pytest.mark.parametrize(("locale", "send"), [("en-US", "Send"), ("ko-KR", "보내기")])
def test_a_real_model(open_page: Opened, start_server: Start, locale: str, send: str) -> None:
    server = start_server(paths=[Path("smollm2-135m")])
    page = open_page(server, locale=locale)
    ready(page)
    page.locator("#open-settings").click()
    for name, value in (("temperature", "0"), ("max_tokens", "24")):
        page.locator(f"#set-{name}").fill(value)
        page.locator(f"#set-{name}").blur()
    page.keyboard.press("Escape")
    messages: list[dict[str, Any]] = []
    for text in ("What is the capital of France?", "And of Korea?"):
        page.locator("#box").fill(text)
        page.get_by_role("button", name=send).click()
        page.locator(".turn.user", has_text=text).wait_for()
        page.locator("#thread > li:last-child .figures").wait_for(timeout=60_000)
        messages.append({"role": "user", "content": text})
        asked = {"messages": messages, "temperature": 0, "max_tokens": 24}
        answer = page.request.post(f"{server.url}/v1/chat/completions", data=asked).json()["choices"][0]["message"]
        messages.append({"role": "assistant", "content": answer["content"]})
    name = page.evaluate("location.hash.slice(1)")
    exported = page.request.get(f"{server.url}/page/conversations/{name}/export").json()
    assert exported["messages"] == messages
    shown = page.locator(".turn.assistant .content").all_inner_texts()
    assert [text.split()[:3] for text in shown] == [each["content"].split()[:3] for each in messages[1::2]]
    expect(page.locator(".turn.assistant .figures .speed")).to_have_count(2)


def test_the_keyboard_alone(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    ready(page, "answer")
    expect(page.locator("#box")).to_be_focused()
    page.keyboard.press("ArrowLeft")  # as on a television: out of the empty box, to the list
    assert page.evaluate("document.querySelector('#side').contains(document.activeElement)")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
    page.locator("#examples button").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#examples button").nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#examples button").nth(3)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#box")).to_have_value("Help me plan a quiet weekend in Seoul.")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant .content")).to_have_text(ANSWER)
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit your message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Edit", exact=True)).to_be_focused()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Keyboard shortcuts")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Edit", exact=True)).to_be_focused()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#box")).to_be_focused()
    expect(page.locator(".turn")).to_have_count(0)


def test_every_control_is_reached_by_arrow_keys(open_page: Opened, start_server: Start) -> None:
    page = open_page(start_server())
    ready(page, "answer")
    say(page, "안녕")
    page.locator("#list a").wait_for()
    controls = """() => [...document.querySelectorAll("a[href], button, input, select, textarea, [tabindex='0']")]
        .filter((each) => each.checkVisibility({ visibilityProperty: true }) && !each.matches(".skip, [type=file]"))"""
    names = page.evaluate(f"({controls})().map((each) => each.id || each.ariaLabel || each.textContent)")
    reached, queue = {"box"}, ["box"]
    while queue:
        at = names.index(queue.pop())
        for key in ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"):
            page.evaluate(f"at => ({controls})()[at].focus()", at)
            page.keyboard.press(key)
            if page.locator(".editing").count():
                page.keyboard.press("Escape")
            found = names[page.evaluate(f"({controls})().indexOf(document.activeElement)")]
            if found not in reached:
                reached.add(found)
                queue.append(found)
    assert reached == set(names)


def test_a_phones_width(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers, viewport={"width": 360, "height": 640}, has_touch=True, locale="ko-KR")
    ready(page, "markdown")
    say(page, "좁게")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    menu = page.get_by_role("button", name="대화 목록")
    expect(page.locator("#new")).to_be_hidden()
    menu.click()
    expect(menu).to_have_attribute("aria-expanded", "true")
    page.locator("#list a", has_text="좁게").first.click()
    expect(page.locator("#new")).to_be_hidden()
    menu.click()
    page.locator("#veil").click(position={"x": 340, "y": 300})
    expect(menu).to_have_attribute("aria-expanded", "false")
    page.get_by_role("button", name="이 대화의 설정").click()
    expect(page.get_by_label("온도")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_language_and_theme_are_kept(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers, locale="ko-KR", color_scheme="dark")
    html = page.locator("html")
    expect(html).to_have_attribute("lang", "ko")
    expect(html).to_have_attribute("data-theme", "dark")
    expect(page.locator("#box")).to_have_attribute("placeholder", "메시지")
    page.get_by_role("button", name="English").click()
    page.get_by_role("button", name="Switch between light and dark").click()
    for _ in range(2):
        expect(html).to_have_attribute("lang", "en")
        expect(html).to_have_attribute("data-theme", "light")
        expect(page.locator("#new")).to_have_text("New chat")
        page.reload()


@pytest.mark.parametrize("locale", ["en-US", "ko-KR"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(
    open_page: Opened, agents: Running, talkers: Running, theme: str, locale: str
) -> None:
    page = open_page(talkers, color_scheme=theme, locale=locale)
    ready(page, "markdown")
    assert serious_violations(page) == []
    say(page, "보여 줘")
    page.locator("#search").fill("보여")
    page.locator("#list mark").first.wait_for()
    assert serious_violations(page) == []
    page.locator("#open-settings").click()
    page.locator("#set-temperature").fill("x")
    page.locator("#set-temperature").blur()
    assert serious_violations(page) == []
    page.keyboard.press("Escape")
    page.locator("#list li").first.locator("button").click()
    assert serious_violations(page) == []
    page = open_page(agents, color_scheme=theme, locale=locale)
    ready(page, "thinker")
    say(page, "생각해 봐")
    page.locator("details.reasoning summary").click()
    assert serious_violations(page) == []


def test_every_language_has_the_same_texts_and_every_text_is_used(open_page: Opened, talkers: Running) -> None:
    page = open_page(talkers)
    strings: dict[str, dict[str, Any]] = page.evaluate("import('/static/i18n.js').then((module) => module.STRINGS)")
    keys = {language: set(texts) for language, texts in strings.items()}
    assert keys["en"] == keys["ko"]
    values = {key: {language: slots(texts[key]) for language, texts in strings.items()} for key in keys["en"]}
    assert [key for key, each in values.items() if each["en"] != each["ko"]] == []
    sources = "".join(path.read_text(encoding="utf-8") for path in STATIC.glob("*.*") if path.name != "i18n.js")
    prefixes = ("example.", "shortcut.", "thinking.", "finish.", "rename")
    names = {"system", "temperature", "top_p", "max_tokens", "seed", "tools", "thinking"}
    unused = {
        key
        for key in keys["en"]
        if f'"{key}"' not in sources and not key.startswith(prefixes) and key.removesuffix(".note") not in names
    }
    assert unused == set()


def slots(text: str) -> set[str]:
    return {part.partition("}")[0] for part in text.split("{")[1:]}
