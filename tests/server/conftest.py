"""Servers for tests, with two tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_running import Running, Start

from dapji.model import load
from dapji.server.registry import Registry
from dapji.server.settings import Settings
from tiny import COUNTING, SCRIPT, write_tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """`answer`, which says ANSWER, and `endless`, which counts until it is stopped."""
    folder = tmp_path_factory.mktemp("models")
    return [
        write_tiny(folder / "answer.gguf", SCRIPT),
        write_tiny(folder / "endless.gguf", COUNTING, endless=True),
    ]


@pytest.fixture(scope="session")
def start_server(models: list[Path]) -> Iterator[Start]:
    """Starts servers that run until the tests end."""
    running: list[Running] = []

    def start(
        settings: Settings | None = None,
        *,
        memory: int | None = None,
        context: int = 512,
        key_name: Callable[[str], str | None] | None = None,
    ) -> Running:
        registry = Registry(models, load=lambda path: load(path, context=context), memory=memory)
        running.append(Running(registry, settings or Settings(), key_name))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Start) -> Running:
    """The plain one, that tests share."""
    return start_server()
