"""/v1/messages/batches, asked by Anthropic's own client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types.messages import MessageBatch
from server_running import Running, Start

from dapji.server.keys import Keys
from tiny import ANSWER

PARAMS: dict[str, Any] = {
    "model": "answer", "max_tokens": 50, "temperature": 0, "messages": [{"role": "user", "content": "안녕"}]
}  # fmt: skip
ENDLESS = PARAMS | {"model": "endless", "max_tokens": 4000}


@pytest.fixture
def client(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def ended(client: anthropic.Anthropic, batch: MessageBatch) -> MessageBatch:
    end = time.monotonic() + 30
    while batch.processing_status != "ended":
        assert time.monotonic() < end, batch
        time.sleep(0.05)
        batch = client.messages.batches.retrieve(batch.id)
    return batch


def begin(client: anthropic.Anthropic, **params: Any) -> MessageBatch:
    return client.messages.batches.create(
        requests=[{"custom_id": name, "params": each} for name, each in params.items()]
    )


def counts(batch: MessageBatch) -> dict[str, int]:
    return {name: n for name, n in batch.request_counts.to_dict().items() if isinstance(n, int) and n}


def test_a_batch(client: anthropic.Anthropic, server: Running) -> None:
    bodies = server.service.settings.folder / "files"
    before = set(bodies.iterdir()) if bodies.exists() else set()
    asked = {"a": PARAMS, "b": PARAMS | {"foo": 1}, "c": PARAMS | {"model": "gpt"}, "d": PARAMS}
    batch = begin(client, **asked)
    assert (batch.processing_status, counts(batch), batch.results_url) == ("in_progress", {"processing": 4}, None)
    assert (batch.expires_at - batch.created_at).total_seconds() == 24 * 3600
    batch = ended(client, batch)
    assert counts(batch) == {"succeeded": 2, "errored": 2}
    assert batch.ended_at is not None
    assert batch.cancel_initiated_at is None
    results = {each.custom_id: each.result for each in client.messages.batches.results(batch.id)}
    assert results.keys() == asked.keys()
    for name in ("a", "d"):
        result = results[name]
        assert result.type == "succeeded"
        assert result.message.content[0].to_dict() == {"type": "text", "text": ANSWER}
    for name, kind, message in (("b", "invalid_request_error", "foo"), ("c", "not_found_error", "no model 'gpt'")):
        result = results[name]
        assert result.type == "errored"
        assert result.error.error.type == kind
        assert message in result.error.error.message
    assert httpx.get(f"{server.url}/v1/files", params={"limit": 100}).text.count("msgbatch") == 0
    assert client.messages.batches.delete(batch.id).id == batch.id
    for ask in (client.messages.batches.retrieve, client.messages.batches.cancel, client.messages.batches.delete):
        with pytest.raises(anthropic.NotFoundError):
            ask(batch.id)
    assert set(bodies.iterdir()) == before


def test_batches_are_told_page_by_page_in_both_directions(client: anthropic.Anthropic) -> None:
    made = [ended(client, begin(client, a=PARAMS)).id for _ in range(5)][::-1]
    assert [batch.id for batch in client.messages.batches.list(limit=2)][:5] == made
    page = client.messages.batches.list(limit=2, before_id=made[4])
    assert [batch.id for batch in page.data] == made[2:4]
    assert page.has_more
    assert [batch.id for batch in client.messages.batches.list(limit=2, before_id=made[1]).data][-1:] == made[:1]
    assert client.beta.messages.batches.retrieve(made[0]).id == made[0]


def test_cancelling_keeps_what_is_done(start_server: Start) -> None:
    server = start_server(context=4096)
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        batch = begin(client, a=PARAMS, **{f"long-{i}": ENDLESS for i in range(100)})
        with pytest.raises(anthropic.BadRequestError, match="has not ended"):
            client.messages.batches.delete(batch.id)
        with pytest.raises(anthropic.AnthropicError, match="Has it finished processing"):
            client.messages.batches.results(batch.id)
        end = time.monotonic() + 20
        database = server.app.state.batches
        while server.service.gate.running == 0 or not database.path.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        assert client.messages.batches.cancel(batch.id).processing_status == "canceling"
        batch = ended(client, batch)
        told = counts(batch)
        assert sum(told.values()) == 101
        assert told["canceled"] > 0
        assert batch.cancel_initiated_at is not None
        kinds = [each.result.type for each in client.messages.batches.results(batch.id)]
        assert {kind: kinds.count(kind) for kind in set(kinds)} == told


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "requests"),
        ([{"custom_id": "a", "params": PARAMS}] * 2, "requests[1].custom_id 'a' is that of another request"),
        ([{"custom_id": "a b", "params": PARAMS}], "requests[0].custom_id"),
        ([{"custom_id": "a", "params": PARAMS | {"stream": True}}], "requests[0].params.stream"),
        ([{"custom_id": "a", "params": PARAMS, "foo": 1}], "unknown field 'requests[0].foo'"),
    ],
)
def test_what_is_wrong_is_named(client: anthropic.Anthropic, server: Running, requests: Any, message: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as wrong:
        client.messages.batches.create(requests=requests)
    assert message in str(wrong.value)


def test_a_batch_belongs_to_its_key(start_server: Start, keys: Keys) -> None:
    server = start_server(keys=keys)
    mine, other = (
        anthropic.Anthropic(base_url=server.url, api_key=keys.add(name), max_retries=0) for name in ("me", "you")
    )
    with mine, other:
        batch = ended(mine, begin(mine, a=PARAMS))
        for ask in (other.messages.batches.retrieve, other.messages.batches.delete, other.messages.batches.results):
            with pytest.raises(anthropic.NotFoundError):
                ask(batch.id)
        assert other.messages.batches.list().data == []
        assert len(list(mine.messages.batches.results(batch.id))) == 1
