"""The native executor: every weight format against the reference of the same arithmetic, and bits that depend on
nothing but the text."""

from __future__ import annotations

import os
import resource
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dapji.errors import ConfigError, UsageError
from dapji.models import families
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig, weight_shapes
from dapji.models.executor import open_executor
from dapji.models.native_executor import NativeExecutor
from dapji.ops import native
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.formats import FORMATS
from dapji.ops.reference import KvFormat
from dapji.ops.rope import RopeConfig
from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import read_gguf, write_gguf
from random_weights import random_weights

VOCAB = 80


def model(format: str, *, window: int | None = None, bias: bool = False) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Two layers whose every matrix has rows of 256 or 512 values, whole blocks of each format."""
    attention = AttentionConfig(
        n_heads=8, n_kv_heads=2, head_dim=32, rope=RopeConfig(theta=10000.0, dim=24),
        window=window, qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    feed_forward = FeedForwardConfig(hidden_dim=512, bias=bias, activation="gelu_tanh" if bias else "silu")
    config = ModelConfig(
        family="llama",
        dim=256,
        vocab_size=VOCAB,
        max_context=1024,
        norm_eps=1e-5,
        layers=(LayerConfig(attention=attention, feed_forward=feed_forward),) * 2,
        tied_head=False,
    )
    return config, random_weights(config, 5, format=lambda name: format)


def text(n: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).astype(np.int32)


def opened(
    format: str = "Q4_1", *, kv: KvFormat = "f16", threads: int = 2, n_blocks: int = 64, **more: object
) -> NativeExecutor:
    config, tensors = model(format, **more)  # type: ignore[arg-type]
    return NativeExecutor(config, tensors, context=1024, n_blocks=n_blocks, threads=threads, kv=kv)


@pytest.mark.parametrize("format", FORMATS)
def test_every_weight_format_is_the_reference_of_the_same_arithmetic(format: str) -> None:
    """A float32 sum in another order may put an activation on the other side of an int8 step, which is then seen in the
    logits. So the bound is relative to what rounding to int8 does at all; without rounding it is that of float32."""
    config, tensors = model(format)
    ids = Batch.single(text(40))
    reference, rounded = (
        open_executor("reference", config, tensors, context=64, kv="f32", activations=a).step(ids)
        for a in ("f32", "q8")
    )
    got = open_executor("native", config, tensors, context=64, kv="f32").step(ids)
    if FORMATS[format].block == 1:
        np.testing.assert_allclose(got, reference, rtol=0, atol=2e-5 * np.abs(reference).max())
    else:
        effect = np.sqrt(np.mean((rounded - reference) ** 2))
        assert effect > 0
        assert np.sqrt(np.mean((got - rounded) ** 2)) < 0.5 * effect
        assert (np.median(np.abs(got - rounded))) < 0.25 * effect


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize(("window", "bias"), [(None, False), (70, True)])
def test_bits_depend_on_neither_threads_nor_chunks_nor_company(kv: KvFormat, window: int | None, bias: bool) -> None:
    """600 tokens are three of the segments into which the attention of a single row is split."""
    ids = text(600)
    whole = opened(kv=kv, window=window, bias=bias, threads=1).step(Batch.single(ids))

    for threads, cuts in ((2, [0, 1, 17, 64, 65, 300, 600]), (3, [0, 511, 513, *range(590, 601)])):
        executor = opened(kv=kv, window=window, bias=bias, threads=threads)
        pieces = [executor.step(Batch.single(ids[a:b], past=a)) for a, b in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)

    # beside another sequence, in blocks in reverse order, the last 20 tokens one by one beside single tokens of it
    executor = opened(kv=kv, window=window, bias=bias, threads=2, n_blocks=128)
    blocks = np.arange(127, -1, -1, dtype=np.int32).reshape(2, 64)
    other = text(600, seed=1)
    got = [executor.step(side_by_side(ids, other, blocks, 0, 580))[:580]]
    got += [executor.step(side_by_side(ids, other, blocks, i, i + 1))[:1] for i in range(580, 600)]
    np.testing.assert_array_equal(np.concatenate(got), whole)


def side_by_side(
    ids: NDArray[np.int32], other: NDArray[np.int32], blocks: NDArray[np.int32], start: int, end: int
) -> Batch:
    n = end - start
    return Batch(
        tokens=np.concatenate([ids[start:end], other[start:end]]),
        positions=np.tile(np.arange(start, end, dtype=np.int32), 2),
        starts=np.array([0, n, 2 * n], dtype=np.int32),
        blocks=blocks,
        rows=np.arange(2 * n, dtype=np.int32),
    )


def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain C++ of `generic` is the readable statement of the arithmetic; the fast ones must equal it exactly."""
    results = []
    for isa in native.isas():
        monkeypatch.setenv("DAPJI_ISA", isa)
        for format in ("Q4_1", "Q6_K", "F16"):
            executor = opened(format, bias=True)
            prompt = executor.step(Batch.single(text(50)))
            results.append((isa, format, prompt, executor.step(Batch.single(text(1), past=50))))
    for _, format, prompt, decoded in results:
        _, _, wanted_prompt, wanted = next(r for r in results if r[:2] == ("generic", format))
        np.testing.assert_array_equal(prompt, wanted_prompt)
        np.testing.assert_array_equal(decoded, wanted)


def test_a_window_does_not_read_blocks_before_it() -> None:
    executor, other = (opened(window=30) for _ in range(2))
    ids = text(101)
    executor.step(Batch.single(ids[:100]))
    other.step(Batch.single(ids[:100]))
    batch = Batch.single(ids[100:], past=100)
    wanted = other.step(batch)
    forgotten = batch.blocks.copy()
    forgotten[0, : (100 - 30 + 1) // KV_BLOCK] = -1
    again = Batch(
        tokens=batch.tokens, positions=batch.positions, starts=batch.starts, blocks=forgotten, rows=batch.rows
    )
    np.testing.assert_array_equal(executor.step(again), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [5, 4]}, r"rows\[1\] must rise within the tokens"),
        ({"rows": [40]}, r"rows\[0\] must rise"),
        ({"hidden_rows": [3, 3]}, r"hidden_rows\[1\] must rise within the tokens"),
        ({"starts": [0, 20, 20, 40], "blocks": [[0, 1, 2]] * 3}, "sequence 1 has no tokens"),
        ({"starts": [0, 39]}, "starts do not span the tokens"),
        ({"positions": [*range(39), 40]}, r"positions\[39\] does not follow"),
        ({"blocks": [[0, 1]]}, "sequence 0 lacks blocks"),
        ({"blocks": [[0, 1, 64]]}, "sequence 0 has a block outside the cache"),
        ({"blocks": [[0, -1, 2]]}, "sequence 0 has a block outside the cache"),
        (
            {"starts": [0, 20, 40], "positions": [*range(20), *range(20)], "blocks": [[0, 1], [1, 2]]},
            "block 1 is written twice",
        ),
        ({"blocks": [[0, 2, 2]]}, "block 2 is written twice"),
        ({"starts": [0, 50, 40], "blocks": [[0, 1, 2, 3]] * 2}, r"starts\[1\] is beyond the tokens"),
        ({"blocks": [[0, 1, 2]] * 2}, "the arrays of the batch do not fit each other"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_anything_is_computed(
    changes: dict[str, list[int]], message: str
) -> None:
    """Batches are composed by the engine, so these are our own mistakes: ValueError, never a stray read or write."""
    batch = Batch.single(text(40))
    arrays = {name: getattr(batch, name) for name in ("tokens", "positions", "starts", "blocks", "rows", "hidden_rows")}
    arrays |= {name: np.array(value, dtype=np.int32) for name, value in changes.items()}
    logits = np.empty((len(arrays["rows"]), VOCAB), dtype=np.float32)
    hidden = np.empty((len(arrays["hidden_rows"]), 256), dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        opened()._program.step(**arrays, logits=logits, hidden=hidden)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_a_number_that_is_none_reaches_every_token_that_attends_to_it(kv: KvFormat) -> None:
    config, tensors = model("F32")
    values = tensors["embed"].float32().copy()
    values[3] = np.nan
    tensors["embed"] = Tensor.from_float32("embed", values)
    executor = NativeExecutor(config, tensors, context=64, n_blocks=4, threads=2, kv=kv)
    assert np.isnan(executor.step(Batch.single([3, 1, 2]))).all()
    assert np.isnan(executor.step(Batch.single([1], past=3))).all()


def test_a_model_that_it_cannot_run_is_named() -> None:
    config, tensors = model("F32")
    layer = config.layers[0]
    wide = replace(layer, attention=replace(layer.attention, n_heads=340, head_dim=32))
    config = replace(config, layers=(wide,))
    tensors = {
        name: Tensor.from_float32(name, np.zeros(shape, np.float32)) for name, shape in weight_shapes(config).items()
    }
    with pytest.raises(ConfigError, match="cannot run this model: attention: 340 heads over 2 kv heads"):
        NativeExecutor(config, tensors, context=64, n_blocks=4)


def test_threads_that_cannot_be_are_named() -> None:
    with pytest.raises(UsageError, match=r"threads \(0\) must be at least 1"):
        opened(threads=0)

    def without_memory_for_stacks() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), used + (1 << 28)))
        with pytest.raises(UsageError, match="500 threads could not be started"):
            opened(threads=500)

    in_a_fork(without_memory_for_stacks)


def test_a_forked_process_is_refused_and_ends() -> None:
    """Threads do not survive a fork: a step would wait for them for ever, and so would their end."""
    executor = opened()
    wanted = executor.step(Batch.single(text(20)))

    def run() -> None:
        with pytest.raises(UsageError, match="stayed behind when the process was forked"):
            executor.step(Batch.single(text(20)))
        executor.close()

    in_a_fork(run)
    np.testing.assert_array_equal(executor.step(Batch.single(text(20))), wanted)


def in_a_fork(function: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which is the point
        child = os.fork()
    if child == 0:
        signal.alarm(30)  # instead of a test that hangs
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is resident")
def test_the_file_does_not_stay_in_memory_beside_the_packed_weights(tmp_path: Path) -> None:
    config, tensors = model("F32")
    metadata, named = families.to_gguf(config, tensors)
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata, [TensorToWrite.of(name, tensor) for name, tensor in named.items()])
    config, tensors = families.from_gguf(metadata, read_gguf(path).tensors)
    executor = NativeExecutor(config, tensors, context=64, n_blocks=8)
    resident = 0
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            if line.endswith(f"{path}\n"):
                resident += next(int(entry.split()[1]) << 10 for entry in lines if entry.startswith("Rss:"))
    # Of 4.9 MB there are the norms, each with some 64 kB around it that the system maps along.
    assert 0 < resident < path.stat().st_size / 5
    executor.close()


def test_memory_that_does_not_suffice_is_named() -> None:
    config, tensors = model("Q8_0")
    with pytest.raises(UsageError, match="not enough memory for the weights and a cache of 2000000000 blocks"):
        NativeExecutor(config, tensors, context=1024, n_blocks=2_000_000_000)


def test_the_program_is_a_few_fused_operations() -> None:
    lines = opened()._program.describe()
    assert lines[0].startswith("embed")
    assert lines[1:6] == [
        "norm, linear Q4_1 256x256 Q4_1 64x256 Q4_1 64x256",
        "attention of layer 0, 8 heads over 2 of 32",
        "linear Q4_1 256x256 (added)",
        "norm, linear Q4_1 512x256 Q4_1 512x256 (gated)",
        "linear Q4_1 256x512 (added)",
    ]
    assert lines[-3:] == ["norm of hidden rows", "select rows", "norm, linear Q4_1 80x256"]
    assert len(lines) == 1 + 2 * 5 + 3
