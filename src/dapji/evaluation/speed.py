"""How fast a model reads a prompt and writes an answer, and how fast this machine could let it.

Drives an engine with random token ids: speed does not depend on what the tokens say. Knows neither text nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from dapji.engine import BaseEngine, Finish, Request, Sampling
from dapji.errors import UsageError
from dapji.evaluation.machine import Limits, measure_limits
from dapji.models.config import ModelConfig
from dapji.models.size import cached_values, read_shares
from dapji.ops.reference import KvFormat
from dapji.ops.tensor import Tensor

KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8": 1 + 4 / 32}
"""Of one value in the cache: q8 has a float32 scale for each 32 values."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a model cannot do without, whatever runs it."""

    weight_bytes: int
    """Read for each token of an answer: every weight but the experts not chosen, of the embedding one row unless it is
    the head too."""
    cache_bytes: float
    """Read for each earlier token of the conversation, for each token of an answer."""
    operations: int
    """Of a prompt's token in the layers' matrix products, a multiplication and an addition counted as two."""
    head_operations: int
    """Once per prompt."""

    @staticmethod
    def of(config: ModelConfig, tensors: Mapping[str, Tensor], kv: KvFormat) -> Work:
        """tensors: by canonical name."""
        head = "embed" if config.tied_head else "head"
        shares = read_shares(config)
        matrices = [name for name, tensor in tensors.items() if name.startswith("layers.") and tensor.rows > 1]
        return Work(
            weight_bytes=round(sum(share * tensors[name].nbytes for name, share in shares.items())),
            cache_bytes=cached_values(config) * KV_BYTES[kv],
            operations=round(2 * sum(shares[name] * tensors[name].rows * tensors[name].cols for name in matrices)),
            head_operations=2 * tensors[head].rows * tensors[head].cols,
        )


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of each repeat, and the limits measured beside it."""

    n_prompt: int
    n_decode: int
    depth: int
    """Tokens of conversation before the measured answers."""
    prompt: tuple[float, ...]
    decode: tuple[float, ...]
    limits: tuple[Limits, ...]

    @property
    def read_bandwidth(self) -> float:
        """Bytes per second, the median."""
        return median(limits.read_bandwidth for limits in self.limits)

    @property
    def int8_peak(self) -> float | None:
        """Operations per second, the median."""
        peaks = [limits.int8_peak for limits in self.limits if limits.int8_peak is not None]
        return median(peaks) if peaks else None

    def decode_bytes(self, work: Work) -> float:
        """Read for an answer's token, on average."""
        return work.weight_bytes + work.cache_bytes * (self.depth + (self.n_decode + 1) / 2)

    def decode_limit(self, work: Work) -> float:
        """Tokens per second if memory were read at full bandwidth and nothing else took time."""
        return self.read_bandwidth / self.decode_bytes(work)

    def prompt_operations(self, work: Work) -> float:
        """For a prompt's token, on average."""
        return work.operations + work.head_operations / self.n_prompt

    def prompt_limit(self, work: Work) -> float | None:
        """Tokens per second if the matrix products ran at the int8 peak and nothing else took time."""
        return None if self.int8_peak is None else self.int8_peak / self.prompt_operations(work)


def measure_speed(
    engine: BaseEngine,
    *,
    vocab_size: int,
    threads: int,
    n_prompt: int = 512,
    n_decode: int = 128,
    depth: int = 0,
    repeats: int = 5,
    progress: Callable[[], object] = lambda: None,
) -> Speed:
    """Measure the limits, a prompt and an answer in turn, `repeats` times, after one turn that does not count.

    engine: without speculation, so that each token of an answer is a step.
    progress: called 3 * (repeats + 1) times. Raises UsageError where the engine's context is too short.
    """
    for name, value, least in (("prompt", n_prompt, 1), ("decode", n_decode, 1), ("depth", depth, 0)):
        if value < least:
            raise UsageError(f"{name} ({value}) must be at least {least}")
    before = max(depth, 1)  # an answer begins after at least one token
    needed = max(n_prompt + 1, before + n_decode + 1)
    if needed > engine.context:
        raise UsageError(f"{needed} tokens are needed, the context has {engine.context}")
    random = np.random.default_rng(0)  # every prompt is another: none is found in the cache

    def answer(n_before: int, n_tokens: int) -> Finish:
        finish = answer_random(engine, random, vocab_size=vocab_size, n_before=n_before, n_tokens=n_tokens)
        progress()
        return finish

    limits, prompt, decode = [], [], []
    for _ in range(repeats + 1):
        limits.append(measure_limits(threads))
        progress()
        prompt.append(n_prompt / answer(n_prompt, 1).timings.first_token)
        decode.append(answer(before, n_decode + 1).tokens_per_second or 0.0)
    return Speed(
        n_prompt=n_prompt,
        n_decode=n_decode,
        depth=depth,
        prompt=tuple(prompt[1:]),
        decode=tuple(decode[1:]),
        limits=tuple(limits[1:]),
    )


def answer_random(
    engine: BaseEngine, random: np.random.Generator, *, vocab_size: int, n_before: int, n_tokens: int
) -> Finish:
    """How an answer of exactly `n_tokens` to `n_before` random tokens went."""
    prompt = random.integers(vocab_size, size=n_before).tolist()
    request = Request(
        prompt=prompt, max_tokens=n_tokens, min_tokens=n_tokens, sampling=Sampling(temperature=0), ignore_eos=True
    )
    *_, last = engine.generate(request)
    assert last.finish is not None
    return last.finish
