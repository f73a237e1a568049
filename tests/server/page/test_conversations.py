"""The conversations of the page: what the page asks for, and what is left of it on disk."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_running import Running, Start

from dapji.errors import UnavailableError
from dapji.server import database
from dapji.server.keys import Keys
from dapji.server.page.conversations import ConversationStore, Settings, Turn, title_of
from dapji.server.settings import Settings as ServerSettings
from tiny import ANSWER

EXACT = {"settings": {"model": "answer", "temperature": 0.0}}


@pytest.fixture(scope="module")
def own(start_server: Start) -> Running:
    """Whose conversations are those of this module."""
    return start_server()


@pytest.fixture
def page(own: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=30) as client:
        yield client


def begin(page: httpx.Client, settings: dict[str, Any] | None = None) -> str:
    answer = page.post("/page/conversations", json=EXACT if settings is None else {"settings": settings})
    assert answer.status_code == 201, answer.text
    name: str = answer.json()["id"]
    return name


def say(page: httpx.Client, name: str, content: str, parent: int | None = None, **more: Any) -> dict[str, Any]:
    body = {"content": content, "parent": parent} | more
    answer = page.post(f"/page/conversations/{name}/turns", json=body)
    assert answer.status_code == 201, answer.text
    turn: dict[str, Any] = answer.json()
    return turn


def answered(page: httpx.Client, name: str, parent: int) -> list[tuple[str, dict[str, Any]]]:
    """The events of an answer."""
    answer = page.post(f"/page/conversations/{name}/answers", json={"parent": parent})
    assert answer.status_code == 200, answer.text
    return [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: ")))
        for lines in (event.splitlines() for event in answer.text.split("\n\n") if event)
    ]


def shown(page: httpx.Client, name: str) -> dict[str, Any]:
    conversation: dict[str, Any] = page.get(f"/page/conversations/{name}").raise_for_status().json()
    return conversation


def test_a_conversation(page: httpx.Client) -> None:
    name = begin(page)
    question = say(page, name, "안녕? *나*야")
    assert shown(page, name)["turns"] == [question]
    events = answered(page, name, question["number"])
    assert [kind for kind, _ in events if kind != "content"] == ["start", "done"]
    assert events[0][1]["model"] == "answer"
    answer = events[-1][1]
    assert (answer["content"], answer["finish"], answer["parent"]) == (ANSWER, "stop", question["number"])
    assert answer["usage"]["generated"] == 8
    assert answer["usage"]["prompt"] == events[0][1]["prompt"]
    conversation = shown(page, name)
    assert conversation["turns"] == [question, answer]
    assert (conversation["leaf"], conversation["title"]) == (2, "안녕? *나*야")
    again = say(page, name, "또", answer["number"])
    usage = answered(page, name, again["number"])[-1][1]["usage"]
    assert usage["prompt"] > answer["usage"]["prompt"] + answer["usage"]["generated"]


def test_what_streams_is_what_is_kept(talkers: Running) -> None:
    with httpx.Client(base_url=talkers.url, timeout=60) as page:
        name = begin(page, {"model": "endless", "temperature": 0.0, "max_tokens": 8000})
        events = answered(page, name, say(page, name, "세어 봐")["number"])
        contents = [data for kind, data in events if kind == "content"]
        done = events[-1][1]
        assert (done["finish"], done["usage"]["generated"]) == ("length", 8000)
        assert 2 < len(contents) < 800  # far fewer than tokens
        whole = shown(page, name)["turns"][-1]
        assert whole == done
        assert whole["html"].startswith(contents[-1]["open"].removesuffix("</p>\n"))


def test_branches(page: httpx.Client) -> None:
    name = begin(page)
    one = say(page, name, "하나")["number"]
    first = answered(page, name, one)[-1][1]["number"]
    second = answered(page, name, one)[-1][1]["number"]
    other = say(page, name, "둘")["number"]
    turns = {turn["number"]: turn["parent"] for turn in shown(page, name)["turns"]}
    assert turns == {one: None, first: one, second: one, other: None}
    assert shown(page, name)["leaf"] == other
    assert page.patch(f"/page/conversations/{name}", json={"leaf": first}).status_code == 200
    assert shown(page, name)["leaf"] == first
    assert shown(page, name)["title"] == "하나"


def test_a_file_is_part_of_what_the_model_reads(page: httpx.Client) -> None:
    name = begin(page)
    file = {"name": "메모.md", "text": "```\ncode\n```\n"}
    turn = say(page, name, "", files=[file])
    assert turn["files"] == [file]
    exported = page.get(f"/page/conversations/{name}/export").json()
    assert exported["messages"] == [{"role": "user", "content": "메모.md:\n````\n```\ncode\n```\n````"}]
    assert shown(page, name)["title"] == "메모.md"


@pytest.mark.parametrize(
    "search", ["바다", "OCEAN", "Straße", unicodedata.normalize("NFD", "바다"), "숨은 말", "%", "_"]
)
def test_search_finds_any_part_of_any_turn(page: httpx.Client, search: str) -> None:
    name = begin(page)
    text = "여름바다에서 Ocean STRASSE 100%_"
    say(page, name, text, files=[{"name": "a.txt", "text": "그 안의 숨은 말"}])
    say(page, name, "다른 가지")
    begin(page)
    found = page.get("/page/conversations", params={"search": search}).json()
    assert name in [each["id"] for each in found["conversations"]]
    assert found["conversations"][0]["found"]
    none = page.get("/page/conversations", params={"search": search + "없는것"}).json()
    assert none == {"conversations": [], "more": False}


def test_the_list_goes_on(page: httpx.Client) -> None:
    names = [begin(page) for _ in range(3)]
    page.patch(f"/page/conversations/{names[0]}", json={"title": "찾을 제목"})
    first = page.get("/page/conversations", params={"limit": 2}).json()
    assert first["more"]
    then = page.get("/page/conversations", params={"limit": 2, "offset": 2}).json()
    listed = [each["id"] for each in first["conversations"] + then["conversations"]]
    assert listed[:3] == names[::-1]
    (found,) = page.get("/page/conversations", params={"search": "찾을"}).json()["conversations"]
    assert (found["id"], found["found"]) == (names[0], None)


def test_the_settings_are_those_of_the_answer(page: httpx.Client) -> None:
    name = begin(page)
    settings = {"model": "answer", "system": "짧게", "temperature": 0.0, "max_tokens": 3, "seed": 7, "top_p": 0.5}
    page.patch(f"/page/conversations/{name}", json={"settings": settings}).raise_for_status()
    assert shown(page, name)["settings"] == settings
    turn = say(page, name, "안녕")["number"]
    answer = answered(page, name, turn)[-1][1]
    assert (answer["finish"], answer["usage"]["generated"]) == ("length", 3)
    page.patch(f"/page/conversations/{name}", json={"settings": {"temperature": -1}}).raise_for_status()
    refused = page.post(f"/page/conversations/{name}/answers", json={"parent": turn})
    assert refused.status_code == 400
    assert "temperature" in refused.json()["error"]["message"]


def test_reasoning_is_chosen_where_one_can(agents: Running) -> None:
    with httpx.Client(base_url=agents.url, timeout=30) as page:
        assert page.get("/page/models/thinker").json()["thinking"] == [True, False]
        assert page.get("/page/models/caller").json()["thinking"] == []
        name = begin(page, {"model": "thinker", "temperature": 0.0})
        turn = say(page, name, "안녕")["number"]
        events = answered(page, name, turn)
        assert "".join(data["text"] for kind, data in events if kind == "reasoning") == "음, 생각"
        assert (events[-1][1]["reasoning"], events[-1][1]["content"]) == ("음, 생각", "42입니다.")
        say(page, name, "또", events[-1][1]["number"])
        messages = page.get(f"/page/conversations/{name}/export").json()["messages"]
        assert messages[1] == {"role": "assistant", "content": "42입니다.", "reasoning_content": "음, 생각"}


def test_calls_of_tools_are_kept(agents: Running) -> None:
    with httpx.Client(base_url=agents.url, timeout=30) as page:
        tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
        name = begin(page, {"model": "caller", "temperature": 0.0, "tools": [tool]})
        events = answered(page, name, say(page, name, "날씨?")["number"])
        call = {"name": "weather", "arguments": '{"city": "서울"}'}
        assert ("call", call) in events
        assert events[-1][1]["calls"] == [call]
        markdown = page.get(f"/page/conversations/{name}/export?format=markdown").text
        assert markdown == (
            "# 날씨?\n\n## User\n\n날씨?\n\n## Assistant (caller)\n\n잠시만요.\n\n"
            'weather:\n```json\n{"city": "서울"}\n```\n'
        )


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("turns", {"content": " "}, 400, "a text or a file"),
        ("turns", {"content": "x", "parent": 1}, 400, "a turn of 'user' does not follow a turn of 'user'"),
        ("turns", {"content": "x", "parent": 9}, 404, "no turn 9"),
        ("turns", {"content": "x", "parent": 2**63}, 400, "<= 9007199254740991"),
        ("turns", {"content": "x", "files": [{"name": "", "text": ""}]}, 400, "files[0].name"),
        ("turns", {"content": "x", "foo": 1}, 400, "unknown field 'foo'"),
        ("answers", {"parent": 9}, 404, "no turn 9"),
        ("answers", {"parent": 2}, 400, "turn 2 is an answer"),
        ("answers", {}, 400, "parent"),
    ],
)
def test_what_is_wrong_is_named(page: httpx.Client, path: str, body: dict[str, Any], status: int, message: str) -> None:
    name = begin(page)
    answered(page, name, say(page, name, "안녕")["number"])
    refused = page.post(f"/page/conversations/{name}/{path}", json=body)
    assert refused.status_code == status
    assert message in refused.json()["error"]["message"]
    assert len(shown(page, name)["turns"]) == 2


def test_a_model_that_is_not_there(page: httpx.Client) -> None:
    name = begin(page, {"model": "gone"})
    turn = say(page, name, "안녕")["number"]
    refused = page.post(f"/page/conversations/{name}/answers", json={"parent": turn})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


@pytest.fixture
def long(talkers: Running) -> Iterator[httpx.Client]:
    """Of the server where an answer takes its time."""
    with httpx.Client(base_url=talkers.url, timeout=60) as client:
        yield client


def test_who_goes_away_finds_what_was_written(long: httpx.Client, talkers: Running) -> None:
    name = begin(long, {"model": "endless", "temperature": 0.0})
    turn = say(long, name, "세어 봐")["number"]
    with long.stream("POST", f"/page/conversations/{name}/answers", json={"parent": turn}) as answer:
        for line in answer.iter_lines():
            if "하나" in line:
                break
        assert shown(long, name)["answering"] == [turn]
    talkers.wait_until_idle()
    conversation = shown(long, name)
    assert conversation["answering"] == []
    question, kept = conversation["turns"]
    assert (kept["finish"], kept["parent"]) == ("stopped", question["number"])
    assert kept["content"].startswith("하나 둘 셋 ")
    assert conversation["leaf"] == kept["number"]


def test_an_answer_to_what_is_deleted_meanwhile(long: httpx.Client) -> None:
    name = begin(long, {"model": "endless", "temperature": 0.0, "max_tokens": 8000})
    turn = say(long, name, "세어 봐")["number"]
    with long.stream("POST", f"/page/conversations/{name}/answers", json={"parent": turn}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert long.delete(f"/page/conversations/{name}").status_code == 200
        rest = list(lines)
    assert rest[-3] == "event: error"
    assert "there is no conversation" in rest[-2]


def test_an_export_can_be_imported(page: httpx.Client) -> None:
    name = begin(page, {"model": "answer", "temperature": 0.0, "system": "짧게"})
    turn = say(page, name, "안녕", files=[{"name": "a.txt", "text": "b"}])["number"]
    for _ in range(2):
        answered(page, name, turn)
    answer = page.get(f"/page/conversations/{name}/export")
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''%EC%95%88%EB%85%95.json"
    exported = answer.json()
    assert [message["role"] for message in exported["messages"]] == ["system", "user", "assistant"]
    copy = page.post("/page/import", json=exported).raise_for_status().json()["id"]
    one, other = shown(page, name), shown(page, copy)
    for each in (one, other):
        del each["id"], each["changed"]
    assert one == other
    assert page.get(f"/page/conversations/{copy}/export").json() == exported


def test_messages_alone_can_be_imported(page: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "짧게"},
        {"role": "user", "content": "안녕"},
        {"role": "assistant", "content": "네", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    made = page.post("/page/import", json={"messages": messages}).raise_for_status().json()
    assert made["settings"] == {"system": "짧게"}
    assert made["title"] == "안녕"
    again = page.get(f"/page/conversations/{made['id']}/export").json()["messages"]
    assert again[2]["tool_calls"] == [{"type": "function", **messages[2]["tool_calls"][0]}] or again == messages  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version"),
        ({"leaf": 9}, "no turn 9"),
        ({"leaf": None}, "leaf"),
        ({"messages": [{"role": "user", "content": "anderes"}]}, "they are not the turns"),
        ({"turns": [{"number": 1, "parent": 2, "role": "user", "created": 0}]}, "is no turn before it"),
        ({"turns": [{"number": 1, "parent": None, "role": "assistant", "created": 0}]}, "does not follow nothing"),
        ({"turns": [{"number": 1, "parent": None, "role": "user", "created": 0}] * 2}, "must be above"),
        ({"turns": [{"number": 1, "parent": None, "role": "user", "created": 0, "html": ""}]}, "unknown field"),
    ],
)
def test_what_is_no_export_is_refused(page: httpx.Client, change: dict[str, Any], message: str) -> None:
    name = begin(page)
    say(page, name, "안녕")
    exported = page.get(f"/page/conversations/{name}/export").json()
    refused = page.post("/page/import", json={k: v for k, v in (exported | change).items() if v is not None})
    assert refused.status_code in (400, 404)
    assert message in refused.json()["error"]["message"]


def test_conversations_belong_to_a_key(start_server: Start, keys: Keys, tmp_path: Path) -> None:
    mine, yours = ({"Authorization": f"Bearer {keys.add(name)}"} for name in ("me", "you"))
    server = start_server(ServerSettings(folder=tmp_path), keys=keys)
    assert httpx.get(f"{server.url}/page/conversations").status_code == 401
    for path in ("/", "/static/chat.html"):
        assert httpx.get(server.url + path).status_code == 200
    with httpx.Client(base_url=server.url, headers=mine, timeout=30) as page:
        name = begin(page)
        turn = say(page, name, "비밀")["number"]
    with httpx.Client(base_url=server.url, headers=yours, timeout=30) as page:
        path = f"/page/conversations/{name}"
        assert page.get("/page/conversations", params={"search": "비밀"}).json()["conversations"] == []
        assert page.get(path).status_code == 404
        assert page.get(f"{path}/export").status_code == 404
        assert page.patch(path, json={"title": "x"}).status_code == 404
        assert page.post(f"{path}/turns", json={"content": "x"}).status_code == 404
        assert page.post(f"{path}/answers", json={"parent": turn}).status_code == 404
        assert page.delete(path).status_code == 404
    assert httpx.get(f"{server.url}{path}", headers=mine).json()["title"] == "비밀"


def test_what_is_deleted_is_in_no_file(start_server: Start) -> None:
    server = start_server()
    folder = server.service.settings.folder
    with httpx.Client(base_url=server.url, timeout=30) as page:
        kept, gone = begin(page), begin(page, {"model": "answer", "system": "GEHEIM-system"})
        say(page, kept, "bleibt-hier")
        long = "GEHEIM-lang " * 2000  # over many pages of the file
        turn = say(page, gone, "GEHEIM-kurz " + long, files=[{"name": "GEHEIM-name", "text": "GEHEIM-text"}])
        other = say(page, gone, "GEHEIM")
        answered(page, gone, other["number"])
        assert len(turn["content"]) > 20000
        page.patch(f"/page/conversations/{gone}", json={"title": "GEHEIM-title"})
        page.get("/page/conversations", params={"search": "GEHEIM"})
        assert b"GEHEIM" in stored_bytes(folder)
        assert page.delete(f"/page/conversations/{gone}").status_code == 200
        assert b"GEHEIM" not in stored_bytes(folder)
        assert ANSWER.encode() not in stored_bytes(folder)
        assert b"bleibt-hier" in stored_bytes(folder)
        assert page.get(f"/page/conversations/{gone}").status_code == 404
    assert (folder / "conversations.db").stat().st_mode & 0o077 == 0


def stored_bytes(folder: Path) -> bytes:
    files = sorted(folder.glob("conversations.db*"))
    assert files
    return b"".join(path.read_bytes() for path in files)


def test_a_log_that_somebody_reads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_WAIT", 0.1)
    store = ConversationStore(tmp_path)

    async def fill() -> str:
        name = (await store.create("", Settings())).id
        await store.add("", name, lambda number: Turn(number=number, parent=None, role="user", created=0, content="x"))
        return name

    name = asyncio.run(fill())
    reader = sqlite3.connect(store.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM turns").fetchall()
    with pytest.raises(UnavailableError, match="another process reads the file"):
        asyncio.run(store.delete("", name))
    reader.close()
    store.close()


def test_titles() -> None:
    def title(content: str) -> str:
        return title_of(Turn(number=1, parent=None, role="user", created=0, content=content))

    assert title("  여러\n줄  ") == "여러 줄"
    assert title("가" * 60) == "가" * 60
    assert title("가" * 61) == "가" * 59 + "…"
