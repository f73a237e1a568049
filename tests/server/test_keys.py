"""Keys: what is on disk, who gets in, and how much they may ask."""

from __future__ import annotations

import json
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_running import Running, Start

from dapji.cli.main import main
from dapji.errors import FormatError, UsageError
from dapji.server.keys import Keys
from dapji.server.problem import Problem

HELLO: list[Any] = [{"role": "user", "content": "안녕"}]


def test_only_salted_hashes_are_on_disk_and_only_for_the_owner(keys: Keys) -> None:
    first, second = keys.add("a"), keys.add("b", 1000)
    assert (keys.name_of(first), keys.name_of(second)) == ("a", "b")
    files = list(keys.path.parent.iterdir())
    assert keys.path in files
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        data = file.read_bytes()
        assert not any(key.removeprefix("dapji-").encode() in data for key in (first, second))
    for wrong in ("", first[:-1], first + "x", first.lower(), "ké\x00y"):
        assert keys.name_of(wrong) is None


def test_names_are_unique_until_they_are_revoked(keys: Keys) -> None:
    old = keys.add("a", 5)
    with pytest.raises(UsageError, match="a key named 'a' already"):
        keys.add("a")
    keys.charge("a", 3)
    keys.revoke("a")
    with pytest.raises(UsageError, match="no key named 'a'"):
        keys.revoke("a")
    assert keys.name_of(old) is None
    assert keys.asked, "the last one is revoked, and nothing opens"
    new = keys.add("a", 5)
    assert (keys.name_of(old), keys.name_of(new)) == (None, "a")
    assert [(key.name, key.quota, key.used, key.revoked) for key in keys.all()] == [("a", 5, 3, None)]
    for name in ("", "a b", "ä", "x" * 65, "a\n"):
        with pytest.raises(UsageError, match="is no name of a key"):
            keys.add(name)


def test_a_quota_is_of_a_day_and_outlives_the_process(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.add("a", 100)
    keys.charge_prompt("a", 60)
    keys.charge("a", 30)
    again = Keys(keys.path)
    with pytest.raises(
        Problem, match=r"key 'a' has used 90 of its 100 tokens of this day .* this prompt has 10"
    ) as told:
        again.charge_prompt("a", 10)
    assert told.value.status == 429
    assert 0 < int(told.value.headers["Retry-After"]) <= 24 * 3600 + 1
    again.charge_prompt("a", 9)
    monkeypatch.setattr("dapji.server.keys._today", lambda: "2999-01-01")
    again.charge_prompt("a", 99)


def test_the_first_keys_may_be_made_at_once(tmp_path: Path) -> None:
    """Each thread has a connection of its own, as processes have."""
    for i in range(20):
        path = tmp_path / str(i) / "keys.db"
        start = threading.Barrier(6)

        def add(n: int, path: Path = path, start: threading.Barrier = start) -> str:
            start.wait()
            return Keys(path).add(f"k{n}") if n < 4 else str(Keys(path).asked)

        with ThreadPoolExecutor(6) as threads:
            made = list(threads.map(add, range(6)))
        assert [Keys(path).name_of(key) for key in made[:4]] == ["k0", "k1", "k2", "k3"]
        assert sorted(file.suffix for file in path.parent.iterdir() if file.is_dir()) == []


def test_what_is_no_file_of_keys_is_said_to_be(keys: Keys) -> None:
    keys.path.parent.mkdir()
    keys.path.write_bytes(b"nothing like it" * 100)
    with pytest.raises(FormatError, match=r"keys\.db cannot be used: file is not a database"):
        keys.all()
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(keys.path).execute("SELECT * FROM keys")


def ask(server: Running, key: str | None, path: str = "/v1/models") -> httpx.Response:
    return httpx.get(server.url + path, headers={} if key is None else {"Authorization": f"Bearer {key}"})


def test_a_running_server_sees_what_another_process_changes(start_server: Start, keys: Keys) -> None:
    server, other = start_server(keys=keys), Keys(keys.path)
    assert ask(server, None).status_code == 200, "nobody is asked for a key while there is none"
    key = other.add("me")
    assert ask(server, None).status_code == 401
    assert ask(server, "wrong").json()["error"]["code"] == "invalid_api_key"
    assert ask(server, key).status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers={"x-api-key": key}).status_code == 200
    assert ask(server, None, "/health").status_code == 200
    assert ask(server, None, "/metrics").status_code == 401
    other.revoke("me")
    assert ask(server, key).status_code == 401


def test_a_quota_counts_prompts_and_answers_and_then_refuses(start_server: Start, keys: Keys) -> None:
    server, other = start_server(keys=keys), Keys(keys.path)
    key = other.add("me", 10_000)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        asked = client.chat.completions.create
        usages = [asked(model="answer", messages=HELLO, n=n, seed=1, temperature=0).usage for n in (1, 2)]
    used = sum(usage.total_tokens for usage in usages if usage is not None)
    assert other.all()[0].used == used > 0

    other.revoke("me")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=other.add("me", used + 5), max_retries=0) as client:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match=f"has used {used} of its {used + 5} tokens") as told:
                client.chat.completions.create(model="answer", messages=HELLO, stream=stream)  # type: ignore[call-overload]
            assert told.value.code == "quota_exceeded"
            assert int(told.value.response.headers["Retry-After"]) > 0


def test_an_answer_that_its_client_leaves_is_counted(start_server: Start, keys: Keys) -> None:
    server = start_server(keys=keys, context=4096)
    key = keys.add("me", 100_000)
    asked = {"model": "endless", "messages": HELLO, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, headers={"x-api-key": key}) as answer:
        lines = answer.iter_lines()
        for _ in range(40):
            next(lines)
    prompt = httpx.post(
        f"{server.url}/tokenize", json={"model": "endless", "messages": HELLO}, headers={"x-api-key": key}
    ).json()["count"]
    server.wait_until_idle()
    assert Keys(keys.path).all()[0].used >= prompt + 15


def test_list_as_json_names_no_key(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DAPJI_HOME", str(keys.path.parent.parent))
    for arguments in (["key", "add", "me", "--quota", "7"], ["key", "list", "--json"], ["key", "list"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        out, err = capsys.readouterr()
        if arguments[1] == "add":
            key = out.strip()
            assert keys.name_of(key) == "me"
            assert "cannot be shown again" in err
        else:
            assert key not in out
            assert "me" in out
        if "--json" in arguments:
            (told,) = json.loads(out)
            assert (told["name"], told["quota"], told["used"]) == ("me", 7, 0)
