"""/v1/files and /v1/batches, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch
from server_running import Running, Start

from dapji.server.batches import store
from dapji.server.keys import Keys
from dapji.server.settings import Settings
from tiny import ANSWER

HELLO = [{"role": "user", "content": "안녕"}]
CHAT = "/v1/chat/completions"


def line(name: str, body: dict[str, Any] | None = None, *, url: str = CHAT, **more: Any) -> str:
    asked = {"model": "answer", "messages": HELLO, "temperature": 0} if body is None else body
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": asked} | more)


def upload(client: openai.OpenAI, *lines: str) -> str:
    return client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch").id


def begin(client: openai.OpenAI, *lines: str, endpoint: Any = CHAT) -> Batch:
    return client.batches.create(input_file_id=upload(client, *lines), endpoint=endpoint, completion_window="24h")


def ended(client: openai.OpenAI, batch: Batch, seconds: float = 30) -> Batch:
    end = time.monotonic() + seconds
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < end, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def told(client: openai.OpenAI, file: str | None) -> list[dict[str, Any]]:
    assert file is not None
    return [json.loads(text) for text in client.files.content(file).text.splitlines()]


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_file_comes_back_as_it_was_until_it_is_deleted(client: openai.OpenAI, server: Running) -> None:
    data = os.urandom(3 << 20) + b"\r\n--boundary\r\n"
    file = client.files.create(
        file=("가.jsonl", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (file.filename, file.bytes, file.purpose, file.status) == ("가.jsonl", len(data), "batch", "processed")
    assert file.expires_at == file.created_at + 3600
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == data
    body = server.service.settings.folder / "files" / file.id
    assert body.read_bytes() == data
    assert body.stat().st_mode & 0o077 == 0
    assert body.parent.stat().st_mode & 0o077 == 0
    assert client.files.delete(file.id).deleted
    assert not body.exists()
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match=f"there is no file '{file.id}' here"):
            ask(file.id)


def test_files_are_told_page_by_page(client: openai.OpenAI) -> None:
    made = [upload(client, line("a")) for _ in range(5)]
    newest_first = [file.id for file in client.files.list(limit=2)]
    assert newest_first[:5] == made[::-1]
    page = client.files.list(limit=2, order="asc", after=made[1])
    assert [file.id for file in page.data] == made[2:4]
    assert page.has_more
    assert client.files.list(purpose="batch_output", after=made[0]).data == []
    for query in ("limit=0", "order=up", "purpose=x", "after=x", "x=y"):
        assert httpx.get(f"{client.base_url}files?{query}").status_code == 400


@pytest.mark.parametrize(
    ("files", "data", "status", "message"),
    [
        ({"file": b"x"}, {"purpose": "fine-tune"}, 400, "purpose: Invalid enum value 'fine-tune'"),
        ({"file": b"x"}, {}, 400, "missing required field `purpose`"),
        ({"file": b"x"}, {"purpose": "batch", "foo": "1"}, 400, "unknown field 'foo'"),
        ({"file": b"x"}, {"purpose": ["batch", "batch"]}, 400, "purpose stands twice"),
        ({"file": b"x"}, {"purpose": "batch", "file[x]": "1"}, 400, "file: Expected `str`"),
        ({"other": b"x"}, {"purpose": "batch"}, 400, "file: the form has none"),
        ({"file": b"x"}, {"purpose": "batch", "expires_after[anchor]": "created_at"}, 400, "`seconds`"),
        ({"file": b"x" * 5000}, {"purpose": "batch"}, 413, "larger than this server's limit of 4096 bytes"),
        ({"file": b"x"}, {"purpose": "y" * 100_000}, 413, "more than 65536 bytes beside its file"),
    ],
)
def test_what_is_wrong_with_an_upload(
    small: Running, files: Any, data: dict[str, Any], status: int, message: str
) -> None:
    answer = httpx.post(f"{small.url}/v1/files", files=files, data=data)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text
    folder = small.service.settings.folder / "files"
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def small(start_server: Start, tmp_path_factory: pytest.TempPathFactory) -> Running:
    folder = tmp_path_factory.mktemp("small")
    return start_server(Settings(folder=folder, max_file=4096, max_body=1024, max_batch=5))


def test_a_form_that_ends_too_early_is_no_file(small: Running) -> None:
    whole = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--b--\r\n'
    for body, kind in ((whole[:-9], "multipart/form-data; boundary=b"), (whole, "multipart/form-data"), (b"{}", "")):
        answer = httpx.post(f"{small.url}/v1/files", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400, answer.text


def test_a_batch(client: openai.OpenAI, server: Running) -> None:
    lines = [
        line("a"),
        "",
        line("b", {"model": "answer", "messages": HELLO, "temperature": 0, "foo": 1}),
        line("c", {"model": "answer", "messages": HELLO, "temperature": 0, "n": 2}),
    ]
    batch = client.batches.create(
        input_file_id=upload(client, *lines), endpoint=CHAT, completion_window="24h", metadata={"who": "me"},
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )  # fmt: skip
    assert batch.status == "validating"
    batch = ended(client, batch)
    assert (batch.status, counts(batch)) == ("completed", (3, 2, 1))
    assert batch.metadata == {"who": "me"}
    assert batch.expires_at == batch.created_at + 24 * 3600
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert sorted(times) == list(times)  # type: ignore[type-var]
    output, errors = told(client, batch.output_file_id), told(client, batch.error_file_id)
    assert [each["custom_id"] for each in output] == ["a", "c"]
    assert all(each["error"] is None and each["response"]["status_code"] == 200 for each in output)
    for each, n in zip(output, (1, 2), strict=True):
        answer = openai.types.chat.ChatCompletion.model_validate(each["response"]["body"])
        assert [choice.message.content for choice in answer.choices] == [ANSWER] * n
    assert [(each["custom_id"], each["response"]["status_code"]) for each in errors] == [("b", 400)]
    assert "unknown field 'foo'" in errors[0]["response"]["body"]["error"]["message"]
    assert batch.output_file_id is not None
    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.expires_at) == ("batch_output", file.created_at + 7200)
    assert client.batches.list(limit=1).data == [batch]
    with pytest.raises(openai.BadRequestError, match="is completed and cannot be cancelled"):
        client.batches.cancel(batch.id)
    client.files.delete(batch.input_file_id)
    assert ANSWER.encode() not in (server.service.settings.folder / "batches.db").read_bytes()


@pytest.mark.parametrize(
    ("endpoint", "body", "path"),
    [
        ("/v1/completions", {"prompt": "\n", "max_tokens": 20}, ("choices", 0, "text")),
        ("/v1/responses", {"input": "안녕", "store": False}, ("output", 0, "content", 0, "text")),
        ("/v1/embeddings", {"input": "안녕"}, ("data", 0, "object")),
    ],
)
def test_other_endpoints(client: openai.OpenAI, endpoint: str, body: dict[str, Any], path: tuple[Any, ...]) -> None:
    batch = ended(client, begin(client, line("a", {"model": "answer"} | body, url=endpoint), endpoint=endpoint))
    assert batch.status == "completed", batch
    (answer,) = told(client, batch.output_file_id)
    found = answer["response"]["body"]
    for step in path:
        found = found[step]
    assert found == ("embedding" if endpoint == "/v1/embeddings" else ANSWER)


def test_what_is_wrong_with_a_file_is_told_by_its_line(client: openai.OpenAI) -> None:
    wrong = [
        ("{", "invalid_json_line", "not JSON"),
        (line("b", url="/v1/completions"), "invalid_url", "is not the endpoint"),
        (line("a"), "duplicate_custom_id", "is that of line 1"),
        (line("c", {"messages": HELLO}), "missing_required_parameter", "body.model is missing"),
        (line("d", {"model": "gpt"}), "model_not_found", "there is no model 'gpt' here"),
        (line("e", {"model": "answer", "stream": True}), "invalid_request", "body.stream"),
        (line("f", method="GET"), "invalid_request", "Invalid enum value 'GET'"),
        (line("g", foo=1), "unknown_field", "foo"),
        (line("", {"model": "answer"}), "invalid_request", "custom_id"),
        ("[]", "invalid_request", "Expected `object`"),
    ]
    batch = ended(client, begin(client, line("a"), "", *(text for text, _, _ in wrong)))
    assert (batch.status, batch.output_file_id, counts(batch)) == ("failed", None, (len(wrong) + 1, 0, 0))
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.line, error.code) for error in batch.errors.data] == [
        (i, code) for i, (_, code, _) in enumerate(wrong, start=3)
    ]
    for error, (_, _, message) in zip(batch.errors.data, wrong, strict=True):
        assert error.message is not None
        assert message in error.message


def test_a_file_may_be_too_much(small: Running) -> None:
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as client:
        for lines, code in (
            ([line(str(i)) for i in range(6)], "too_many_requests"),
            ([line("a", {"model": "answer", "x": "x" * 2000}), line("b")], "line_too_long"),
            (["", " "], "empty_file"),
        ):
            batch = ended(client, begin(client, *lines))
            assert batch.status == "failed"
            assert batch.errors is not None
            assert [error.code for error in batch.errors.data or ()] == [code]


def test_what_is_wrong_with_a_batch(client: openai.OpenAI) -> None:
    file = upload(client, line("a"))
    url = f"{client.base_url}batches"
    asked = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    for change, status, message in (
        ({"endpoint": "/v1/moderations"}, 400, "takes no batches; those are /v1/chat/completions"),
        ({"completion_window": "1h"}, 400, "Invalid enum value '1h'"),
        ({"input_file_id": "file-x"}, 404, "there is no file 'file-x' here"),
        ({"foo": 1}, 400, "unknown field 'foo'"),
    ):
        answer = httpx.post(url, json=asked | change)
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]
    assert httpx.get(f"{url}/batch_x").status_code == httpx.post(f"{url}/batch_x/cancel").status_code == 404
    output = ended(client, begin(client, line("a"))).output_file_id
    with pytest.raises(openai.BadRequestError, match="purpose 'batch_output', not 'batch'"):
        client.batches.create(input_file_id=output or "", endpoint=CHAT, completion_window="24h")


ENDLESS = {"model": "endless", "messages": HELLO, "temperature": 10, "logit_bias": {"0": -100, "2": -100}}
"""Until the context is full; nothing of it can be guessed ahead."""
LONG = [line(f"long {i}", ENDLESS) for i in range(50)]
"""Some seconds of work."""


def test_cancelling_keeps_what_is_done(start_server: Start) -> None:
    server = start_server(context=4096)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        batch = begin(client, line("a"), line("b"), *LONG)
        waiting = begin(client, line("a"))
        while counts(batch)[1] < 2:
            time.sleep(0.02)
            batch = client.batches.retrieve(batch.id)
        with pytest.raises(openai.BadRequestError, match=f"batch {batch.id} still reads file"):
            client.files.delete(batch.input_file_id)
        assert client.batches.cancel(waiting.id).status == "cancelling"
        assert ended(client, waiting).status == "cancelled"
        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = ended(client, batch)
        total, done, failed = counts(batch)
        assert (batch.status, total, failed) == ("cancelled", 52, 52 - done)
        kept = [each["custom_id"] for each in told(client, batch.output_file_id)]
        assert kept[:2] == ["a", "b"]
        assert done == len(kept) < total
        errors = told(client, batch.error_file_id)
        assert len(errors) == failed
        assert {(error["response"], error["error"]["code"]) for error in errors} == {(None, "batch_cancelled")}
        assert server.service.gate.running == 0


def test_what_is_not_answered_in_time_expires(
    start_server: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dapji.server.openai.batches.Batch", partial(store.Batch, window=2))
    server = start_server(context=4096)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        batch = ended(client, begin(client, line("a"), *LONG))
        assert batch.status == "expired"
        errors, output = told(client, batch.error_file_id), told(client, batch.output_file_id)
        assert counts(batch) == (51, len(output), len(errors))
        assert sorted(each["custom_id"] for each in output + errors) == sorted(["a", *(f"long {i}" for i in range(50))])
        assert {(error["response"], error["error"]["code"]) for error in errors} == {(None, "batch_expired")}
        assert output[0]["custom_id"] == "a"


def test_a_batch_outlives_its_input(tmp_path: Path) -> None:
    """A file that expires while a batch reads it stays until the batch has ended."""

    async def run() -> None:
        kept = store.BatchStore(tmp_path)
        async with kept.writing() as (name, body):
            body.write(line("a").encode())
        await kept.add("", name, "batch", "in.jsonl", 3600)
        batch = store.Batch(id="b", key="", endpoint=CHAT, input_file_id=name, created_at=0, status="in_progress")
        await kept.create(batch, "batch")
        await kept.answer("b", 1, {"custom_id": "a"}, ok=True)
        with closing(sqlite3.connect(kept.path)) as db, db:
            db.execute("UPDATE files SET expires_at = 1")
        await kept.sweep()
        batch = await kept.finish(batch, "completed", unanswered=None, most_bytes=1000)
        assert batch.output_file_id is not None
        assert kept.body(batch.output_file_id).read_bytes() == b'{"custom_id":"a"}\n'
        await kept.sweep()
        assert not kept.body(name).exists()
        kept.close()

    asyncio.run(run())


def test_what_belongs_to_a_key_is_found_by_no_other(start_server: Start, keys: Keys) -> None:
    mine, other = (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        for server in (start_server(keys=keys),)
        for key in (keys.add("me"), keys.add("you"))
    )
    with mine, other:
        batch = ended(mine, begin(mine, line("a")))
        for name in (batch.input_file_id, batch.output_file_id or ""):
            for ask in (other.files.retrieve, other.files.content, other.files.delete):
                with pytest.raises(openai.NotFoundError):
                    ask(name)
        for again in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                again(batch.id)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
        assert other.files.list().data == other.batches.list().data == []
        assert len(mine.files.list().data) == 2


def test_of_two_servers_with_one_store_one_answers_and_the_other_goes_on(
    start_server: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapji.server.batches.runner.LOOK", 0.2)
    first = start_server(Settings(folder=tmp_path, max_running=4))
    second = start_server(Settings(folder=tmp_path, max_running=4))
    with openai.OpenAI(base_url=f"{first.url}/v1", api_key="none", max_retries=0) as client:
        batch = begin(client, *(line(f"{i}", ENDLESS | {"max_tokens": 100}) for i in range(50)))
        while counts(batch)[1] < 2:
            time.sleep(0.02)
            batch = client.batches.retrieve(batch.id)
    models = [server.service.registry.models["endless"].model for server in (first, second)]
    assert [model is not None for model in models] in ([True, False], [False, True]), "one of them"
    worker, other = (first, second) if models[0] is not None else (second, first)
    worker.stop()
    with openai.OpenAI(base_url=f"{other.url}/v1", api_key="none", max_retries=0) as client:
        batch = ended(client, batch)
        assert (batch.status, counts(batch)) == ("completed", (50, 50, 0))
        names = [each["custom_id"] for each in told(client, batch.output_file_id)]
        assert names == [f"{i}" for i in range(50)]


def test_a_batch_counts_for_its_key_and_waits_where_the_quota_is_used_up(
    start_server: Start, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapji.server.batches.runner.LOOK", 0.5)
    server = start_server(keys=keys)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=keys.add("me", 1000), max_retries=0) as client:
        usage = client.chat.completions.create(model="answer", messages=HELLO, temperature=0).usage  # type: ignore[arg-type]
        assert usage is not None
        ended(client, begin(client, line("a"), line("b")))
        used = Keys(keys.path).all()[0].used
        assert used == 3 * usage.total_tokens
        batch = begin(client, *(line(str(i)) for i in range(200)))
        end = time.monotonic() + 20
        while Keys(keys.path).all()[0].used + usage.prompt_tokens < 1000:
            assert time.monotonic() < end
            time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "in_progress"
        assert counts(batch)[2] == 0, "nothing fails, it waits"
        keys.revoke("me")
    with closing(sqlite3.connect(server.app.state.batches.path)) as db:
        while db.execute("SELECT status FROM batches WHERE id = ?", (batch.id,)).fetchone() != ("cancelled",):
            assert time.monotonic() < end, "the batch of a key that was revoked ends"
            time.sleep(0.1)


def serve(model: Path, home: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dapji", "serve", str(model), "--port", "0", "--max-running", "4"],
        env=os.environ | {"DAPJI_HOME": str(home)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for said in process.stderr:
        if found := re.search(r"listening on (\S+)", said):
            return process, found[1]
    raise AssertionError("the server did not start")


def test_a_batch_goes_on_after_kill_9(models: list[Path], tmp_path: Path) -> None:
    n = 60
    process, url = serve(models[0], tmp_path)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        batch = begin(client, *(line(f"{i}") for i in range(n)))
        while counts(batch)[1] < 10:
            batch = client.batches.retrieve(batch.id)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert counts(batch)[1] < n, "it was killed in the middle"
    process, url = serve(models[0], tmp_path)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        done = counts(batch)[1]
        batch = ended(client, batch)
        assert (batch.status, counts(batch)) == ("completed", (n, n, 0))
        assert [each["custom_id"] for each in told(client, batch.output_file_id)] == [f"{i}" for i in range(n)]
        assert batch.error_file_id is None
        metrics = httpx.get(f"{url}/metrics").text
        (answered,) = re.findall(r'dapji_requests_total{route="/v1/chat/completions",status="200"} (\S+)', metrics)
        assert float(answered) <= n - done, "what was done is not done again"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said


def test_requests_of_clients_pass_a_batch(start_server: Start, tmp_path: Path) -> None:
    server = start_server(Settings(folder=tmp_path, max_running=2), context=4096)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        batch = begin(client, *LONG)
        endless = server.service.registry.models["endless"]
        while endless.model is None or not endless.model.engine._scheduler.busy:
            time.sleep(0.01)
        assert all(sequence.background for sequence in list(endless.model.engine._scheduler))
        answer = client.chat.completions.create(model="answer", messages=HELLO, temperature=0)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == ANSWER
        assert (server.service.gate.running, server.service.active) == (1, 0)
        client.batches.cancel(batch.id)
        assert ended(client, batch).status == "cancelled"


def test_an_upload_that_is_broken_off_leaves_nothing(server: Running) -> None:
    folder = server.service.settings.folder / "files"
    before = set(folder.iterdir()) if folder.exists() else set()

    def parts() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 100_000
        raise io.UnsupportedOperation

    with pytest.raises(io.UnsupportedOperation):
        httpx.post(
            f"{server.url}/v1/files",
            content=parts(),
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
    server.wait_until_idle()
    assert set(folder.iterdir()) == before


def test_a_file_has_its_time_for_each_bodys_worth_of_it(start_server: Start, tmp_path: Path) -> None:
    server = start_server(Settings(folder=tmp_path, receive_timeout=0.5, max_body=1000))
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    tail = b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'

    def parts(size: int) -> Iterator[bytes]:
        yield head
        for _ in range(10):
            time.sleep(0.1)
            yield b"x" * size
        yield tail

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    whole = httpx.post(f"{server.url}/v1/files", content=parts(1000), headers=kind)
    assert whole.json()["bytes"] == 10_000
    assert httpx.post(f"{server.url}/v1/files", content=parts(1), headers=kind).status_code == 408
