"""The scheduler's policy, step by step, without threads or models: sequences that grow by one token whenever their
last one is computed."""

from __future__ import annotations

import numpy as np

from dapji.engine.scheduler import MAX_ROWS, Scheduler, Sequence
from dapji.ops.batch import KV_BLOCK, Batch


def sequence(n_prompt: int, *, room: int = 0, wanted: int | None = None, first: int = 0) -> Sequence:
    tokens = np.arange(first, first + n_prompt + room, dtype=np.int32)
    return Sequence(tokens, length=n_prompt, wanted=n_prompt - 1 if wanted is None else wanted)


def scheduler(*, n_blocks: int = 100, budget: int = 64, mixed: int = 16, max_running: int = 8) -> Scheduler[Sequence]:
    return Scheduler(n_blocks=n_blocks, budget=budget, mixed_prompt_tokens=mixed, max_running=max_running)


def step(scheduler: Scheduler[Sequence]) -> dict[Sequence, int]:
    """One step; returns how many tokens each sequence had in it. Those that reach the end of their room are removed."""
    _, chunks, batch = scheduler.plan()
    taken = {chunk.sequence: chunk.end - chunk.sequence.computed for chunk in chunks}
    check(batch, taken)
    ended = []
    for chunk in chunks:
        if chunk.rows.stop > chunk.rows.start and chunk.end == chunk.sequence.length:
            chunk.sequence.wanted += 1
            if chunk.sequence.length == len(chunk.sequence.tokens):
                ended.append(chunk.sequence)
            else:
                chunk.sequence.length += 1
    scheduler.advance(chunks)
    for sequence in ended:
        scheduler.remove(sequence)
    return taken


def check(batch: Batch, taken: dict[Sequence, int]) -> None:
    assert np.diff(batch.starts).tolist() == list(taken.values())
    for b, owner in enumerate(taken):
        new = slice(batch.starts[b], batch.starts[b + 1])
        assert batch.positions[new].tolist() == list(range(owner.computed, owner.computed + taken[owner]))
        assert np.array_equal(batch.tokens[new], owner.tokens[batch.positions[new]])
        assert batch.slots(b).min() >= 0


def test_a_long_prompt_neither_stops_streams_nor_waits_for_them() -> None:
    plan = scheduler()
    streams = [sequence(5, room=100, first=i) for i in range(3)]
    for stream in streams:
        plan.add(stream)
    step(plan)
    long = sequence(1000, room=1, first=500)
    plan.add(long)
    steps = 0
    while long.computed < 1000:
        taken = step(plan)
        assert [taken[stream] for stream in streams] == [1, 1, 1]
        assert taken[long] == min(16, 1000 - 16 * steps)
        steps += 1
    assert steps == 63  # 16 prompt tokens a step beside the streams


def test_a_prompt_alone_gets_the_whole_budget() -> None:
    plan = scheduler()
    plan.add(long := sequence(150, room=1))
    assert [step(plan)[long] for _ in range(3)] == [64, 64, 22]


def test_prompts_share_evenly_and_short_ones_leave_the_rest() -> None:
    plan = scheduler(budget=60)
    long, short, other = sequence(500, first=0), sequence(6, first=1000), sequence(400, first=2000)
    for prompt in (long, short, other):
        plan.add(prompt)
    assert step(plan) == {long: 27, short: 6, other: 27}


def test_more_prompts_than_mixed_prompt_tokens_still_get_a_token_each() -> None:
    plan = scheduler(mixed=1)
    plan.add(stream := sequence(4, room=50))
    step(plan)
    prompts = [sequence(40, first=100 * i) for i in range(1, 8)]
    for prompt in prompts:
        plan.add(prompt)
    assert step(plan) == {stream: 1, **dict.fromkeys(prompts, 1)}


def test_at_most_max_running_in_order_of_arrival() -> None:
    plan = scheduler(max_running=2)
    sequences = [sequence(3, first=10 * i) for i in range(4)]
    for one in sequences:
        plan.add(one)
    assert list(step(plan)) == sequences[:2]
    assert list(step(plan)) == sequences[2:]
    assert not plan.busy


def test_none_overtakes_one_that_waits_for_blocks() -> None:
    plan = scheduler(n_blocks=4)
    running, large, small = sequence(20, room=10), sequence(50, first=100), sequence(3, first=200)
    for one in (running, large, small):
        plan.add(one)
    while running in list(plan):
        assert list(step(plan)) == [running]
    assert list(step(plan)) == [large]
    assert list(step(plan)) == [small]


def test_the_youngest_gives_its_blocks_up_and_finds_most_of_them_again() -> None:
    plan = scheduler(n_blocks=4)
    old, young = sequence(30, room=10), sequence(30, room=10, first=100)
    plan.add(old)
    plan.add(young)
    assert step(plan) == {old: 30, young: 30}
    for _ in range(2):
        assert step(plan) == {old: 1, young: 1}  # 32 tokens each: both have filled their two blocks
    assert step(plan) == {old: 1}
    assert young.blocks.tolist() == []
    while old in list(plan):
        step(plan)
    assert young.length == 33
    assert step(plan) == {young: 33 - 16}  # of its two blocks the first is still cached, the second went to the other
    while plan.busy:
        step(plan)
    assert plan.pool.available == 4


def test_a_prefix_is_found_again_to_the_token_before_the_wanted_rows() -> None:
    plan = scheduler()
    for n_prompt, expected in ((64, 0), (64, 63), (65, 64), (100, 65), (40, 39)):
        plan.add(one := sequence(n_prompt))
        while plan.busy:
            step(plan)
        assert one.cached == expected, n_prompt


def test_what_another_is_reading_is_not_read_beside_it() -> None:
    plan = scheduler()
    first, second = sequence(200, room=5), sequence(200, room=5)
    second.tokens[150:] += 1000
    other = sequence(20, first=500)
    for one in (first, second, other):
        plan.add(one)
    assert step(plan) == {first: 44, other: 20}
    assert [step(plan) for _ in range(2)] == [{first: 64}, {first: 64}]
    assert step(plan) == {first: 28, second: 36}
    assert second.cached == 150


def test_one_waits_no_longer_for_a_sequence_that_ended() -> None:
    plan = scheduler()
    first, second = sequence(200, room=5), sequence(200, room=5)
    plan.add(first)
    plan.add(second)
    assert [step(plan) for _ in range(2)] == [{first: 64}, {first: 64}]
    plan.remove(first)
    assert step(plan) == {second: 64}
    assert second.cached == 128


def test_rows_are_asked_for_in_portions() -> None:
    plan = scheduler(budget=1000)
    plan.add(scored := sequence(600, wanted=100))
    sizes = []
    while plan.busy:
        _, chunks, batch = plan.plan()
        sizes.append(len(batch.rows))
        assert batch.positions[batch.rows].tolist() == list(range(scored.wanted, scored.wanted + len(batch.rows)))
        scored.wanted += len(batch.rows)
        plan.advance(chunks)
        if scored.wanted == scored.length:
            plan.remove(scored)
    assert sizes == [MAX_ROWS, MAX_ROWS, MAX_ROWS, 500 - 3 * MAX_ROWS]
    assert plan.pool.available == 100


class Proposing(Sequence):
    """Proposes all that it may."""

    def __init__(self, n_prompt: int, *, room: int = 100, first: int = 0) -> None:
        tokens = np.arange(first, first + n_prompt + room, dtype=np.int32)
        super().__init__(tokens, length=n_prompt, wanted=n_prompt - 1)
        self.beside: list[int] = []

    def propose(self, limit: int, *, beside: int) -> int:
        self.beside.append(beside)
        return limit


def accept(plan: Scheduler[Sequence], n_accepted: int) -> list[int]:
    """One step, in which n_accepted proposals of each sequence turn out right; returns how many tokens each had."""
    _, chunks, batch = plan.plan()
    taken = {chunk.sequence: chunk.end - chunk.sequence.computed for chunk in chunks}
    check(batch, taken)
    for chunk in chunks:
        if n_rows := chunk.rows.stop - chunk.rows.start:
            chunk.sequence.length += min(n_accepted + 1, n_rows)
            chunk.sequence.wanted = chunk.sequence.length - 1
    plan.advance(chunks)
    return list(taken.values())


def test_streams_share_the_room_for_proposals() -> None:
    for sizes in ([8], [4, 4], [2, 3, 3], [2, 2, 2, 2], [1] * 5):
        plan = scheduler()
        streams = [Proposing(5, first=1000 * i) for i in range(len(sizes))]
        for stream in streams:
            plan.add(stream)
        accept(plan, 0)
        assert accept(plan, 0) == sizes
        others = [len(sizes) - 1 + sum(sizes[:i]) - i for i in range(len(sizes))]
        assert [stream.beside for stream in streams] == [[n] if sizes[0] > 1 else [] for n in others]
    plan = scheduler(budget=5, max_running=5)
    plan.add(Proposing(5))
    accept(plan, 0)
    assert accept(plan, 0) == [5]


def test_a_step_that_reads_a_prompt_has_no_proposals() -> None:
    plan = scheduler()
    plan.add(Proposing(5))
    accept(plan, 0)
    plan.add(Proposing(20, first=500))
    assert [accept(plan, 0) for _ in range(3)] == [[1, 16], [1, 4], [4, 4]]


def test_proposals_take_a_block_that_is_free_and_no_other() -> None:
    for n_blocks, sizes in ((2, [2, 1]), (3, [4, 1])):
        plan = scheduler(n_blocks=n_blocks)
        plan.add(Proposing(13, room=19))
        accept(plan, 0)
        plan.add(sequence(10, room=4, first=500))
        assert accept(plan, 0) == [1, 10]
        assert accept(plan, 0) == sizes  # 15 tokens in a block of 16, and the other's 11 in one of its own
        assert plan.pool.available == 0


def test_blocks_are_published_without_rejected_proposals() -> None:
    plan = scheduler()
    plan.add(stream := Proposing(13))
    accept(plan, 0)
    for n_accepted, computed in ((1, 15), (0, 16), (7, 24), (6, 31), (0, 32)):
        assert accept(plan, n_accepted) == [8]
        assert (stream.computed, plan.pool.find(stream.tokens).n_tokens) == (computed, computed)
    plan.remove(stream)
    assert plan.pool.available == 100


def in_background(made: Sequence) -> Sequence:
    made.background = True
    return made


def test_the_background_waits_behind_those_who_came_later() -> None:
    plan = scheduler(max_running=1)
    first, line, other = sequence(5, first=0), in_background(sequence(5, first=100)), sequence(5, first=200)
    for each in (first, line, other):
        plan.add(each)
    assert [list(step(plan)) for _ in range(3)] == [[first], [other], [line]]


def test_who_waits_for_blocks_takes_those_of_the_background() -> None:
    plan = scheduler(n_blocks=4, mixed=KV_BLOCK)
    lines = [in_background(sequence(KV_BLOCK, room=KV_BLOCK, first=1000 * i)) for i in range(2)]
    for line in lines:
        plan.add(line)
    while lines[0].remaining > 1 or lines[1].remaining > 1:
        step(plan)
    step(plan)
    assert not plan.pool.available
    plan.add(large := sequence(2 * KV_BLOCK, first=5000))
    done: list[Sequence] = []
    while plan.busy:
        taken = step(plan)
        done += [each for each in (large, *lines) if each not in plan and each not in done]
        if large in plan:
            assert large in taken, "it does not wait for the background"
    assert done == [large, *lines]
    assert all(line.length == 2 * KV_BLOCK for line in lines), "they are computed again, to their ends"


def test_who_grows_takes_blocks_of_the_background_however_old_that_is() -> None:
    plan = scheduler(n_blocks=3, mixed=KV_BLOCK)
    line = in_background(sequence(KV_BLOCK, room=KV_BLOCK, first=1000))
    plan.add(line)
    while line.remaining > 1:
        step(plan)
    plan.add(stream := sequence(KV_BLOCK, room=KV_BLOCK + 1, first=0))
    steps = 0
    while stream in plan:
        assert stream in step(plan)
        steps += 1
    assert steps < 2 * KV_BLOCK + 10
    while plan.busy:
        step(plan)
    assert line.length == 2 * KV_BLOCK
