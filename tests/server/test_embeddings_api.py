"""Embeddings and ranking, asked by OpenAI's and Ollama's own clients."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest
from numpy.typing import NDArray
from server_running import Running, Start

from dapji import load
from dapji.server.keys import Keys
from dapji.server.settings import Settings
from tiny import SCRIPT, write_tiny

TEXTS = ["안녕", "Hello, world", "답은 42입니다."]
CONTEXT = 64


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("embedder") / "embedder.gguf", SCRIPT)


@pytest.fixture(scope="module")
def embedder(start_server: Start, path: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    settings = Settings(max_inputs=40, folder=tmp_path_factory.mktemp("embedder-server"))
    return start_server(settings, paths=[path], context=CONTEXT)


@pytest.fixture(scope="module")
def vectors(path: Path) -> NDArray[np.float32]:
    """Of TEXTS."""
    with load(path, context=CONTEXT) as model:
        return model.embed(TEXTS)


@pytest.fixture
def client(embedder: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedder.url}/v1", api_key="none", max_retries=0) as connected:
        yield connected


@pytest.fixture
def other(embedder: Running) -> Iterator[ollama.Client]:
    with ollama.Client(host=embedder.url) as connected:
        yield connected


def n_tokens(*texts: str) -> int:
    """The vocabulary's longer tokens come of no merges: a token for each byte."""
    return sum(len(text.encode()) for text in texts)


def test_openais_client_gets_vectors(client: openai.OpenAI, vectors: NDArray[np.float32]) -> None:
    """It asks for base64 by itself."""
    answer = client.embeddings.create(model="embedder", input=TEXTS)
    assert [each.index for each in answer.data] == [0, 1, 2]
    np.testing.assert_array_equal(np.array([each.embedding for each in answer.data], dtype=np.float32), vectors)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == n_tokens(*TEXTS)
    assert (answer.model, answer.object, answer.model_extra) == ("embedder", "list", {"pooling": "mean"})


def test_numbers_and_base64_are_the_same(embedder: Running, vectors: NDArray[np.float32]) -> None:
    def ask(**options: Any) -> Any:
        asked = {"input": TEXTS[0], **options}
        return httpx.post(f"{embedder.url}/v1/embeddings", json=asked).json()["data"][0]["embedding"]

    np.testing.assert_array_equal(np.array(ask(), dtype=np.float32), vectors[0])
    encoded = base64.b64decode(ask(encoding_format="base64"))
    np.testing.assert_array_equal(np.frombuffer(encoded, dtype="<f4"), vectors[0])


def test_token_ids_are_texts(client: openai.OpenAI, embedder: Running, vectors: NDArray[np.float32]) -> None:
    ids = [httpx.post(f"{embedder.url}/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    one = client.embeddings.create(model="embedder", input=ids[0])
    many = client.embeddings.create(model="embedder", input=ids)
    np.testing.assert_array_equal(np.array(one.data[0].embedding, dtype=np.float32), vectors[0])
    np.testing.assert_array_equal(np.array([each.embedding for each in many.data], dtype=np.float32), vectors)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"input": ["a", "x" * 65]}, r"the text \(65 tokens\) exceeds the context \(64 tokens\)"),
        ({"input": ""}, "at least one token, got 0"),
        ({"input": []}, "input is empty"),
        ({"input": [1, "a"]}, "input mixes"),
        ({"input": [100_000]}, r"tokens\[0\] must be a token id"),
        ({"input": ["a"] * 41}, "41 texts: a request may have 1 to 40"),
        ({"input": "a", "dimensions": 8}, r"dimensions \(8\) must be the model's 64"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "truncate": True}, "unknown field 'truncate'"),
    ],
)
def test_what_is_refused_has_a_reason(embedder: Running, asked: dict[str, Any], message: str) -> None:
    answer = httpx.post(f"{embedder.url}/v1/embeddings", json=asked)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"]["message"])
    if "exceeds" in message:
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_many_texts_share_the_server_with_answers(embedder: Running, vectors: NDArray[np.float32]) -> None:
    """The same bits beside answers and each other."""
    got: list[Any] = []

    def ask() -> None:
        got.append(httpx.post(f"{embedder.url}/v1/embeddings", json={"input": TEXTS * 12}, timeout=60).json())

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    asked = {"messages": [{"role": "user", "content": "안녕"}], "max_tokens": 20}
    answer = httpx.post(f"{embedder.url}/v1/chat/completions", json=asked, timeout=60)
    for thread in threads:
        thread.join()
    assert answer.status_code == 200
    for each in got:
        rows = np.array([one["embedding"] for one in each["data"]], dtype=np.float32)
        np.testing.assert_array_equal(rows, np.tile(vectors, (12, 1)))
    embedder.wait_until_idle()
    assert embedder.service.gate.running == 0


def test_a_small_server_takes_many_texts(
    start_server: Start, path: Path, vectors: NDArray[np.float32], tmp_path: Path
) -> None:
    small = start_server(Settings(max_running=2, folder=tmp_path), paths=[path], context=CONTEXT)
    answer = httpx.post(f"{small.url}/v1/embeddings", json={"input": TEXTS * 4}).json()
    rows = np.array([one["embedding"] for one in answer["data"]], dtype=np.float32)
    np.testing.assert_array_equal(rows, np.tile(vectors, (4, 1)))


def test_the_model_says_how_it_pools(embedder: Running, client: openai.OpenAI) -> None:
    client.embeddings.create(model="embedder", input="a")
    described = httpx.get(f"{embedder.url}/v1/models/embedder").json()
    assert described["embedding"] == {"size": 64, "pooling": "mean", "declared": False, "dimensions": []}
    assert described["limits"]["max_inputs"] == 40


def test_ollamas_client_gets_vectors(other: ollama.Client, vectors: NDArray[np.float32]) -> None:
    answer = other.embed("embedder", TEXTS)
    np.testing.assert_array_equal(np.array(answer.embeddings, dtype=np.float32), vectors)
    assert (answer.model, answer.prompt_eval_count) == ("embedder", n_tokens(*TEXTS))
    assert answer.total_duration is not None
    assert 0 < answer.total_duration < 10**11
    one = other.embed("embedder", TEXTS[0], options={"num_ctx": 64}, keep_alive="5m")
    np.testing.assert_array_equal(np.array(one.embeddings, dtype=np.float32), vectors[:1])
    old = other.embeddings("embedder", TEXTS[0])
    np.testing.assert_array_equal(np.array(old.embedding, dtype=np.float32), vectors[0])
    assert other.embed("embedder", "").embeddings == other.embeddings("embedder", "").embedding == []


def test_ollama_cuts_where_it_is_told_to(other: ollama.Client) -> None:
    for options in ({}, {"truncate": False}):
        with pytest.raises(ollama.ResponseError, match=r"\(70 tokens\) exceeds the context \(64 tokens\)"):
            other.embed("embedder", "x" * 70, **options)
    cut = other.embed("embedder", "x" * 70, truncate=True)
    assert (cut.embeddings, cut.prompt_eval_count) == (other.embed("embedder", "x" * 64).embeddings, 64)


def test_what_ollama_has_beside_is_refused(other: ollama.Client, embedder: Running) -> None:
    with pytest.raises(ollama.ResponseError, match="temperature"):
        other.embed("embedder", "a", options={"temperature": 0.5})
    with pytest.raises(ollama.ResponseError, match=r"options.num_ctx \(65\) is more"):
        other.embed("embedder", "a", options={"num_ctx": 65})
    with pytest.raises(ollama.ResponseError, match=r"dimensions \(3\)"):
        other.embed("embedder", "a", dimensions=3)
    answer = httpx.post(f"{embedder.url}/api/embed", json={"input": "a", "options": {"num_thread": 3}})
    assert answer.headers["dapji-ignored-fields"] == "options.num_thread"


def test_a_model_stays_open_as_ollamas_clients_say(other: ollama.Client, embedder: Running) -> None:
    other.embed("embedder", "a", keep_alive=0)
    assert embedder.service.registry.find(None).model is None
    other.embed("embedder", "a", keep_alive=-1)
    assert embedder.service.registry.find(None).model is not None


def test_documents_are_ranked(embedder: Running, vectors: NDArray[np.float32]) -> None:
    asked = {"query": TEXTS[0], "documents": [TEXTS[1], {"text": TEXTS[0]}, TEXTS[2]]}
    answer = httpx.post(f"{embedder.url}/v1/rerank", json=asked).json()
    cosines = vectors[[1, 0, 2]] @ vectors[0]
    order = np.argsort(-cosines).tolist()
    assert [result["index"] for result in answer["results"]] == order
    assert order[0] == 1
    scores = [result["relevance_score"] for result in answer["results"]]
    np.testing.assert_allclose(scores, cosines[order], rtol=0, atol=1e-6)
    assert (answer["method"], answer["model"]) == ("cosine", "embedder")
    assert answer["usage"]["total_tokens"] == n_tokens(TEXTS[0], *TEXTS)
    best = httpx.post(f"{embedder.url}/v1/rerank", json=asked | {"top_n": 1, "return_documents": True}).json()
    assert best["results"] == [answer["results"][0] | {"document": {"text": TEXTS[0]}}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": []}, "documents is empty"),
        ({"top_n": 0}, r"top_n \(0\) must be at least 1"),
        ({"documents": ["x" * 65]}, "exceeds the context"),
        ({"documents": [{"text": "a", "image": "b"}]}, "unknown field 'documents"),
        ({"documents": ["a"] * 41}, "41 texts"),
    ],
)
def test_a_ranking_that_is_refused_has_a_reason(embedder: Running, changes: dict[str, Any], message: str) -> None:
    answer = httpx.post(f"{embedder.url}/v1/rerank", json={"query": "a", "documents": ["b"]} | changes)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"]["message"])


def test_tokens_count_for_keys_and_metrics(start_server: Start, path: Path, keys: Keys) -> None:
    key = keys.add("me", quota=31)
    guarded = start_server(paths=[path], context=CONTEXT, keys=keys)
    headers = {"Authorization": f"Bearer {key}"}

    def ask(text: str) -> int:
        return httpx.post(f"{guarded.url}/v1/embeddings", json={"input": text}, headers=headers).status_code

    assert httpx.post(f"{guarded.url}/v1/embeddings", json={"input": "a"}).status_code == 401
    assert [ask("x" * 20), ask("x" * 20), ask("x" * 10)] == [200, 429, 200]
    metrics = httpx.get(f"{guarded.url}/metrics", headers=headers).text
    assert 'dapji_prompt_tokens_total{model="embedder"} 30.0' in metrics


def test_batches_take_texts(client: openai.OpenAI, vectors: NDArray[np.float32]) -> None:
    body = {"model": "embedder", "input": TEXTS[:1]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}
    file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    end = time.monotonic() + 30
    while batch.status != "completed":
        assert batch.status != "failed", batch.errors
        assert time.monotonic() < end, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    answer = json.loads(client.files.content(batch.output_file_id or "").text)
    told = answer["response"]["body"]["data"][0]["embedding"]
    np.testing.assert_array_equal(np.array(told, dtype=np.float32), vectors[0])
