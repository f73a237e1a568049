"""The engine on a fake executor, whose logits hash the history in its cache: scheduling, threads, ends, errors."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import VOCAB, Gate, HashExecutor, greedy, hash_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from dapji.engine import Engine, Output, Request, Sampling, Stream
from dapji.errors import ContextError, DapjiError, FormatError, RequestError, UsageError

GREEDY = Sampling(temperature=0)


def request(prompt: list[int], max_tokens: int | None = 8, **fields: Any) -> Request:
    return Request(**{"prompt": prompt, "max_tokens": max_tokens, "sampling": GREEDY, **fields})


def tokens(stream: Stream) -> list[int]:
    return [output.token for output in stream]


def assert_all_blocks_free(engine: Engine) -> None:
    assert not engine._scheduler.busy
    assert engine._scheduler.pool.available == engine._executor.n_blocks


@pytest.fixture
def gated() -> Iterator[tuple[Engine, Gate]]:
    """An engine whose steps wait for the test."""
    gate = Gate()
    engine = Engine(HashExecutor(on_step=gate))
    yield engine, gate
    gate.open(10_000)
    engine.close()


# Results


def test_greedy_tokens_usage_and_finish() -> None:
    prompt = list(range(20))
    with Engine(HashExecutor()) as engine:
        outputs = list(engine.generate(request(prompt, 30)))
        assert [output.token for output in outputs] == greedy(prompt, 30)
        assert all(output.finish is None and output.logprobs is None for output in outputs[:-1])
        finish = outputs[-1].finish
        assert finish is not None
        assert (finish.reason, finish.stop_token) == ("length", None)
        assert (finish.usage.prompt, finish.usage.cached, finish.usage.generated) == (20, 0, 30)
        assert finish.timings.first_token > 0
        assert finish.tokens_per_second == pytest.approx(29 / finish.timings.decode)
        (single,) = engine.generate(request(prompt, 1))
        assert single.finish is not None
        assert single.finish.tokens_per_second is None
        assert_all_blocks_free(engine)


def test_without_max_tokens_the_answer_fills_the_context() -> None:
    with Engine(HashExecutor(context=40)) as engine:
        outputs = list(engine.generate(request([1, 2, 3], None)))
        assert len(outputs) == 37
        assert outputs[-1].finish is not None
        assert outputs[-1].finish.reason == "length"


def test_the_next_turn_finds_prompt_and_answer_in_the_cache() -> None:
    with Engine(HashExecutor()) as engine:
        first = [5] * 21
        answer = tokens(engine.generate(request(first, 30)))
        second = first + answer + [6] * 10
        (*_, last) = outputs = list(engine.generate(request(second)))
        assert last.finish is not None
        assert last.finish.usage.cached == 50  # of the 51 tokens of the first turn the last was never computed
        assert [output.token for output in outputs] == greedy(second, 8)
        changed = first + answer[:12] + [7] * 20  # agrees for 33 tokens
        (*_, last) = outputs = list(engine.generate(request(changed)))
        assert last.finish is not None
        assert last.finish.usage.cached == 33
        assert [output.token for output in outputs] == greedy(changed, 8)


def test_chunked_prompts_give_the_same_tokens() -> None:
    prompt = list(np.random.default_rng(0).integers(0, VOCAB, 200))
    sampling = Sampling(temperature=1.2, top_p=0.9, seed=3)
    answers = set()
    for step_tokens in (1, 7, 64, 512):
        with Engine(HashExecutor(), step_tokens=step_tokens, max_running=1) as engine:
            answers.add(tuple(tokens(engine.generate(request(prompt, 20, sampling=sampling)))))
    assert len(answers) == 1


def test_logprobs_are_those_of_the_model() -> None:
    prompt = [1, 2, 3]
    sampling = Sampling(temperature=0.5, top_k=3, repetition_penalty=1.5, seed=1)
    with Engine(HashExecutor()) as engine:
        for output in engine.generate(request(prompt, 10, sampling=sampling, logprobs=4)):
            exact = hash_logits(np.array(prompt)).astype(np.float64)
            exact -= np.log(np.exp(exact).sum())
            assert output.logprobs is not None
            assert output.logprobs.chosen == pytest.approx(exact[output.token], abs=1e-6)
            assert [token for token, _ in output.logprobs.top] == np.argsort(-exact)[:4].tolist()
            prompt.append(output.token)


def test_score_equals_a_float64_softmax_and_reads_its_prefix_from_the_cache() -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, 300)
    executor = HashExecutor()
    with Engine(executor, step_tokens=100, max_running=4) as engine:
        for start in (1, 150, 299):
            before = len(executor.batches)
            scores = engine.score(ids, start=start).chosen
            for i in range(start, 300, 13):
                exact = hash_logits(ids[:i]).astype(np.float64)
                assert scores[i - start] == pytest.approx(exact[ids[i]] - np.log(np.exp(exact).sum()), abs=1e-6)
            computed = sum(len(batch.tokens) for batch in executor.batches[before:])
            assert computed == 299 - (start - 1) if start > 1 else computed == 299
        assert_all_blocks_free(engine)


def test_scores_come_with_the_likeliest_tokens_also_without_blocking() -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, 300)
    with Engine(HashExecutor(), step_tokens=100, max_running=4) as engine:
        scores = asyncio.run(engine.ascore(ids, n_top=3))
        np.testing.assert_allclose(scores.chosen, engine.score(ids).chosen, atol=1e-9)
        for i in range(1, 300, 13):
            exact = hash_logits(ids[:i]).astype(np.float64)
            exact -= np.log(np.exp(exact).sum())
            best = np.argsort(-exact)[:3]
            assert [token for token, _ in scores.top[i - 1]] == best.tolist()
            assert [value for _, value in scores.top[i - 1]] == pytest.approx(exact[best].tolist(), abs=1e-6)
            if ids[i] in best:
                assert scores.chosen[i - 1] in [value for _, value in scores.top[i - 1]]
        assert_all_blocks_free(engine)


def test_a_cancelled_score_ends_its_work() -> None:
    gate = Gate()
    with Engine(HashExecutor(on_step=gate), step_tokens=100, max_running=4) as engine:

        async def run() -> None:
            task = asyncio.ensure_future(engine.ascore([1] * 300))
            await asyncio.to_thread(gate.entered.acquire)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        gate.open(100)
        assert_all_blocks_free(engine)


# Ends


def test_stop_tokens_and_end_tokens_end_the_answer() -> None:
    prompt = [1, 2, 3]
    answer = greedy(prompt, 40)
    distinct = [token for i, token in enumerate(answer) if token not in answer[:i]]
    end, stop = distinct[3], distinct[6]
    seen: list[int] = []

    def watch(token: int) -> bool:
        seen.append(token)
        return False

    with Engine(HashExecutor(), end_tokens=[end]) as engine:
        for fields, last in (
            ({}, end),
            ({"stop_tokens": frozenset({stop})}, end),
            ({"ignore_eos": True, "stop_tokens": frozenset({stop})}, stop),
        ):
            seen.clear()
            outputs = list(engine.generate(request(prompt, 40, stop=watch, **fields)))
            expected = answer[: answer.index(last) + 1]
            assert [output.token for output in outputs] == expected
            assert seen == expected[:-1]
            finish = outputs[-1].finish
            assert finish is not None
            assert (finish.reason, finish.stop_token) == ("stop", last)
            assert finish.usage.generated == len(expected)
        assert tokens(engine.generate(request(prompt, 40, ignore_eos=True))) == answer


def test_stop_callback_ends_the_answer() -> None:
    with Engine(HashExecutor()) as engine:
        calls: list[int] = []
        stream = engine.generate(request([1, 2, 3], 40, stop=lambda token: calls.append(token) or len(calls) == 5))
        outputs = list(stream)
        assert [output.token for output in outputs] == greedy([1, 2, 3], 5) == calls
        assert outputs[-1].finish is not None
        assert (outputs[-1].finish.reason, outputs[-1].finish.stop_token) == ("stop", None)


def test_min_tokens_hold_end_tokens_back() -> None:
    ends = list(range(VOCAB // 2))
    with Engine(HashExecutor(), end_tokens=ends) as engine:
        answer = tokens(engine.generate(request([1, 2, 3], 60, min_tokens=10)))
    assert len(answer) >= 11
    history = [1, 2, 3]
    for i, token in enumerate(answer):
        logits = hash_logits(np.array(history))
        if i < 10:
            logits[ends] = -np.inf
        assert token == logits.argmax()
        history.append(token)
    assert answer[-1] in ends


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    with Engine(HashExecutor(), vocab_size=10) as engine:
        answer = tokens(engine.generate(request([1, 2], 200, sampling=Sampling(temperature=5, seed=0))))
        assert set(answer) == set(range(10))
        with pytest.raises(RequestError, match="from 0 to 9, got 10"):
            engine.generate(request([1, 10]))


# Errors


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"prompt": [1] * 100},
            ContextError,
            "the prompt (100 tokens) leaves no room for an answer in the context (100 ",
        ),
        (
            {"prompt": [1] * 60, "max_tokens": 41},
            ContextError,
            "the prompt (60 tokens) and max_tokens (41) together exceed the context (100 tokens)",
        ),
        ({"prompt": [1, 99]}, RequestError, "prompt[1] must be a token id from 0 to 31, got 99"),
        ({"prompt": [1, -1]}, RequestError, "prompt[1] must be a token id from 0 to 31, got -1"),
        ({"prompt": [1.5]}, RequestError, "prompt must be a sequence of integers, got 1 dimensions of float64"),
        ({"stop_tokens": frozenset({32})}, RequestError, "stop_tokens must hold token ids from 0 to 31, got 32"),
        (
            {"sampling": Sampling(logit_bias={77: 1})},
            RequestError,
            "logit_bias must hold token ids from 0 to 31, got 77",
        ),
        ({"logprobs": 33}, RequestError, "logprobs (33) must be at most the vocabulary's 32"),
    ],
)
def test_wrong_requests_are_refused_on_submission(
    fields: dict[str, Any], error: type[DapjiError], message: str
) -> None:
    with Engine(HashExecutor(context=100)) as engine:
        with pytest.raises(error) as caught:
            engine.generate(request(**{"prompt": [1], **fields}))
        assert caught.value.message.startswith(message)
        assert len(list(engine.generate(request([1] * 60, 40)))) == 40


def test_wrong_scores_are_refused() -> None:
    with Engine(HashExecutor(n_blocks=4)) as engine:
        assert len(engine.score([1] * 65).chosen) == 64
        with pytest.raises(ContextError, match=r"66 tokens, of which 65 are read\) exceeds the context \(64"):
            engine.score([1] * 66)
        with pytest.raises(RequestError, match=r"start \(5\) must be from 1 to .* \(4\)"):
            engine.score([1] * 5, start=5)


@pytest.mark.parametrize(
    "options", [{"max_running": 9, "step_tokens": 8}, {"mixed_prompt_tokens": 0}, {"vocab_size": 33}]
)
def test_settings_that_make_no_sense(options: dict[str, int]) -> None:
    name = next(iter(options))
    with pytest.raises(UsageError, match=rf"{name} \({options[name]}\)"):
        Engine(HashExecutor(), **options)


def test_a_failing_step_ends_its_requests_and_no_other() -> None:
    class Failure(Exception):
        pass

    failing = threading.Event()

    def on_step() -> None:
        if failing.is_set():
            failing.clear()
            raise Failure("out of memory")

    with Engine(HashExecutor(on_step=on_step)) as engine:
        prompt = list(range(30))
        stream = engine.generate(request(prompt, 900))
        next(stream)
        failing.set()
        with pytest.raises(Failure, match="out of memory"):
            list(stream)
        with pytest.raises(StopIteration):
            next(stream)
        assert_all_blocks_free(engine)
        assert tokens(engine.generate(request(prompt))) == greedy(prompt, 8)


def test_a_failing_step_is_raised_by_score() -> None:
    def on_step() -> None:
        raise ValueError("broken step")

    with Engine(HashExecutor(on_step=on_step)) as engine, pytest.raises(ValueError, match="broken step"):
        engine.score([1, 2, 3])


def test_whatever_breaks_the_thread_nobody_waits_for_ever() -> None:
    class Broken(BaseException):
        pass

    def on_step() -> None:
        raise Broken

    engine = Engine(HashExecutor(on_step=on_step))
    with pytest.raises(Broken):
        next(engine.generate(request([1])))
    with pytest.raises(UsageError, match="the engine is closed") as caught:
        engine.generate(request([1]))
    assert isinstance(caught.value.__cause__, Broken)
    engine.close()


def test_a_failing_stop_callback_ends_its_request_alone(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated

    def stop(token: int) -> bool:
        raise ValueError("broken callback")

    good, bad = engine.generate(request([1, 2])), engine.generate(request([3, 4], stop=stop))
    gate.open(20)
    with pytest.raises(ValueError, match="broken callback"):
        next(bad)
    assert tokens(good) == greedy([1, 2], 8)
    assert_all_blocks_free(engine)


def test_logits_without_a_maximum_are_an_error_of_the_request() -> None:
    class Broken(HashExecutor):
        def step(self, batch: Any, hidden: Any = None) -> Any:
            return np.full_like(super().step(batch), np.nan)

    with Engine(Broken()) as engine, pytest.raises(FormatError, match="nan"):
        next(engine.generate(request([1])))


# Cancelling and closing


def test_closing_a_stream_frees_its_blocks_during_a_step_and_leaves_the_others_alone(
    gated: tuple[Engine, Gate],
) -> None:
    engine, gate = gated
    cancelled, other = engine.generate(request([1] * 40, 100)), engine.generate(request([2] * 40))
    gate.entered.acquire()
    gate.open()
    gate.entered.acquire()  # in the second step
    cancelled.close()
    assert engine._scheduler.pool.available >= engine._executor.n_blocks - 4
    gate.open(100)
    assert tokens(other) == greedy([2] * 40, 8)
    assert tokens(cancelled) == []
    assert_all_blocks_free(engine)


def test_closing_releases_a_reader_that_waits(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    stream = engine.generate(request([1] * 4))
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(tokens, stream)
        gate.entered.acquire()
        stream.close()
        assert reader.result(timeout=60) == []


def test_a_stream_that_is_let_go_is_cancelled(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    stream = engine.generate(request([1] * 4, 900))
    gate.open(3)
    next(stream)
    del stream
    gc.collect()
    gate.open(1000)
    other = engine.generate(request([2]))
    assert tokens(other) == greedy([2], 8)
    assert_all_blocks_free(engine)
    assert len(engine._executor.batches) < 100


def test_a_with_block_cancels_on_leaving() -> None:
    with Engine(HashExecutor()) as engine:
        with engine.generate(request([1, 2], 1000)) as stream:
            assert next(stream).token == greedy([1, 2], 1)[0]
        assert_all_blocks_free(engine)


def test_close_ends_what_runs_and_refuses_what_comes(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    stream = engine.generate(request([1, 2], 1000))
    gate.entered.acquire()
    closer = threading.Thread(target=engine.close)
    closer.start()
    gate.open(5)
    with pytest.raises(UsageError, match="closed before the request ended"):
        list(stream)
    closer.join(timeout=60)
    assert not closer.is_alive()
    engine.close()
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.generate(request([1]))
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.score([1, 2, 3])
    assert_all_blocks_free(engine)


def test_a_program_that_forgets_to_close_ends_between_two_steps() -> None:
    program = f"""
import atexit, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from engine_models import HashExecutor
from dapji.engine import Engine, Request
engine = Engine(HashExecutor(on_step=lambda: time.sleep(0.01)))
atexit.register(lambda: print("running" if engine._thread.is_alive() else "ended"))
stream = engine.generate(Request(prompt=[1], max_tokens=1000))
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_an_engine_that_never_ran_closes() -> None:
    Engine(HashExecutor()).close()


# asyncio


async def read(engine: Engine, prompt: list[int], **fields: Any) -> list[int]:
    return [output.token async for output in engine.agenerate(request(prompt, **fields))]


def test_async_streams_run_side_by_side() -> None:
    prompts = [[i, i + 1] * 10 for i in range(12)]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(read(engine, prompt) for prompt in prompts))

    executor = HashExecutor()
    with Engine(executor) as engine:
        assert asyncio.run(main()) == [greedy(prompt, 8) for prompt in prompts]
        assert max(len(batch.starts) - 1 for batch in executor.batches) > 1
        assert_all_blocks_free(engine)


def test_cancelling_a_task_cancels_its_request() -> None:
    async def main() -> None:
        stream = engine.agenerate(request([1, 2], 1000))
        first: asyncio.Future[Output] = asyncio.get_running_loop().create_future()

        async def reader() -> None:
            async for output in stream:
                if not first.done():
                    first.set_result(output)

        task = asyncio.create_task(reader())
        await first
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert_all_blocks_free(engine)
        assert await read(engine, [3, 4]) == greedy([3, 4], 8)
        async with engine.agenerate(request([1, 2], 1000)) as another:
            await anext(another)
        assert_all_blocks_free(engine)

    with Engine(HashExecutor()) as engine:
        asyncio.run(main())


def test_aclose_releases_an_async_reader_that_waits(gated: tuple[Engine, Gate]) -> None:
    engine, _ = gated

    async def main() -> None:
        stream = engine.agenerate(request([1, 2]))
        reader = asyncio.create_task(anext(stream, None))
        await asyncio.sleep(0)
        await stream.aclose()
        assert await reader is None

    asyncio.run(main())


def test_errors_reach_async_readers() -> None:
    def on_step() -> None:
        raise ValueError("broken step")

    with Engine(HashExecutor(on_step=on_step)) as engine:
        with pytest.raises(ValueError, match="broken step"):
            asyncio.run(read(engine, [1]))
        with pytest.raises(ContextError):
            asyncio.run(read(engine, [1] * 2000))


def test_a_loop_that_ends_early_harms_nobody() -> None:
    async def main() -> None:
        stream = engine.agenerate(request([1, 2], 1000))
        await anext(stream)

    with Engine(HashExecutor()) as engine:
        asyncio.run(main())
        assert tokens(engine.generate(request([3]))) == greedy([3], 8)
        assert_all_blocks_free(engine)


def test_without_a_running_loop_there_is_no_async_stream() -> None:
    with Engine(HashExecutor()) as engine, pytest.raises(RuntimeError, match="no running event loop"):
        engine.agenerate(request([1]))


# Many at once


def test_samples_of_one_prompt_read_it_once_and_share_its_blocks() -> None:
    prompt, sampling = list(range(30)) * 10, Sampling(temperature=1, seed=5)
    alone = []
    for one in sampling.split(8):
        with Engine(HashExecutor()) as engine:
            alone.append(tokens(engine.generate(request(prompt, 20, sampling=one))))
    assert len(set(map(tuple, alone))) == 8
    executor = HashExecutor(n_blocks=35)
    with Engine(executor, step_tokens=64, max_running=8) as engine:
        streams = [engine.generate(request(prompt, 20, sampling=one)) for one in sampling.split(8)]
        assert [tokens(stream) for stream in streams] == alone
        assert_all_blocks_free(engine)
    # 18 full blocks of the prompt once, and each answer's own two: no sample was preempted. The others begin by
    # computing the last token, whose logits they draw from.
    assert sum(len(batch.tokens) for batch in executor.batches) == 300 + 7 + 8 * 19


def test_a_long_prompt_does_not_stop_streams(gated: tuple[Engine, Gate]) -> None:
    engine, gate = gated
    streams = [engine.generate(request([i] * 5, 25)) for i in range(3)]
    gate.open(5)
    for stream in streams:
        next(stream)
    long = engine.generate(request([9] * 600, 1))
    gate.open(1000)
    assert tokens(long) == greedy([9] * 600, 1)
    assert [tokens(stream) for stream in streams] == [greedy([i] * 5, 25)[1:] for i in range(3)]
    shares = [np.diff(batch.starts).tolist() for batch in engine._executor.batches]
    assert [share for share in shares if max(share) > 5] == [[1, 1, 1, 64]] * 9 + [[1, 1, 1, 24]]


def test_a_short_question_does_not_wait_for_a_second_sample_of_a_long_prompt() -> None:
    gate = Gate()
    executor = HashExecutor(on_step=gate)
    with Engine(executor, step_tokens=32, max_running=4) as engine:
        samples = [engine.generate(request([1, 2] * 200, 4)) for _ in range(2)]
        short = engine.generate(request([3], 3))
        gate.open(10_000)
        assert tokens(short) == greedy([3], 3)
        for sample in samples:
            assert tokens(sample) == greedy([1, 2] * 200, 4)
    ended = max(i for i, batch in enumerate(executor.batches) if 3 in batch.tokens[batch.positions == 0])
    assert ended < 12


def test_requests_that_do_not_fit_together_are_preempted_and_lose_nothing() -> None:
    executor = HashExecutor(n_blocks=12)
    prompts = [[i] * 40 for i in range(4)]
    with Engine(executor, step_tokens=64, max_running=4) as engine:
        streams = [engine.generate(request(prompt, 100)) for prompt in prompts]
        assert [tokens(stream) for stream in streams] == [greedy(prompt, 100) for prompt in prompts]
        assert_all_blocks_free(engine)
    # Four sequences of 139 computed tokens need 36 blocks. Somebody was computed again beyond the prompts' length:
    assert sum(len(batch.tokens) for batch in executor.batches) > 4 * 139


def test_the_same_tokens_alone_and_among_seven_others() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95, frequency_penalty=0.3, seed=11)
    mine = request([9] * 50, 60, sampling=sampling)
    with Engine(HashExecutor()) as engine:
        alone = tokens(engine.generate(mine))
    for n_blocks in (64, 16):
        with Engine(HashExecutor(n_blocks=n_blocks), step_tokens=32, max_running=8) as engine:
            others = [engine.generate(request([i] * (30 * i + 1), 40, sampling=Sampling())) for i in range(4)]
            stream = engine.generate(mine)
            others += [engine.generate(request([i] * (10 * i), 60, sampling=Sampling())) for i in range(5, 8)]
            assert tokens(stream) == alone
            for other in others:
                list(other)
            assert_all_blocks_free(engine)


def test_threads_hammering_one_engine() -> None:
    def work(thread: int) -> None:
        rng = np.random.default_rng(thread)
        for _ in range(15):
            prompt = [int(rng.integers(0, 3))] * int(rng.integers(1, 60))
            n = int(rng.integers(1, 20))
            kind = rng.integers(0, 4)
            if kind == 0:
                with engine.generate(request(prompt, n)) as stream:
                    assert [next(stream).token for _ in range(n // 2)] == greedy(prompt, n // 2)
            elif kind == 1:
                engine.score([*prompt, 1])
            else:
                assert tokens(engine.generate(request(prompt, n))) == greedy(prompt, n)

    with Engine(HashExecutor(n_blocks=20), step_tokens=40, max_running=6) as engine:
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(work, thread) for thread in range(8)]:
                future.result(timeout=120)
        assert_all_blocks_free(engine)


mixes = st.lists(
    st.tuples(
        st.integers(0, 2),  # which prefix the prompt begins with
        st.integers(1, 70),  # of how many tokens
        st.integers(0, 20),  # followed by so many of its own
        st.integers(1, 40),  # tokens to generate
        st.none() | st.integers(0, 10),  # closed after so many tokens
    ),
    min_size=1,
    max_size=10,
)


@given(mix=mixes, n_blocks=st.integers(9, 40), step_tokens=st.integers(4, 80), mixed=st.integers(1, 64))
@settings(deadline=None, max_examples=60)
def test_any_mix_ends_with_the_right_tokens_and_gives_all_blocks_back(
    mix: list[tuple[int, int, int, int, int | None]], n_blocks: int, step_tokens: int, mixed: int
) -> None:
    executor = HashExecutor(n_blocks=n_blocks)
    with Engine(executor, step_tokens=step_tokens, mixed_prompt_tokens=mixed, max_running=4) as engine:
        running = []
        for i, (prefix, length, own, n, closed_after) in enumerate(mix):
            prompt = [prefix] * length + [i + 10] * own
            running.append((prompt, n, closed_after, engine.generate(request(prompt, n))))
        for prompt, n, closed_after, stream in running:
            if closed_after is not None and closed_after < n:
                assert [next(stream).token for _ in range(closed_after)] == greedy(prompt, closed_after)
                stream.close()
            else:
                assert tokens(stream) == greedy(prompt, n)
        assert_all_blocks_free(engine)
