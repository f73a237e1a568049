"""The pool of KV blocks: reference counts, the prefix index, eviction."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dapji.engine.blocks import BlockPool, chain_key


def key(*history: int) -> bytes:
    parent = b""
    for n in history:
        parent = chain_key(parent, np.full(16, n, dtype=np.int32))
    return parent


def test_a_key_names_the_whole_history() -> None:
    assert key(1, 2) != key(2)
    assert key(1, 2) != key(2, 1)
    assert key(1, 2) == key(1, 2)


def test_the_block_unused_for_longest_is_evicted_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    old = [pool.allocate(), pool.allocate()]
    new = [pool.allocate(), pool.allocate()]
    for blocks, n in ((old, 1), (new, 2)):
        pool.publish(blocks[0], key(n))
        pool.publish(blocks[1], key(n, n))
    pool.release(old)
    pool.release(new)
    assert pool.find([key(1), key(1, 1)]) == old
    pool.acquire(old)  # used again: now `new` is older
    pool.release(old)
    assert [pool.allocate() for _ in range(3)] == [new[1], new[0], old[1]]
    assert pool.find([key(1), key(1, 1)]) == old[:1]
    assert pool.find([key(2)]) == []


def test_the_second_copy_of_a_content_stays_private() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, key(1))
    pool.publish(second, key(1))
    pool.release([second])
    assert pool.find([key(1)]) == [first]
    assert pool.allocate() == second


@given(st.lists(st.tuples(st.sampled_from(["start", "end"]), st.integers(0, 5)), max_size=60))
@settings(deadline=None)
def test_every_block_is_free_cached_or_referenced_and_keeps_its_content(actions: list[tuple[str, int]]) -> None:
    """Against a model that remembers which content was written into which block."""
    pool = BlockPool(5)
    content: dict[int, bytes] = {}
    held: list[list[int]] = []
    for action, n in actions:
        if action == "start":
            keys = [key(n), key(n, n)]
            found = pool.find(keys)
            for block, expected in zip(found, keys, strict=False):
                assert content[block] == expected
            if 2 - len(found) > pool.available - pool.unreferenced(found):
                continue
            pool.acquire(found)
            blocks = list(found)
            for i in range(len(found), 2):
                block = pool.allocate()
                assert block not in blocks
                assert not any(block in others for others in held)
                content[block] = keys[i]
                pool.publish(block, keys[i])
                blocks.append(block)
            held.append(blocks)
        elif held:
            pool.release(held.pop(n % len(held)))
        assert pool.available == 5 - len({block for blocks in held for block in blocks})
