"""`Registry`: the models that are served, opened when somebody asks for them and closed when memory is needed.

Knows names, memory and use, no protocol.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dapji.errors import ModelNotFound
from dapji.model import Model
from dapji.server.problem import Problem
from dapji.weights import store


@dataclass(eq=False)
class Served:
    """One name that clients may ask for."""

    name: str
    path: Path
    size: int
    """Bytes of its files."""
    memory: int
    """Bytes that it takes while it is open: until it was, an estimate."""
    created: int
    """Seconds since 1970, of its file."""
    model: Model | None = None
    """None: not open."""
    users: int = 0
    """Requests that are at it."""
    used: float = 0.0
    """When the last one ended, monotonic."""
    keep: float | None = None
    """Seconds that it stays open after its last use; None: until another needs its memory."""
    closing: asyncio.TimerHandle | None = None
    """Set while nothing but `keep` holds it open."""
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)


class Registry:
    """For one asyncio loop."""

    def __init__(
        self, names: Iterable[str | Path], *, load: Callable[[Path], Model], memory: int | None, kv_memory: int = 0
    ) -> None:
        """names: of the store, or paths; the first is the default. memory: bytes that open models may take together;
        None: any number are open at once. kv_memory: of it, what each takes beside its weights. Raises ModelNotFound.
        """
        self.models: dict[str, Served] = {}
        for name in names:
            path = store.resolve(name)
            named = path.stem if Path(name).exists() else str(name)
            size = sum(part.stat().st_size for part in path.rglob("*")) if path.is_dir() else path.stat().st_size
            self.models[named] = Served(named, path, size, size + kv_memory, int(path.stat().st_mtime))
        self._load = load
        self._memory = memory

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[tuple[str, Model]]:
        """The model, open for as long as the context lasts; None: the default. Raises Problem."""
        served = self.find(name)
        served.users += 1
        self.rest(served)
        try:
            # Who gives up waiting does not stop the loading, which another will want or `close` will find.
            yield served.name, await asyncio.shield(asyncio.ensure_future(self._opened(served)))
        finally:
            served.users -= 1
            served.used = time.monotonic()
            self.rest(served)

    def rest(self, served: Served) -> None:
        """Closes the model when its time is over (`Served.keep`), where nobody uses it."""
        if served.closing is not None:
            served.closing.cancel()
            served.closing = None
        if served.users or served.model is None or served.keep is None:
            return
        if served.keep == 0:
            _close(served)
        else:
            served.closing = asyncio.get_running_loop().call_later(served.keep, _close, served)

    async def _opened(self, served: Served) -> Model:
        async with served.opening:
            if served.model is None:
                self._make_room(served)
                served.model = await asyncio.to_thread(self._load, served.path)
                served.memory = served.model.memory
            return served.model

    def find(self, name: str | None) -> Served:
        """Raises Problem where there is none."""
        if name is None or name == "":
            return next(iter(self.models.values()))
        if name not in self.models:
            name = name.removesuffix(":latest")  # as clients write who want every name to have a tag
        if name not in self.models:
            error = ModelNotFound(f"there is no model {name!r} here", hint=f"there are {', '.join(self.models)}")
            raise Problem.of(error)
        return self.models[name]

    def _make_room(self, wanted: Served) -> None:
        """Closes the least recently used models until `wanted` fits. Raises Problem where too many are in use."""
        while self._memory is not None:
            opened = [served for served in self.models.values() if served.model is not None]
            taken = sum(served.memory for served in opened)
            if taken + wanted.memory <= self._memory or not opened:
                return
            idle = [served for served in opened if served.users == 0]
            if not idle:
                raise Problem(
                    "busy",
                    f"model {wanted.name!r} ({wanted.memory} bytes) does not fit beside those in use ({taken} bytes) "
                    f"into this server's {self._memory} bytes",
                    headers={"Retry-After": "10"},
                )
            _close(min(idle, key=lambda served: served.used))

    def close(self) -> None:
        for served in self.models.values():
            if served.model is not None:
                _close(served)


def _close(served: Served) -> None:
    assert served.model is not None
    served.model.close()
    served.model = None
    if served.closing is not None:
        served.closing.cancel()
        served.closing = None
