"""Latent attention at depth: how long a token takes, and what is read and multiplied meanwhile.

    python benchmarks/latent.py        heads of DeepSeek V2 Lite (16) and V3 (128), behind 1k, 8k and 32k tokens

One layer, whose k_up and v_up are random in Q8_0 and whose other matrices are next to nothing; the cache holds zeros,
which take as long as anything else. For comparison: how fast this machine reads memory, as `dapji bench` measures it,
and how fast numpy's BLAS multiplies large matrices of float32.

On a machine that is busy with other things, --threads 1 --processor-time counts the time that the processor gave to
the script, instead of the time that went by.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time

import numpy as np

from dapji.models.config import FeedForwardConfig, LatentAttentionConfig, LayerConfig, ModelConfig, weight_shapes
from dapji.models.native_executor import NativeExecutor
from dapji.ops import native
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.formats import FORMATS
from dapji.ops.rope import RopeConfig
from dapji.ops.tensor import Tensor
from dapji.weights.quantize import quantize

HEADS = {"DeepSeek V2 Lite": 16, "DeepSeek V3": 128}
DEPTHS = [1024, 8192, 32768]
ROUNDS = 15

Clock = Callable[[], float]


def config(n_heads: int, context: int) -> ModelConfig:
    attention = LatentAttentionConfig(
        n_heads=n_heads, query_dim=None, latent_dim=512, nope_dim=128, value_dim=128,
        rope=RopeConfig(theta=10000.0, dim=64), scale=192**-0.5, norm_eps=1e-6,
    )  # fmt: skip
    return ModelConfig(
        family="deepseek", dim=32, vocab_size=32, max_context=context, norm_eps=1e-6, tied_head=True,
        layers=(LayerConfig(attention=attention, feed_forward=FeedForwardConfig(hidden_dim=32)),),
    )  # fmt: skip


def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    values = np.random.default_rng(0).standard_normal((1 << 15, 32), dtype=np.float32) / 16
    blocks = quantize(values, FORMATS["Q8_0"])
    tensors = {}
    for name, shape in weight_shapes(model).items():
        if len(shape) == 1:
            tensors[name] = Tensor.from_float32(name, np.ones(shape, dtype=np.float32))
            continue
        rows = int(np.prod(shape[:-1]))
        source = np.resize(blocks, (rows, FORMATS["Q8_0"].row_bytes(shape[-1])))
        tensors[name] = Tensor(name=name, format=FORMATS["Q8_0"], shape=shape, source=source)
    return tensors


@dataclass(frozen=True, kw_only=True)
class Timing:
    seconds: float
    n_bytes: float
    """Of cache and weights, read for one token."""
    products: float
    """Float32 multiplications with an addition, twice."""


def timed(executor: NativeExecutor, depth: int, clock: Clock) -> Timing:
    """A token behind depth - 1 others, the best of some rounds."""
    attention = executor.config.layers[0].attention
    assert isinstance(attention, LatentAttentionConfig)
    batch = Batch.single([1], past=depth - 1)
    seconds = []
    for _ in range(ROUNDS):
        start = clock()
        executor.step(batch)
        seconds.append(clock() - start)
    cached = executor.cache_bytes / executor.n_blocks / KV_BLOCK * depth
    weights = attention.n_heads * (attention.nope_dim + attention.value_dim) * attention.latent_dim
    per_position = attention.n_heads * (2 * attention.latent_dim + attention.rope.dim)
    return Timing(
        seconds=min(seconds),
        n_bytes=cached + weights * FORMATS["Q8_0"].row_bytes(32) / 32,
        products=2.0 * (per_position * depth + weights),
    )


def blas_speed(threads: int) -> float:
    """Of numpy's matrix product, operations per second."""
    n = 2048
    a = np.random.default_rng(1).standard_normal((n, n), dtype=np.float32)
    a @ a
    start = process_time()  # of all its threads
    a @ a
    return 2.0 * n**3 / (process_time() - start) * threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--kv", choices=["f32", "f16", "q8"], default="f16")
    parser.add_argument("--processor-time", action="store_true")
    arguments = parser.parse_args()
    clock = process_time if arguments.processor_time else perf_counter
    print("| heads | tokens | ms per layer | MB read | GB/s | Gflop/s |")
    print("|---|---|---|---|---|---|")
    for name, n_heads in HEADS.items():
        model = config(n_heads, max(DEPTHS))
        executor = NativeExecutor(
            model, random_weights(model), context=max(DEPTHS), n_blocks=max(DEPTHS) // KV_BLOCK,
            threads=arguments.threads, kv=arguments.kv,
        )  # fmt: skip
        for depth in DEPTHS:
            timing = timed(executor, depth, clock)
            print(
                f"| {name}: {n_heads} | {depth} | {1e3 * timing.seconds:.2f} | {timing.n_bytes / 1e6:.1f} "
                f"| {1e-9 * timing.n_bytes / timing.seconds:.1f} | {1e-9 * timing.products / timing.seconds:.0f} |"
            )
    # at the end: the threads of BLAS go on spinning for a while
    bandwidth, products = native.read_bandwidth(arguments.threads), blas_speed(arguments.threads)
    print(f"\n{arguments.threads} threads: memory {bandwidth / 1e9:.1f} GB/s, numpy {products / 1e9:.0f} Gflop/s")


if __name__ == "__main__":
    main()
