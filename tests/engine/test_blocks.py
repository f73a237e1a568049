"""The pool of KV blocks: the radix tree of prefixes, copies, reference counts, eviction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from engine_models import tree
from hypothesis import given, settings
from hypothesis import strategies as st

from dapji.engine.blocks import BlockPool
from dapji.engine.scheduler import Sequence
from dapji.ops.batch import KV_BLOCK


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def write(pool: BlockPool, *tokens: int) -> list[int]:
    """Blocks with these tokens, referenced."""
    blocks: list[int] = []
    for at in range(0, len(tokens), KV_BLOCK):
        parent = blocks[-1] if blocks else pool.root
        blocks.append(pool.publish(pool.allocate(), ids(*tokens[at : at + KV_BLOCK]), parent=parent))
    return blocks


def test_a_prefix_is_found_to_the_token() -> None:
    pool = BlockPool(8)
    text = tuple(range(40))
    first, second, third = write(pool, *text)
    for n in range(41):
        found = pool.find(ids(*text[:n], *[99] * 30))
        assert found.n_tokens == n
        assert found.blocks == [first, second][: n // KV_BLOCK]
        assert found.partial == ([first, second, third][n // KV_BLOCK] if n % KV_BLOCK else None)
    assert pool.find(ids(*text[:7])).n_tokens == 7
    assert pool.find(ids(*text[16:])).n_tokens == 0, "the same tokens after others"


def test_of_several_continuations_the_longest_is_taken() -> None:
    pool = BlockPool(8)
    blocks = [write(pool, 1, 2, 3, *own)[0] for own in ((4,), (5, 6), (5, 6, 7, 8), (5, 9))]
    for own, expected, n in (((4, 4), 0, 4), ((5, 6, 7, 9), 2, 6), ((5, 9, 9), 3, 5)):
        found = pool.find(ids(1, 2, 3, *own))
        assert (found.partial, found.n_partial) == (blocks[expected], n)


def test_the_block_unused_for_longest_is_evicted_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    old, new = write(pool, *[1] * 32), write(pool, *[2] * 32)
    pool.release(old)
    pool.release(new)
    assert pool.find(ids(*[1] * 32)).blocks == old
    pool.acquire(old)  # used again: now `new` is older
    pool.release(old)
    assert [pool.allocate() for _ in range(3)] == [new[1], new[0], old[1]]
    assert pool.find(ids(*[1] * 32)).blocks == old[:1]
    assert pool.find(ids(*[2] * 32)).n_tokens == 0


def test_what_was_copied_counts_as_used() -> None:
    pool = BlockPool(3)
    (old,), (new,) = write(pool, 1, 1), write(pool, 2, 2)
    pool.release([old])
    pool.release([new])
    target = pool.copy(old)
    assert pool.copies == [(old, target)]
    assert pool.allocate() == new


def test_where_no_other_block_is_left_the_source_of_a_copy_becomes_its_target() -> None:
    pool = BlockPool(1)
    (block,) = write(pool, 1, 2)
    pool.release([block])
    assert pool.copy(block) == block
    assert pool.copies == []
    assert pool.find(ids(1, 2)).n_tokens == 0


def test_a_full_block_is_kept_once() -> None:
    pool = BlockPool(4)
    (first,) = write(pool, *[1] * 16)
    second = pool.allocate()
    for n in range(1, 16):
        assert pool.publish(second, ids(*[1] * n), parent=pool.root) == second
    assert pool.publish(second, ids(*[1] * 16), parent=pool.root) == first
    assert pool.available == 3
    pool.release([first])
    assert pool.available == 3
    pool.release([first])
    assert pool.available == 4


N_BLOCKS = 6
texts = st.lists(st.sampled_from([5, 9, 12, 16, 20]), min_size=1, max_size=4)  # lengths of runs of 0, 1, 0, 1
actions = st.lists(
    st.tuples(st.just("start"), texts) | st.tuples(st.sampled_from(["grow", "end"]), st.integers(0, 20)), max_size=60
)


def tokens_of(runs: list[int]) -> Iterator[int]:
    for i, n in enumerate(runs):
        yield from [i % 2] * n


@given(actions)
@settings(deadline=None, max_examples=300)
def test_after_any_operations_the_pool_is_sound_and_finds_only_what_was_computed(
    actions: list[tuple[str, object]],
) -> None:
    """Sequences on the pool, against a cache whose slots remember the whole history that they were computed for."""
    pool = BlockPool(N_BLOCKS)
    cache: list[tuple[int, ...] | None] = [None] * N_BLOCKS * KV_BLOCK
    held: list[Sequence] = []

    def compute(sequence: Sequence, end: int) -> None:
        for source, target in pool.copies:
            for slot in range(KV_BLOCK):
                cache[target * KV_BLOCK + slot] = cache[source * KV_BLOCK + slot]
        pool.copies.clear()
        for at in range(sequence.computed, end):
            slot = sequence.blocks[at // KV_BLOCK] * KV_BLOCK + at % KV_BLOCK
            cache[slot] = tuple(sequence.tokens[: at + 1].tolist())
        sequence.wanted = max(sequence.wanted, end)
        sequence.advance(end, pool)

    for action, what in actions:
        if action == "start":
            tokens = ids(*tokens_of(what))
            sequence = Sequence(tokens, length=len(tokens), wanted=len(tokens) - 1)
            if sequence.admit(pool):
                held.append(sequence)
            else:
                assert pool.available < -(-len(tokens) // KV_BLOCK)
        elif held and action == "grow":
            sequence = held[what % len(held)]
            compute(sequence, min(sequence.computed + what, sequence.length))
        elif held:
            held.pop(what % len(held)).release(pool)
        for sequence in held:
            if not pool.copies:
                for at in range(sequence.computed):
                    slot = sequence.blocks[at // KV_BLOCK] * KV_BLOCK + at % KV_BLOCK
                    assert cache[slot] == tuple(sequence.tokens[: at + 1].tolist())
        check_sound(pool, held)
        for block, history in tree(pool).items():
            first = (len(history) - 1) // KV_BLOCK * KV_BLOCK
            for at in range(first, len(history)):
                assert cache[block * KV_BLOCK + at % KV_BLOCK] == history[: at + 1]


def check_sound(pool: BlockPool, held: list[Sequence]) -> None:
    counts = [0] * N_BLOCKS
    for sequence in held:
        for block in sequence.blocks:
            counts[block] += 1
    assert pool._references == counts
    in_tree = tree(pool)
    free, cached = set(pool._free), set(pool._cached)
    referenced = {block for block in range(N_BLOCKS) if counts[block]}
    assert len(free) == len(pool._free)
    assert sorted([*free, *cached, *referenced]) == list(range(N_BLOCKS)), "each block in one state"
    assert not free & in_tree.keys()
    assert cached <= in_tree.keys()
    assert pool.available == N_BLOCKS - len(referenced)
    age = {block: i for i, block in enumerate(pool._cached)}
    for block in in_tree:
        parent = pool._parent[block]
        if parent != pool.root:
            assert len(in_tree[parent]) % KV_BLOCK == 0
            assert counts[parent] >= counts[block]
            if parent in cached:
                assert age[parent] > age[block], "evicted before its descendant"
