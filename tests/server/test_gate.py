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


def test_several_answers_enter_together_or_not_at_all() -> None:
    async def run() -> None:
        gate = Gate(running=4, waiting=10)
        singles = [gate.enter("a") for _ in range(4)]
        for single in singles:
            await single.__aenter__()
        threes = [gate.enter(key, 3) for key in ("b", "c")]
        pair = [asyncio.ensure_future(three.__aenter__()) for three in threes]
        await settle()
        for single in singles:  # were their places given one by one, both would wait for ever
            await single.__aexit__(None, None, None)
            await settle()
        assert [task.done() for task in pair] == [True, False]
        assert (gate.running, gate.waiting) == (3, 1)
        with pytest.raises(Problem, match=r"5 answers at once are more than this server computes \(4\)"):
            await gate.enter("a", 5).__aenter__()
        pair[1].cancel()
        await settle()
        assert (gate.running, gate.waiting) == (3, 0)

    asyncio.run(run())


def test_a_large_one_that_gives_up_lets_in_those_behind_it() -> None:
    async def run() -> None:
        gate = Gate(running=2, waiting=10)
        first = gate.enter("a")
        await first.__aenter__()
        turns = [gate.enter("b", 2), gate.enter("c")]
        large, small = (asyncio.ensure_future(turn.__aenter__()) for turn in turns)
        await settle()
        assert not small.done()
        large.cancel()
        await settle()
        assert small.done()

    asyncio.run(run())


def test_the_background_takes_half_of_the_places_and_none_while_others_wait() -> None:
    async def run() -> None:
        gate, order = Gate(running=4, waiting=10), []
        release = asyncio.Event()

        async def ask(key: str, background: bool) -> None:
            async with gate.enter(key, background=background):
                order.append(key)
                await release.wait()

        tasks = []
        for key in ("lines", "lines", "lines", "lines", "others"):
            tasks.append(asyncio.ensure_future(ask(key, True)))
            await settle()
        assert order == ["lines", "lines"]
        assert (gate.running, gate.waiting) == (2, 0), "the rest is not among those who wait"
        for key in ("a", "b", "c", "d"):
            tasks.append(asyncio.ensure_future(ask(key, False)))
            await settle()
        assert order[2:] == ["a", "b"], "there was room for two"
        assert gate.waiting == 2
        release.set()
        await asyncio.gather(*tasks)
        assert order[4:6] == ["c", "d"]
        assert sorted(order[6:]) == ["lines", "lines", "others"]
        assert order[6:8] == ["lines", "others"], "keys take turns there too"
        assert gate.running == 0

    asyncio.run(run())


def test_what_never_fits_into_half_of_the_places_runs_in_the_background_when_nothing_else_does() -> None:
    async def run() -> None:
        gate = Gate(running=4, waiting=10)
        async with gate.enter("a"):
            turn = gate.enter("lines", 3, background=True)
            large = asyncio.ensure_future(turn.__aenter__())
            await settle()
            assert not large.done()
        await settle()
        assert large.done()
        assert gate.running == 3

    asyncio.run(run())
