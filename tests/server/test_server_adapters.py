"""One base and its adapters in one server, chosen by the name of the model; the clients that people have."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
from anthropic import Anthropic
from server_running import Running

from dapji.model import load
from dapji.server.problem import Problem
from dapji.server.registry import Registry
from dapji.server.settings import Settings
from tiny import COUNTING, write_adapter, write_tiny

MESSAGES: Any = [{"role": "user", "content": "?"}]
TOLD = {
    "counting": "하나 둘 셋 하나 둘 ",
    "counting:backwards": "하나 셋 둘 하나 셋 ",
    "counting:twice": "하나 둘 둘 둘 둘 ",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str, Path]]]:
    folder = tmp_path_factory.mktemp("adapted")
    base = write_tiny(folder / "counting.gguf", COUNTING, endless=True)
    backwards = write_adapter(folder / "backwards", base, {"하나 ": "셋 ", "셋 ": "둘 ", "둘 ": "하나 "})
    twice = write_adapter(folder / "twice", base, {"둘 ": "둘 "})
    return base, [("counting", "backwards", backwards), ("counting", "twice", twice)]


@pytest.fixture(scope="module")
def adapted(files: tuple[Path, list[tuple[str, str, Path]]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    base, adapters = files
    registry = Registry([base], load=lambda path: load(path, context=512), memory=None, adapters=adapters)
    server = Running(registry, Settings(folder=tmp_path_factory.mktemp("server")), None)
    yield server
    server.stop()


@pytest.fixture
def client(adapted: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{adapted.url}/v1", api_key="none") as client:
        yield client


def test_the_model_names_base_and_adapter_side_by_side(adapted: Running, client: openai.OpenAI) -> None:
    def ask(name: str) -> str | None:
        chat = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=5, temperature=0)
        assert chat.model == name
        return chat.choices[0].message.content

    names = list(TOLD) * 4
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(ask, names)) == [TOLD[name] for name in names]
    opened = {served.name: served.model for served in adapted.service.registry.models.values()}
    assert len({id(model) for model in opened.values()}) == 1, "one base"


def test_every_protocol_takes_the_name(adapted: Running, client: openai.OpenAI) -> None:
    name = "counting:backwards"
    completion = client.completions.create(model=name, prompt="\n", max_tokens=5, temperature=0)
    assert completion.choices[0].text == TOLD[name]
    response = client.responses.create(model=name, input="?", max_output_tokens=16, temperature=0)
    assert response.output_text.startswith(TOLD[name])
    with Anthropic(base_url=adapted.url, api_key="none") as anthropic:
        message = anthropic.messages.create(model=name, messages=MESSAGES, max_tokens=5, extra_body={"temperature": 0})
    assert message.content[0].text == TOLD[name]  # type: ignore[union-attr]
    with ollama.Client(adapted.url) as local:
        told = local.chat(name, MESSAGES, options={"num_predict": 5, "temperature": 0})
    assert (told.model, told.message.content) == (name, TOLD[name])


def test_prompts_are_scored_by_the_adapter(adapted: Running, client: openai.OpenAI) -> None:
    registry = adapted.service.registry
    tokens = list(registry.models["counting"].model.files.checkpoint.metadata["tokenizer.ggml.tokens"])

    def last(name: str) -> float:
        """ln p of the second of two tokens that follow each other."""
        scored = client.completions.create(
            model=name, prompt=[len(tokens) - 3, len(tokens) - 1], max_tokens=0, logprobs=1, echo=True
        )
        logprobs = scored.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        return logprobs.token_logprobs[-1]

    assert last("counting:backwards") > -0.01 > -1 > last("counting"), "after the first the third, and not the second"


def test_lists_name_the_parent(adapted: Running, client: openai.OpenAI) -> None:
    listed = httpx.get(f"{adapted.url}/v1/models").json()["data"]
    parents = {"counting": None, "counting:backwards": "counting", "counting:twice": "counting"}
    assert {each["id"]: each["parent"] for each in listed} == parents
    assert httpx.get(f"{adapted.url}/v1/models/counting:twice").json()["parent"] == "counting"
    with ollama.Client(adapted.url) as local:
        tags = {each.model: each.details.parent_model for each in local.list().models if each.details is not None}
        details = local.show("counting:twice").details
    assert tags == {"counting:latest": "", "counting:backwards": "counting", "counting:twice": "counting"}
    assert details is not None
    assert (details.parent_model, details.format) == ("counting", "gguf")
    with pytest.raises(openai.NotFoundError, match="no model 'counting:other' here"):
        client.chat.completions.create(model="counting:other", messages=MESSAGES)


class Fake:
    """A model that notes its adapters."""

    def __init__(self, path: Path) -> None:
        self.memory = 100
        self.adapters: dict[str, Any] = {}
        self.closed = False

    def load_adapter(self, name: str, path: Path) -> None:
        assert not self.closed
        self.adapters[name] = type("Loaded", (), {"nbytes": 20})

    def unload_adapter(self, name: str) -> None:
        del self.adapters[name]

    def close(self) -> None:
        self.closed = True


def test_memory_counts_the_base_once_and_each_adapter(tmp_path: Path) -> None:
    """Adapters are closed by least use as models are; a base in use by its adapter is not."""
    for name, size in {"a": 100, "b": 100, "x": 20, "y": 20}.items():
        (tmp_path / f"{name}.gguf").write_bytes(b"x" * size)
    fake: Any = Fake

    async def run() -> None:
        models = Registry(
            [tmp_path / "a.gguf", tmp_path / "b.gguf"],
            load=fake,
            memory=225,
            adapters=[("a", "x", tmp_path / "x.gguf"), ("a", "y", tmp_path / "y.gguf")],
        )

        def is_open() -> list[str]:
            return [name for name, served in models.models.items() if served.model is not None]

        seen = []
        for name in ("a:x", "a:y", "b", "a:y", "b", "a:x"):
            async with models.use(name) as (told, model):
                assert told == name
                seen.append((sorted(model.adapters), is_open()))
        assert seen == [
            (["x"], ["a", "a:x"]),
            (["x", "y"], ["a", "a:x", "a:y"]),
            ([], ["a", "b", "a:y"]),  # 220 bytes
            (["y"], ["a", "b", "a:y"]),
            ([], ["a", "b", "a:y"]),
            (["x"], ["a", "b", "a:x"]),
        ]
        async with models.use("a:x"), models.use("b"):
            with pytest.raises(
                Problem, match=r"model 'a:y' \(20 bytes\) does not fit beside those in use \(220 bytes\)"
            ):
                async with models.use("a:y"):
                    pass
        models.close()
        assert is_open() == []

    asyncio.run(run())
