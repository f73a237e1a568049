"""A server on a port of its own, in a thread, with a tiny model; real clients talk to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import uvicorn

from dapji.server.app import create_app
from dapji.server.registry import Registry
from dapji.server.settings import Settings


class Running:
    """A server that answers at `url`."""

    def __init__(self, registry: Registry, settings: Settings, key_name: Callable[[str], str | None] | None) -> None:
        self.app = create_app(registry, settings, key_name=key_name)
        self.service = self.app.state.service
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


Start = Callable[..., Running]
