"""Who runs, who waits, who comes next."""

from __future__ import annotations

import asyncio

import pytest

from dapji.server.gate import Gate
from dapji.server.problem import Problem


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_keys_take_turns_however_many_each_has_waiting() -> None:
    async def run() -> list[str]:
        gate, order, release = Gate(running=1, waiting=10), [], asyncio.Event()

        async def ask(key: str) -> None:
            async with gate.enter(key):
                order.append(key)
                await release.wait()

        tasks = []
        for key in ("a", "a", "a", "a", "b", "c", "b"):
            tasks.append(asyncio.ensure_future(ask(key)))
            await settle()
        assert (gate.running, gate.waiting) == (1, 6)
        release.set()
        await asyncio.gather(*tasks)
        assert (gate.running, gate.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a", "a", "b", "c", "a", "b", "a"]


def test_beyond_those_who_may_wait_one_is_sent_away() -> None:
    async def run() -> None:
        gate = Gate(running=2, waiting=1)
        async with gate.enter("a", 2):
            waiting = asyncio.ensure_future(gate.enter("a").__aenter__())
            await settle()
            with pytest.raises(Problem, match="2 requests run and 1 wait") as caught:
                await gate.enter("b").__aenter__()
            assert caught.value.status == 429
            assert int(caught.value.headers["Retry-After"]) > 0
            waiting.cancel()
            await settle()
            assert gate.waiting == 0
        assert gate.running == 0

    asyncio.run(run())


def test_who_gives_up_at_the_moment_of_its_turn_passes_it_on() -> None:
    async def run() -> None:
        gate = Gate(running=1, waiting=5)
        first = gate.enter("a")
        await first.__aenter__()
        others = [gate.enter("b"), gate.enter("c")]
        second, third = (asyncio.ensure_future(other.__aenter__()) for other in others)
        await settle()
        await first.__aexit__(None, None, None)  # lets the second in, which has not run yet
        second.cancel()
        await settle()
        assert third.done()
        assert gate.running == 1

    asyncio.run(run())
