"""Servers for tests, with two tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server_running import Running, Start

from dapji.model import load
from dapji.server.keys import Keys
from dapji.server.registry import Registry
from dapji.server.settings import Settings
from tiny import CHATML, COUNTING, SCRIPT, THOUGHTFUL, write_tiny

CALLING = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML + "{# <tool_call> #}"
CALL = ["잠시만요.", "<tool_call>", '{"name": "weather", ', '"arguments": {"city": "서울"}}', "</tool_call>"]
SWITCHED = CHATML.replace(
    "assistant\n{%", "assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{%"
)
"""Of a model whose reasoning may be turned off."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """`answer`, which says ANSWER, and `endless`, which counts until it is stopped."""
    folder = tmp_path_factory.mktemp("models")
    return [
        write_tiny(folder / "answer.gguf", SCRIPT),
        write_tiny(folder / "endless.gguf", COUNTING, endless=True),
    ]


@pytest.fixture(scope="session")
def start_server(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts servers that run until the tests end."""
    running: list[Running] = []

    def start(
        settings: Settings | None = None,
        *,
        paths: list[Path] | None = None,
        memory: int | None = None,
        context: int = 512,
        keys: Keys | None = None,
    ) -> Running:
        folder = tmp_path_factory.mktemp("server")
        registry = Registry(paths or models, load=lambda path: load(path, context=context), memory=memory)
        running.append(Running(registry, settings or Settings(folder=folder), keys))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Start) -> Running:
    """The plain one, that tests share."""
    return start_server()


@pytest.fixture(scope="session")
def agents(start_server: Start, tmp_path_factory: pytest.TempPathFactory) -> Running:
    """A server with `caller`, which says "잠시만요." and calls a tool, and `thinker`, which reasons if it is let."""
    folder = tmp_path_factory.mktemp("agents")
    paths = [
        write_tiny(folder / "caller.gguf", CALL, template=CALLING, control=["<tool_call>", "</tool_call>"]),
        write_tiny(folder / "thinker.gguf", THOUGHTFUL, template=SWITCHED + "{# </think> #}"),
    ]
    return start_server(paths=paths, context=2048)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Of a store of one's own, none yet."""
    return Keys(tmp_path / "server" / "keys.db")
