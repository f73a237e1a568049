"""`Registry`: the models that are served, opened when somebody asks for them and closed when memory is needed.

Knows names, memory and use, no protocol.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dapji.errors import DapjiError, ModelNotFound
from dapji.files import default_context, open_files
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
    parent: Served | None = None
    """The model whose adapter it is; its name is the parent's, a colon and `adapter`."""
    adapter: str | None = None
    """The adapter's name on its own."""
    children: list[Served] = field(default_factory=list)
    """Of a model its adapters."""
    model: Model | None = None
    """None: not open. Of an adapter the parent's."""
    users: int = 0
    """Requests that are at it."""
    used: float = 0.0
    """When the last one ended, monotonic."""
    keep: float | None = None
    """Seconds that it stays open after its last use; None: until another needs its memory."""
    closing: asyncio.TimerHandle | None = None
    """Set while nothing but `keep` holds it open."""
    context: int | None = None
    """Tokens of its longest conversation, once somebody has asked."""
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)


def name_of(model: str | Path) -> str:
    """What clients call a model of the store, or a path."""
    return Path(model).stem if Path(model).exists() else str(model)


class Registry:
    """For one asyncio loop."""

    def __init__(
        self,
        names: Iterable[str | Path],
        *,
        load: Callable[[Path], Model],
        memory: int | None,
        kv_memory: int = 0,
        context: int | None = None,
        adapters: Iterable[tuple[str, str, Path]] = (),
        stays: bool = False,
    ) -> None:
        """names: of the store, or paths; the first is the default. memory: bytes that open models may take together;
        None: any number are open at once. kv_memory: of it, what each takes beside its weights. context: tokens, where
        not each model's own. adapters: name of the model, name and path of each. stays: what is open cannot be opened
        again, so `Served.keep` means nothing. Raises ModelNotFound."""
        self.models: dict[str, Served] = {}
        for name in names:
            path = store.resolve(name)
            named, size = name_of(name), _size(path)
            self.models[named] = Served(named, path, size, size + kv_memory, int(path.stat().st_mtime))
        for base, name, path in adapters:
            if base not in self.models:
                raise ModelNotFound(f"there is no model {base!r} here for the adapter {name}")
            parent, named, size = self.models[base], f"{base}:{name}", _size(path)
            served = Served(named, path, size, size, int(path.stat().st_mtime), parent=parent, adapter=name)
            parent.children.append(served)
            self.models[named] = served
        self.stays = stays
        self._coming: set[Served] = set()  # that are being opened
        self._load = load
        self._context = context
        self.memory = memory

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[tuple[str, Model]]:
        """The model, open for as long as the context lasts; None: the default. Raises Problem."""
        served = self.find(name)
        with self._used(served):
            # Who gives up waiting does not stop the loading, which another will want or `close` will find.
            yield served.name, await asyncio.shield(asyncio.ensure_future(self._opened(served)))

    @contextmanager
    def _used(self, served: Served) -> Iterator[None]:
        """A request is at it, and so at the model whose adapter it is."""
        both = [served] if served.parent is None else [served, served.parent]
        for each in both:
            each.users += 1
            self.rest(each)
        try:
            yield
        finally:
            for each in both:
                each.users -= 1
                each.used = time.monotonic()
                self.rest(each)

    async def context_of(self, served: Served) -> int | None:
        """Tokens of a prompt and its answer together. None where that shows when it is opened."""
        if served.model is not None:
            return served.model.engine.context
        if served.context is None and not self.stays:
            path = (served.parent or served).path
            with suppress(DapjiError):  # who asks it something is told
                served.context = self._context or default_context((await asyncio.to_thread(open_files, path)).config)
        return served.context

    def rest(self, served: Served) -> None:
        """Closes the model when its time is over (`Served.keep`), where nobody uses it."""
        if served.closing is not None:
            served.closing.cancel()
            served.closing = None
        if self.stays or served.users or served.model is None or served.keep is None:
            return
        if served.keep == 0:
            _close(served)
        else:
            served.closing = asyncio.get_running_loop().call_later(served.keep, _close, served)

    async def _opened(self, served: Served) -> Model:
        async with served.opening:
            if served.model is None and served.parent is not None:
                await self._open_adapter(served, served.parent)
            elif served.model is None:
                with self._making_room(served):
                    served.model = await asyncio.to_thread(self._load, served.path)
                served.memory = served.model.memory
            assert served.model is not None
            return served.model

    async def _open_adapter(self, served: Served, parent: Served) -> None:
        assert served.adapter is not None
        with self._used(parent):  # it stays open, whether or not somebody still waits
            model = await self._opened(parent)
            with self._making_room(served):
                await asyncio.to_thread(model.load_adapter, served.adapter, served.path)
            served.model, served.memory = model, model.adapters[served.adapter].nbytes

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

    @contextmanager
    def _making_room(self, wanted: Served) -> Iterator[None]:
        """Around the opening of `wanted`: its memory counts from now on, also for others that are opened meanwhile."""
        self._make_room(wanted)
        self._coming.add(wanted)
        try:
            yield
        finally:
            self._coming.remove(wanted)

    def _make_room(self, wanted: Served) -> None:
        """Closes the least recently used models until `wanted` fits. Raises Problem where too many are in use."""
        while self.memory is not None:
            opened = [served for served in self.models.values() if served.model is not None]
            taken = sum(served.memory for served in {*opened, *self._coming})
            if taken + wanted.memory <= self.memory or not taken:
                return
            idle = [served for served in opened if served.users == 0]
            if not idle:
                raise Problem(
                    "busy",
                    f"model {wanted.name!r} ({wanted.memory} bytes) does not fit beside those in use ({taken} bytes) "
                    f"into this server's {self.memory} bytes",
                    headers={"Retry-After": "10"},
                )
            # an adapter before its model
            _close(min(idle, key=lambda served: (served.used, served.parent is None)))

    def close(self) -> None:
        for served in self.models.values():
            if served.model is not None and served.parent is None:
                _close(served)


def _close(served: Served) -> None:
    """With its adapters."""
    assert served.model is not None
    if served.adapter is None:
        served.model.close()
    else:
        served.model.unload_adapter(served.adapter)
    for each in (served, *served.children):
        each.model = None
        if each.closing is not None:
            each.closing.cancel()
            each.closing = None


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    return sum(part.stat().st_size for part in path.rglob("*")) if path.is_dir() else path.stat().st_size
