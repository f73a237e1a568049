"""Speculation changes how many steps an answer takes and nothing else.

On the fake executor, whose logits hash the history that it finds in its cache: a block that holds anything but final
tokens, or a row that counts when it should not, changes the answer. On the native executor to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_models import VOCAB, HashExecutor, hash_logits, repeating_logits, tiny_executor, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from dapji.engine import Engine, Output, Request, Sampling, speculation
from dapji.engine.sampling import Sampler
from dapji.engine.speculation import Speculation, step_cost
from dapji.ops import native
from dapji.ops.batch import KV_BLOCK
from dapji.ops.reference import KvFormat

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 3
GREEDY = Sampling(temperature=0)
SAMPLINGS = [
    GREEDY,
    Sampling(seed=1),
    Sampling(temperature=0.7, top_p=0.9, seed=2),
    Sampling(temperature=1.5, top_k=5, min_p=0.05, typical_p=0.95, seed=3),
    Sampling(temperature=0, repetition_penalty=1.3),
    Sampling(temperature=0.8, frequency_penalty=0.2, presence_penalty=0.5, seed=4),
    Sampling(temperature=0.9, logit_bias={3: 3.0, 7: -100.0, 11: 2.0}, seed=5),
]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be proposed is: steps cost the same whatever is in them."""
    monkeypatch.setattr(speculation, "step_cost", lambda n_tokens: 1.0)
    monkeypatch.setattr(speculation, "_LEAST_GAIN", 1.0)


def request(prompt: list[int] = PROMPT, **fields: Any) -> Request:
    return Request(**{"prompt": prompt, "max_tokens": 80, "sampling": GREEDY, "logprobs": 2, **fields})


def plain(wanted: Request, logits: Any = repeating_logits) -> list[int]:
    """The answer token by token, without an engine, up to max_tokens."""
    sampler, tokens = Sampler(wanted.sampling), list(wanted.prompt)
    assert wanted.max_tokens is not None
    for _ in range(wanted.max_tokens):
        history = np.array(tokens, dtype=np.int32)
        tokens.append(sampler.draw(logits(history), tokens=history, n_prompt=len(wanted.prompt)))
    return tokens[len(wanted.prompt) :]


def run(wanted: Request, *, speculate: bool = True, end_tokens: tuple[int, ...] = ()) -> list[Output]:
    executor = HashExecutor(logits=repeating_logits)
    with Engine(executor, end_tokens=end_tokens, speculate=speculate) as engine:
        return list(engine.generate(wanted))


def said(outputs: list[Output]) -> list[tuple[Any, ...]]:
    """All but times and proposals."""
    finish = outputs[-1].finish
    assert finish is not None
    assert not any(output.finish for output in outputs[:-1])
    end = (finish.reason, finish.stop_token, finish.usage.prompt, finish.usage.cached, finish.usage.generated)
    return [*((output.token, output.logprobs) for output in outputs), end]


class Watch:
    """`Request.stop`: ends the answer at the n-th token, or fails there."""

    def __init__(self, n: int, *, fails: bool = False) -> None:
        self.seen: list[int] = []
        self._n = n
        self._fails = fails

    def __call__(self, token: int) -> bool:
        self.seen.append(token)
        if self._fails and len(self.seen) == self._n:
            raise ValueError("broken callback")
        return len(self.seen) == self._n


# Exactness


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_answer_is_that_of_plain_decoding(sampling: Sampling, eager: None) -> None:
    wanted = request(sampling=sampling)
    outputs = run(wanted)
    assert [output.token for output in outputs] == plain(wanted)
    assert said(outputs) == said(run(wanted, speculate=False))
    finish = outputs[-1].finish
    assert finish is not None
    assert finish.usage.proposed > finish.usage.accepted > 0, "some were right and some wrong"


def test_steps_and_counts_agree(eager: None) -> None:
    executor = HashExecutor(logits=repeating_logits)
    with Engine(executor) as engine:
        *_, last = engine.generate(request(max_tokens=200))
    assert last.finish is not None
    usage = last.finish.usage
    assert usage.proposed == sum(len(batch.tokens) - 1 for batch in executor.batches[1:])
    # A step yields a token of its own and the accepted ones.
    assert usage.generated == 200 == len(executor.batches) + usage.accepted
    assert len(executor.batches) < 100


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=9)])
def test_every_end_inside_a_proposal(sampling: Sampling, eager: None) -> None:
    answer = plain(request(sampling=sampling))
    for n in range(1, 50):
        assert (
            said(run(request(sampling=sampling, max_tokens=n)))[:-1]
            == said(run(request(sampling=sampling, max_tokens=n), speculate=False))[:-1]
        )
        watch = Watch(n)
        outputs = run(request(sampling=sampling, stop=watch))
        assert [output.token for output in outputs] == watch.seen == answer[:n]
        assert said(outputs)[-1] == ("stop", None, len(PROMPT), 0, n)


@pytest.mark.parametrize("min_tokens", [0, 30])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=9)])
def test_end_tokens_inside_a_proposal(sampling: Sampling, min_tokens: int, eager: None) -> None:
    for token in range(0, VOCAB, 3):
        wanted = request(sampling=sampling, min_tokens=min_tokens, stop_tokens=frozenset({(token + 1) % VOCAB}))
        assert said(run(wanted, end_tokens=(token,))) == said(run(wanted, end_tokens=(token,), speculate=False))


def test_a_callback_that_fails_inside_a_proposal_ends_the_request_after_the_tokens_before(eager: None) -> None:
    answer = plain(request())
    for n in range(1, 30):
        with Engine(HashExecutor(logits=repeating_logits)) as engine:
            stream = engine.generate(request(stop=Watch(n, fails=True)))
            assert [next(stream).token for _ in range(n - 1)] == answer[: n - 1]
            with pytest.raises(ValueError, match="broken callback"):
                next(stream)
            assert engine._scheduler.pool.available == engine._executor.n_blocks


@pytest.mark.parametrize("context", [47, 48, 49, 64])
def test_the_end_of_the_context(context: int, eager: None) -> None:
    """The fake fails where a position is beyond the context, and so would the pool, which has no block for it."""
    executor = HashExecutor(logits=repeating_logits, context=context, n_blocks=-(-context // KV_BLOCK))
    with Engine(executor) as engine:
        outputs = list(engine.generate(request(max_tokens=None)))
    assert [output.token for output in outputs] == plain(request(max_tokens=context - len(PROMPT)))
    assert said(outputs)[-1][0] == "length"


def test_the_next_turn_finds_final_tokens_in_the_cache(eager: None) -> None:
    for n in range(20, 60, 3):
        with Engine(HashExecutor(logits=repeating_logits)) as engine:
            first = request(sampling=Sampling(seed=n), max_tokens=n)
            answer = [output.token for output in engine.generate(first)]
            second = request(PROMPT + answer + [8] * 5)
            outputs = list(engine.generate(second))
            assert [output.token for output in outputs] == plain(second)
            # The last token of the first turn was never computed.
            assert said(outputs)[-1][3] == len(PROMPT) + n - 1


# Among others


def test_preempted_requests_lose_nothing(eager: None) -> None:
    executor = HashExecutor(n_blocks=12, logits=repeating_logits)
    wanted = [request([i, *PROMPT], max_tokens=100, sampling=Sampling(seed=i)) for i in range(4)]
    with Engine(executor, max_running=4) as engine:
        streams = [engine.generate(one) for one in wanted]
        for one, stream in zip(wanted, streams, strict=True):
            assert [output.token for output in stream] == plain(one)
        assert engine._scheduler.pool.available == 12
    # Four sequences of 124 computed tokens need 32 blocks: somebody began anew, at a prompt of more than its own.
    assert max(np.diff(batch.starts).max() for batch in executor.batches) > len(PROMPT) + 1


mixes = st.lists(
    st.tuples(
        st.integers(0, 2),  # which prefix the prompt begins with
        st.integers(1, 60),  # of how many tokens
        st.integers(1, 50),  # tokens to generate
        st.none() | st.integers(0, 20),  # closed after so many tokens
        st.none() | st.integers(0, 3),  # seed, or greedy
    ),
    min_size=1,
    max_size=7,
)


@given(mix=mixes, n_blocks=st.integers(7, 30), step_tokens=st.integers(4, 80), mixed=st.integers(1, 64))
@settings(deadline=None, max_examples=60)
def test_any_mix_ends_with_the_right_tokens_and_only_final_ones_are_published(
    mix: list[tuple[int, int, int, int | None, int | None]], n_blocks: int, step_tokens: int, mixed: int
) -> None:
    """Preempted, cancelled, on cached prefixes; with a scored text among them."""
    executor = HashExecutor(n_blocks=n_blocks, logits=repeating_logits)
    texts = [PROMPT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "step_cost", lambda n_tokens: 1.0)
        with Engine(executor, step_tokens=step_tokens, mixed_prompt_tokens=mixed, max_running=4) as engine:
            running = []
            for prefix, length, n, closed_after, seed in mix:
                prompt = [(i * (prefix + 1)) % 9 for i in range(length)]
                sampling = GREEDY if seed is None else Sampling(temperature=0.8, seed=seed)
                wanted = request(prompt, max_tokens=n, sampling=sampling, logprobs=None)
                running.append((wanted, closed_after, engine.generate(wanted)))
            engine.score(PROMPT)
            for wanted, closed_after, stream in running:
                expected = plain(wanted)
                if closed_after is not None and closed_after < len(expected):
                    assert [next(stream).token for _ in range(closed_after)] == expected[:closed_after]
                    stream.close()
                else:
                    assert [output.token for output in stream] == expected
                texts.append([*wanted.prompt, *expected])
            pool = engine._scheduler.pool
            assert not engine._scheduler.busy
            assert pool.available == n_blocks
            for block, history in tree(pool).items():
                assert any(text[: len(history)] == list(history) for text in texts)
                own = history[(len(history) - 1) // KV_BLOCK * KV_BLOCK :]
                assert executor._cache[0, block * KV_BLOCK :][: len(own)].tolist() == list(own)


# What pays


def test_text_that_does_not_repeat_itself_is_left_alone() -> None:
    executor = HashExecutor(n_blocks=200, context=3200, logits=hash_logits)
    with Engine(executor) as engine:
        *_, last = engine.generate(request(max_tokens=3000, logprobs=None))
    assert last.finish is not None
    assert last.finish.usage.proposed <= 30, "at most 1 % of the tokens"


def test_text_that_repeats_itself_takes_few_steps() -> None:
    *_, last = run(request(max_tokens=300))
    assert last.finish is not None
    usage = last.finish.usage
    assert usage.generated - usage.accepted < 150
    assert usage.accepted > 0.7 * usage.proposed


def test_the_most_tokens_for_the_cost_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every k tried, for many acceptance rates and costs."""
    for cost in (0.05, 0.15, 0.3, 0.6):
        monkeypatch.setattr(speculation, "_TOKEN_COST", cost)
        for beside in (0, 2):
            for rate in np.linspace(0, 1, 41).tolist():
                tokens = np.array([1, 2, 3, 1, 2] + [0] * 5, dtype=np.int32)
                one = Speculation(tokens, n_prompt=5)
                one.update(5)
                one._rate = rate
                speeds = [(beside + sum(rate**i for i in range(k + 1))) / step_cost(beside + 1 + k) for k in range(6)]
                best = int(np.argmax(speeds)) if max(speeds) > 1.1 * speeds[0] else 0
                assert one.propose(5, beside=beside) == best
                assert tokens[5 : 5 + best].tolist() == [3, 1, 2, 3, 1][:best]


# The lookup


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.data())
def test_proposals_follow_a_match_and_do_not_depend_on_how_tokens_arrived(
    history: list[int], data: st.DataObject
) -> None:
    n_prompt = data.draw(st.integers(1, len(history)))
    tokens = np.array(history + [-1] * 8, dtype=np.int32)
    one_by_one, in_pieces = Speculation(tokens, n_prompt=n_prompt), Speculation(tokens, n_prompt=n_prompt)
    for length in range(n_prompt, len(history) + 1):
        one_by_one.update(length)
        if length == len(history) or data.draw(st.booleans()):
            in_pieces.update(length)
    assert one_by_one._rate == in_pieces._rate
    found = [proposals(one, history) for one in (one_by_one, in_pieces)]
    assert found[0] == found[1]
    # The text goes on as it did at one of the places where its last two tokens stood before.
    ends = [i for i in range(2, len(history)) if history[i - 2 : i] == history[-2:]]
    assert found[0] in [(history + found[0])[end : end + 7] for end in ends] if ends else found[0] == []


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], [4, 9, 2, 3, 5, 1, 2]),  # three tokens, before two that came later
        ([1, 2, 5, 1, 2, 6, 1, 2], [6, 1, 2, 6, 1, 2, 6]),  # the latest
        ([7, 7, 7], [7] * 7),
        ([1, 2, 3, 2, 1], []),
        ([1], []),
    ],
)
def test_which_match(history: list[int], expected: list[int]) -> None:
    one = Speculation(np.array(history + [0] * 7, dtype=np.int32), n_prompt=len(history))
    one.update(len(history))
    assert proposals(one, history) == expected


def test_a_match_is_followed_while_it_lasts() -> None:
    """1 2 3 was met at the beginning; once 4 has followed, four tokens match there, though 2 3 4 came again later."""
    history = [1, 2, 3, 4, 5, 6, 0, 2, 3, 4, 9, 0, 1, 2, 3, 4]
    one = Speculation(np.array(history + [0] * 7, dtype=np.int32), n_prompt=15)
    one.update(16)
    assert proposals(one, history) == [5, 6, 0, 2, 3, 4, 9]


def proposals(one: Speculation, history: list[int]) -> list[int]:
    """As many as there may be."""
    one._rate = 1.0
    return one._tokens[len(history) : len(history) + one.propose(7, beside=0)].tolist()


# On the real decoder


@pytest.mark.skipif(not native.available(), reason=str(native.unavailable_reason()))
@pytest.mark.parametrize(
    ("kv", "quantized", "window", "n_prompt"),
    [
        ("f16", True, None, 40),
        ("f32", False, None, 40),
        ("q8", True, None, 40),
        ("f16", True, 20, 40),
        ("f16", True, None, 300),
    ],
)
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0, frequency_penalty=0.5), Sampling(temperature=0.9, seed=7)]
)
def test_on_the_native_executor_every_bit_is_the_same(
    kv: KvFormat, quantized: bool, window: int | None, n_prompt: int, sampling: Sampling, eager: None
) -> None:
    """300: beyond a segment of the native attention, which is split over threads for a single token only.

    The bias leaves three tokens to choose from, so that matches abound; which one comes is up to the model.
    """
    bias = {3: 100.0, 17: 100.0, 40: 100.0}
    first = request(
        np.random.default_rng(0).choice(list(bias), n_prompt).tolist(),
        max_tokens=120,
        sampling=replace(sampling, logit_bias=bias),
    )
    found = []
    for speculate in (False, True):
        with Engine(tiny_executor("native", quantized=quantized, kv=kv, window=window), speculate=speculate) as engine:
            answer = list(engine.generate(first))
            prompt = [*first.prompt, *(output.token for output in answer), 5]
            found.append((answer, list(engine.generate(request(prompt, max_tokens=40, sampling=first.sampling)))))
    for plain_answer, answer in zip(*found, strict=True):
        assert said(answer) == said(plain_answer)
    finish = found[1][0][-1].finish
    assert finish is not None
    assert finish.usage.proposed > finish.usage.accepted > 10, "some were right and some wrong"
