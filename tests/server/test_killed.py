"""kill -9 amid many streams: what clients were told is kept is there at the next start, and the files are whole."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from tiny import SCRIPT, write_tiny

STREAMS = 64


@contextmanager
def serving(model: Path, home: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server in a process of its own, and its address; killed at the end if it still runs."""
    command = [sys.executable, "-m", "dapji", "serve", str(model), "--port", "0", "--threads", "1", "--context", "4096"]
    said = home / "said.txt"
    with (
        said.open("wb") as stderr,
        subprocess.Popen(command, stderr=stderr, env=os.environ | {"DAPJI_HOME": str(home)}) as process,
    ):
        try:
            while (address := re.search(r"listening on (\S+)", said.read_text())) is None:
                assert process.poll() is None, said.read_text()
                time.sleep(0.05)
            yield process, address[1]
        finally:
            process.kill()


def kill_amid_streams(
    model: Path, home: Path, keep_asking: Callable[[str], None], enough: threading.Event, database: str
) -> None:
    """keep_asking: a client, until the server is gone. enough: set when enough was told."""
    with serving(model, home) as (process, url):
        threads = [threading.Thread(target=keep_asking, args=(url,)) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        assert enough.wait(120)
        running = httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    assert re.search(r"^dapji_requests_running [1-9]", running, re.MULTILINE), "some were under way"
    with sqlite3.connect(home / "server" / database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_stored_responses_outlive_a_kill(tmp_path: Path) -> None:
    script = [f"{i} " for i in range(150)] + SCRIPT  # long enough that most are under way at any time
    model = write_tiny(tmp_path / "model.gguf", script)
    kept: dict[str, str] = {}
    enough = threading.Event()

    def keep_asking(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            try:
                while True:
                    for event in client.responses.create(model="model", input="Hi\n", stream=True, temperature=0):
                        if event.type == "response.completed":
                            kept[event.response.id] = event.response.output_text
                            if len(kept) >= STREAMS:
                                enough.set()
            except (openai.APIError, httpx.HTTPError):
                return  # the server is gone

    kill_amid_streams(model, tmp_path, keep_asking, enough, "responses.db")
    with serving(model, tmp_path) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for id, text in kept.items():
            assert client.responses.retrieve(id).output_text == text
        going_on = client.responses.create(model="model", input="Hi\n", previous_response_id=next(iter(kept)))
        assert going_on.status == "completed"


def test_conversations_of_the_page_outlive_a_kill(tmp_path: Path) -> None:
    script = [f"{i} " for i in range(150)] + SCRIPT
    model = write_tiny(tmp_path / "model.gguf", script)
    told: dict[str, list[dict[str, Any]]] = {}
    n_answers = 0
    enough = threading.Event()

    def keep_asking(url: str) -> None:
        nonlocal n_answers
        try:
            with httpx.Client(base_url=url, timeout=60) as page:
                name = page.post("/page/conversations", json={"settings": {"temperature": 0.0}}).json()["id"]
                turns, parent = told.setdefault(name, []), None
                while True:
                    asked = page.post(
                        f"/page/conversations/{name}/turns", json={"content": "안녕\n", "parent": parent}
                    ).json()
                    turns.append(asked)
                    with page.stream(
                        "POST", f"/page/conversations/{name}/answers", json={"parent": asked["number"]}
                    ) as answer:
                        for event in answer.iter_lines():
                            if event.startswith("data: ") and '"finish"' in event:
                                turns.append(json.loads(event.removeprefix("data: ")))
                                parent = None if parent else turns[-1]["number"]  # another branch, or further
                                n_answers += 1
                                if n_answers >= STREAMS:
                                    enough.set()
        except httpx.HTTPError:
            return  # the server is gone

    kill_amid_streams(model, tmp_path, keep_asking, enough, "conversations.db")
    with serving(model, tmp_path) as (_, url), httpx.Client(base_url=url) as page:
        for name, turns in told.items():
            kept = {turn["number"]: turn for turn in page.get(f"/page/conversations/{name}").json()["turns"]}
            assert all(kept[turn["number"]] == turn for turn in turns)
