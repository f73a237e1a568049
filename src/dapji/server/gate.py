"""`Gate`: how many requests run at once, how many may wait, and who comes next. Knows nothing of what they are."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dapji.server.problem import Problem

RETRY_AFTER = 5
"""Seconds after which a client that was sent away may ask again."""


class Gate:
    """For one asyncio loop. Those who wait are let in by turns of their keys, so that no key's many keep out another's
    few."""

    def __init__(self, *, running: int, waiting: int) -> None:
        """running: most requests at once. waiting: most that wait beside them, of all keys together."""
        self._room = running
        self._most_waiting = waiting
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # keys in the order of their turns
        self.running = 0

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def enter(self, key: str, n: int = 1) -> AsyncIterator[None]:
        """Waits for a turn of n requests that run together. Raises Problem where too many wait already."""
        entered = 0
        try:
            while entered < n:
                await self._wait(key)
                entered += 1
            yield
        finally:
            for _ in range(entered):
                self._leave()

    async def _wait(self, key: str) -> None:
        if self.running < self._room and not self._queues:
            self.running += 1
            return
        if self.waiting >= self._most_waiting:
            raise Problem(
                "busy",
                f"{self.running} requests run and {self.waiting} wait, which is all that this server takes",
                headers={"Retry-After": str(RETRY_AFTER)},
            )
        turn = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # it was let in, but is gone
            else:
                self._remove(key, turn)
            raise

    def _remove(self, key: str, turn: asyncio.Future[None]) -> None:
        self._queues[key].remove(turn)
        if not self._queues[key]:
            del self._queues[key]

    def _leave(self) -> None:
        self.running -= 1
        if self._queues:
            key = next(iter(self._queues))
            queue = self._queues.pop(key)
            turn = queue.popleft()
            if queue:
                self._queues[key] = queue  # its next turn comes after those of all others
            self.running += 1
            turn.set_result(None)
