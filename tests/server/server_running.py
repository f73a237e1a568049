"""A server on a port of its own, in a thread, with a tiny model; real clients talk to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from dapji.server.app import create_app
from dapji.server.keys import Keys
from dapji.server.listener import Listener, bind
from dapji.server.registry import Registry
from dapji.server.settings import Settings


class Running:
    """A server that answers at `url`."""

    def __init__(self, registry: Registry, settings: Settings, keys: Keys | None, **listening: Any) -> None:
        """listening: options of `Listener`."""
        self.app = create_app(registry, settings, keys=keys)
        self.service = self.app.state.service
        socket = bind("127.0.0.1", 0)
        self._server = Listener(self.app, **listening)
        self._thread = threading.Thread(target=self._server.run, args=([socket],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port: int = socket.getsockname()[1]
        self.url = f"{'https' if 'tls' in listening else 'http'}://127.0.0.1:{self.port}"

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 10
        while self.service.active:
            assert time.monotonic() < end
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.stop()
        self._thread.join()


Start = Callable[..., Running]
