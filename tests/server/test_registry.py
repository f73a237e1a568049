"""Models are opened when asked for, and closed when others need the memory."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dapji.errors import ModelNotFound
from dapji.model import load
from dapji.server.problem import Problem
from dapji.server.registry import Registry
from tiny import SCRIPT, write_tiny


class Fake:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.memory = path.stat().st_size
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    for name in "abc":
        (tmp_path / f"{name}.gguf").write_bytes(b"x" * 100)
    return sorted(tmp_path.iterdir())


def registry(paths: list[Path], memory: int | None) -> Registry:
    load: Any = Fake
    return Registry(paths, load=load, memory=memory)


def is_open(models: Registry) -> str:
    return "".join(name for name, served in models.models.items() if served.model is not None)


def test_the_least_recently_used_is_closed(paths: list[Path]) -> None:
    async def run() -> None:
        models = registry(paths, memory=250)
        seen = []
        for name in ("a", "b", "a", "c", "b"):
            async with models.use(name) as (_, model):
                assert not model.closed  # type: ignore[attr-defined]
            seen.append(is_open(models))
        assert seen == ["a", "ab", "ab", "ac", "bc"]
        async with models.use("a"), models.use("b"):
            with pytest.raises(
                Problem, match=r"model 'c' \(100 bytes\) does not fit beside those in use \(200 bytes\)"
            ):
                async with models.use("c"):
                    pass
        models.close()
        assert is_open(models) == ""

    asyncio.run(run())


def test_many_who_ask_at_once_open_it_once(paths: list[Path]) -> None:
    async def run() -> None:
        models = registry(paths, memory=None)

        async def use() -> Any:
            async with models.use(None) as (name, model):
                assert name == "a"
                return model

        assert len(set(await asyncio.gather(*(use() for _ in range(5))))) == 1

    asyncio.run(run())


def test_models_that_are_opened_at_once_fit_together(paths: list[Path]) -> None:
    go_on = threading.Event()

    def load(path: Path) -> Any:
        go_on.wait(10)
        return Fake(path)

    async def run() -> None:
        models = Registry(paths, load=load, memory=250)

        async def use(name: str) -> str:
            async with models.use(name):
                return is_open(models)

        first = [asyncio.ensure_future(use(name)) for name in "ab"]
        await asyncio.sleep(0.01)
        with pytest.raises(Problem, match=r"model 'c' \(100 bytes\) does not fit beside those in use \(200 bytes\)"):
            await use("c")
        go_on.set()
        await asyncio.gather(*first)
        assert is_open(models) == "ab"
        assert len(await use("c")) == 2

    asyncio.run(run())


def test_who_gives_up_while_a_model_is_opened_leaves_it_to_others(paths: list[Path]) -> None:
    loaded: list[Fake] = []
    go_on = threading.Event()

    def load(path: Path) -> Any:
        go_on.wait(10)
        loaded.append(Fake(path))
        return loaded[-1]

    async def run() -> None:
        models = Registry(paths, load=load, memory=None)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), models.use("a"):
                pass
        go_on.set()
        async with models.use("a") as (_, model):
            assert [model] == loaded
        models.close()
        assert loaded[0].closed

    asyncio.run(run())


def test_unknown_names(paths: list[Path]) -> None:
    with pytest.raises(ModelNotFound):
        registry([Path("nothing-like-this")], memory=None)
    with pytest.raises(Problem, match=r"no model '\.\./a' here"):
        registry(paths, memory=None).find("../a")


def test_the_context_is_known_before_a_model_is_opened(tmp_path: Path) -> None:
    long = write_tiny(tmp_path / "long.gguf", SCRIPT, max_context=65536)
    short = write_tiny(tmp_path / "short.gguf", SCRIPT, max_context=100)
    (tmp_path / "broken.gguf").write_bytes(b"x")
    paths = [long, short, tmp_path / "broken.gguf"]

    async def contexts(given: int | None) -> list[int | None]:
        models = Registry(paths, load=partial(load, context=given), memory=None, context=given)
        told = [await models.context_of(served) for served in models.models.values()]
        async with models.use("short") as (_, model):
            assert model.engine.context == told[1] == await models.context_of(models.find("short"))
        models.close()
        return told

    assert asyncio.run(contexts(None)) == [8192, 100, None]
    assert asyncio.run(contexts(64)) == [64, 64, 64]
