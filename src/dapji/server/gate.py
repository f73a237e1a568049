"""`Gate`: how many requests run at once, how many may wait, and who comes next. Knows nothing of what they are."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from dapji.server.problem import Problem

RETRY_AFTER = 5
"""Seconds after which a client that was sent away may ask again."""


class Gate:
    """For one asyncio loop. Those who wait are let in by turns of their keys, so that no key's many keep out another's
    few.

    What is in the background, where nobody waits for the answer, takes at most half of the places, and none while
    anybody else waits: so whoever asks finds a place however much lies there."""

    def __init__(self, *, running: int, waiting: int) -> None:
        """running: most requests at once. waiting: most that wait beside them, of all keys together."""
        self._room = running
        self._most_waiting = waiting
        self._queues: _Queues = {}
        self._background: _Queues = {}
        self.running = 0

    @property
    def waiting(self) -> int:
        """Without those in the background."""
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def enter(self, key: str, n: int = 1, *, background: bool = False) -> AsyncIterator[None]:
        """Waits for a turn of n requests that run together: let in as a whole, so that none holds some places and waits
        for the others. Raises Problem where too many wait already, or n never fit."""
        if n > self._room:
            raise Problem("invalid_request", f"{n} answers at once are more than this server computes ({self._room})")
        await self._wait(key, n, background)
        try:
            yield
        finally:
            self._leave(n)

    async def _wait(self, key: str, n: int, background: bool) -> None:
        queues = self._background if background else self._queues
        if not queues and not self._queues and self._fits(n, background):
            self.running += n
            return
        if not background and self.waiting >= self._most_waiting:
            raise Problem(
                "busy",
                f"{self.running} requests run and {self.waiting} wait, which is all that this server takes",
                headers={"Retry-After": str(RETRY_AFTER)},
            )
        turn = _Turn(asyncio.get_running_loop().create_future(), n)
        queues.setdefault(key, deque()).append(turn)
        try:
            await turn.come
        except asyncio.CancelledError:
            if turn.come.done() and not turn.come.cancelled():
                self._leave(n)  # it was let in, but is gone
            else:
                queues[key].remove(turn)
                if not queues[key]:
                    del queues[key]
                self._let_in()
            raise

    def _fits(self, n: int, background: bool) -> bool:
        room = self._room // 2 if background else self._room
        return self.running + n <= room or self.running == 0

    def _leave(self, n: int) -> None:
        self.running -= n
        self._let_in()

    def _let_in(self) -> None:
        """Those whose turn it is, as long as the next one fits."""
        for queues in (self._queues, self._background):
            while queues:
                key, queue = next(iter(queues.items()))
                if not self._fits(queue[0].n, queues is self._background):
                    return
                turn = queue.popleft()
                del queues[key]
                if queue:
                    queues[key] = queue  # its next turn comes after those of all others
                self.running += turn.n
                turn.come.set_result(None)


class _Turn(NamedTuple):
    come: asyncio.Future[None]
    n: int


_Queues = dict[str, deque[_Turn]]
"""Keys in the order of their turns."""
