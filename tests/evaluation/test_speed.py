"""What a speed is compared with, counted by hand; and what is run to measure it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dapji.engine import Engine
from dapji.errors import UsageError
from dapji.evaluation import speed as module
from dapji.evaluation.machine import Limits
from dapji.evaluation.speed import Speed, Work, measure_speed
from dapji.files import Files, open_files
from dapji.models.executor import ReferenceExecutor
from dapji.ops.batch import Batch
from tiny import write_tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """D 64, V 261, one layer: 2 heads and 1 kv head of 32, F 32; all float32; a head of its own."""
    return open_files(write_tiny(tmp_path_factory.mktemp("speed") / "tiny.gguf", ["aa", "bb"]))


def test_work_counted_by_hand(files: Files) -> None:
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 32 * 64  # q, k and v, o, gate up down
    head = 261 * 64
    work = Work.of(files.config, files.tensors, "q8")
    assert work.weight_bytes == 4 * (layer + head + 3 * 64), "the embedding is not read, norms are"
    assert work.cache_bytes == 2 * 32 * 1.125, "a byte each and a float for 32 of them"
    assert work.operations == 2 * layer
    assert work.head_operations == 2 * head
    assert Work.of(files.config, files.tensors, "f16").cache_bytes == 2 * 32 * 2


def test_a_tied_head_is_read_once() -> None:
    from dataclasses import replace

    from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig, weight_shapes
    from dapji.ops.tensor import Tensor

    attention = AttentionConfig(n_heads=1, n_kv_heads=1, head_dim=32, rope=None)
    layer = LayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=32))
    tied = ModelConfig(
        family="llama", dim=32, vocab_size=100, max_context=64, norm_eps=0, layers=(layer,), tied_head=True
    )

    def work(config: ModelConfig) -> Work:
        shapes = weight_shapes(config)
        return Work.of(config, {n: Tensor.from_float32(n, np.zeros(s, np.float32)) for n, s in shapes.items()}, "f32")

    assert work(tied) == work(replace(tied, tied_head=False))


def test_limits_follow_from_the_work() -> None:
    work = Work(weight_bytes=1000, cache_bytes=10.0, operations=500, head_operations=4000)
    limits = tuple(Limits(read_bandwidth=b, int8_peak=p) for b, p in ((9e6, 1e6), (6e6, 3e6), (3e6, 9e6)))
    speed = Speed(n_prompt=8, n_decode=5, depth=97, prompt=(1.0,), decode=(1.0,), limits=limits)
    # five tokens after 97: the cache holds 98, 99, 100, 101, 102 tokens with the one being written
    assert speed.decode_bytes(work) == 1000 + 10 * 100
    assert speed.decode_limit(work) == 6e6 / 2000
    assert speed.prompt_operations(work) == 500 + 4000 / 8
    assert speed.prompt_limit(work) == 3e6 / 1000
    unknown = Speed(
        n_prompt=8, n_decode=5, depth=0, prompt=(), decode=(), limits=(Limits(read_bandwidth=1, int8_peak=None),)
    )
    assert unknown.prompt_limit(work) is None


class Recording:
    """An executor that writes down how many tokens each step had, and how far the conversation was."""

    def __init__(self, executor: ReferenceExecutor) -> None:
        self.executor = executor
        self.config, self.context, self.n_blocks = executor.config, executor.context, executor.n_blocks
        self.steps: list[tuple[int, int]] = []

    def step(self, batch: Batch, hidden: Any = None) -> Any:
        self.steps.append((len(batch.tokens), int(batch.positions[-1])))
        return self.executor.step(batch, hidden)

    def copy_block(self, source: int, target: int) -> None:
        self.executor.copy_block(source, target)

    def close(self) -> None:
        self.executor.close()


@pytest.fixture
def executor(files: Files) -> Iterator[Recording]:
    recording = Recording(ReferenceExecutor(files.config, files.tensors, context=64, n_blocks=4))
    yield recording
    recording.close()


def test_what_is_run(executor: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn reads a whole new prompt (nothing from the cache) and writes an answer after `depth` tokens."""
    counts: list[int] = []
    monkeypatch.setattr(module, "measure_limits", lambda threads: Limits(read_bandwidth=threads, int8_peak=None))
    with Engine(executor, speculate=False) as engine:
        speed = measure_speed(
            engine,
            vocab_size=261,
            threads=7,
            n_prompt=40,
            n_decode=3,
            depth=20,
            repeats=2,
            progress=lambda: counts.append(len(executor.steps)),
        )
    turn = [(40, 39), (20, 19), (1, 20), (1, 21), (1, 22)]
    assert executor.steps == 3 * turn, "the first turn warms up"
    assert counts == [0, 1, 5, 5, 6, 10, 10, 11, 15]
    assert (len(speed.prompt), len(speed.decode), speed.read_bandwidth) == (2, 2, 7)
    assert min(*speed.prompt, *speed.decode) > 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_prompt": 64, "n_decode": 1}, "65 tokens are needed, the context has 64"),
        ({"n_prompt": 8, "n_decode": 32, "depth": 32}, "65 tokens are needed"),
        ({"n_prompt": 0}, "prompt (0) must be at least 1"),
        ({"depth": -1}, "depth (-1) must be at least 0"),
    ],
)
def test_mistakes(sizes: dict[str, int], message: str, executor: Recording) -> None:
    with Engine(executor) as engine, pytest.raises(UsageError) as error:
        measure_speed(engine, vocab_size=261, threads=1, **sizes)
    assert message in error.value.message
