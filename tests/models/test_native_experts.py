"""The native executor's routed experts, and norms, scales and caps outside attention: against the reference, and bits
that depend on nothing but the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from test_native_executor import VOCAB, text

from dapji.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
)
from dapji.models.executor import open_executor
from dapji.models.native_executor import NativeExecutor
from dapji.ops import native
from dapji.ops.batch import Batch
from dapji.ops.formats import FORMATS
from dapji.ops.rope import RopeConfig
from dapji.ops.routing import Routing
from dapji.ops.tensor import Tensor
from random_weights import random_weights

TOLERANCE = 2e-5
"""Relative to the largest logit: the order of float32 sums (3e-6 is what occurs)."""

ATTENTION = AttentionConfig(n_heads=8, n_kv_heads=2, head_dim=32, rope=RopeConfig(theta=10000.0, dim=32))

PLAIN = Routing(n_experts=8, n_experts_per_token=2)
ROUTINGS = {
    "softmax": PLAIN,
    "softmax, normalized": replace(PLAIN, normalized=True),
    "sigmoid, scaled": replace(PLAIN, score="sigmoid", scale=2.5),
    "one, weighing its input": Routing(n_experts=5, n_experts_per_token=1, score="sigmoid", weighs="input"),
    "two, weighing their input": replace(PLAIN, weighs="input"),
    "all": Routing(n_experts=3, n_experts_per_token=3, normalized=True),
    "best groups": Routing(
        n_experts=12, n_experts_per_token=3, n_groups=4, n_groups_per_token=2, score="softmax", scale=3.0
    ),
    "groups by their two best": Routing(
        n_experts=12, n_experts_per_token=4, n_groups=3, n_groups_per_token=2, group_score="top2", score="sigmoid",
        normalized=True, scale=2.5,
    ),
    "many": Routing(n_experts=70, n_experts_per_token=9, normalized=True),
}  # fmt: skip


def experts(routing: Routing, hidden: int = 256, **more: object) -> ExpertsConfig:
    return ExpertsConfig(routing=routing, hidden_dim=hidden, **more)  # type: ignore[arg-type]


def model(
    *feed_forwards: FeedForwardConfig | ExpertsConfig, format: str = "F32", rest: str | None = None, **changes: object
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A layer for each. format: of what feeds forward, but for routers, which are float32; rest: of other matrices."""
    norms = changes.pop("norms", "before")
    layers = tuple(LayerConfig(attention=ATTENTION, feed_forward=f, norms=norms) for f in feed_forwards)  # type: ignore[arg-type]
    config = ModelConfig(
        family="llama", dim=256, vocab_size=VOCAB, max_context=1024, norm_eps=1e-5, layers=layers, tied_head=False,
        **changes,  # type: ignore[arg-type]
    )  # fmt: skip

    def kind(name: str) -> str:
        return "F32" if name.endswith("router") else format if "feed_forward" in name else rest or format

    return config, random_weights(config, 11, format=kind)


def opened(
    config: ModelConfig, tensors: dict[str, Tensor], *, threads: int = 2, n_blocks: int = 64,
    cache: native.PanelCache | None = None,
) -> NativeExecutor:  # fmt: skip
    return NativeExecutor(config, tensors, context=1024, n_blocks=n_blocks, threads=threads, kv="f32", cache=cache)


def agrees(config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """A prompt, and three tokens after it, are the reference's."""
    executors = [opened(config, tensors), open_executor("reference", config, tensors, context=1024, kv="f32")]
    for ids, past in ((text(40), 0), (text(3, seed=1), 40)):
        got, want = (executor.step(Batch.single(ids, past=past)) for executor in executors)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


# ---- routed experts ----


@pytest.mark.parametrize("hidden", [256, 72])  # 72: panels that are part empty
@pytest.mark.parametrize("name", ROUTINGS)
def test_every_routing_is_the_references(name: str, hidden: int) -> None:
    plain = experts(ROUTINGS[name], hidden)
    agrees(*model(plain, replace(plain, shared_hidden_dim=96, selection_bias=True, activation="gelu_tanh")))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_the_reference_of_the_same_arithmetic(format: str) -> None:
    """All but the experts is float32, so that no token goes elsewhere for the rounding before it. A float32 sum in
    another order may put an activation on the other side of an int8 step: so the bound is relative to what rounding
    does."""
    for routing in (ROUTINGS["softmax, normalized"], ROUTINGS["two, weighing their input"]):
        config, tensors = model(experts(routing), format=format, rest="F32")
        ids = Batch.single(text(60))
        reference, rounded = (
            open_executor("reference", config, tensors, context=64, kv="f32", activations=a).step(ids)
            for a in ("f32", "q8")
        )
        got = opened(config, tensors).step(ids)
        if FORMATS[format].block == 1:
            np.testing.assert_allclose(got, reference, rtol=0, atol=TOLERANCE * np.abs(reference).max())
        else:
            effect = np.sqrt(np.mean((rounded - reference) ** 2))
            assert effect > 0
            assert np.sqrt(np.mean((got - rounded) ** 2)) < 0.2 * effect


@pytest.mark.parametrize("format", ["F32", "Q4_K"])
def test_a_single_expert_is_a_plain_feed_forward_bit_for_bit(format: str) -> None:
    dense_config, dense = model(FeedForwardConfig(hidden_dim=256), format=format)
    config, tensors = model(experts(Routing(n_experts=1, n_experts_per_token=1, normalized=True)), format=format)
    for name, tensor in dense.items():
        part = name.rpartition(".")[2]
        if "feed_forward" in name and part != "norm":
            tensors[name.replace(part, f"experts.{part}")] = tensor.reshape(1, *tensor.shape)
        else:
            tensors[name] = tensor
    for n in (1, 8, 9, 100):
        got, want = (opened(*one).step(Batch.single(text(n))) for one in ((config, tensors), (dense_config, dense)))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("format", ["Q4_K", "Q6_K", "F16"])
@pytest.mark.parametrize("name", ["groups by their two best", "one, weighing its input", "many"])
def test_bits_depend_on_neither_threads_nor_chunks_nor_company(name: str, format: str) -> None:
    config, tensors = model(*[experts(ROUTINGS[name], shared_hidden_dim=256)] * 2, format=format)
    ids = text(150)
    whole = opened(config, tensors, threads=1).step(Batch.single(ids))
    for threads, cuts in ((2, [0, 1, 9, 17, 18, 150]), (3, [0, 60, 140, *range(141, 151)])):
        executor = opened(config, tensors, threads=threads)
        pieces = [executor.step(Batch.single(ids[a:b], past=a)) for a, b in pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)

    # beside others: a prompt of one of them, single tokens of all, and twelve streams at once
    executor = opened(config, tensors, n_blocks=13 * 10)
    past = [0] * 13
    others = [ids, *(text(150, seed=seed) for seed in range(1, 13))]
    got = []
    for sizes in ([100, 30], [1, 20], [1] * 2, [1] * 7, [1] * 13, [3, 5, 9], [40] + [1] * 12):
        got.append(executor.step(side_by_side(others, past, sizes))[: sizes[0]])
        past = [p + n for p, n in zip(past, sizes + [0] * (13 - len(sizes)), strict=True)]
    got = np.concatenate(got)
    np.testing.assert_array_equal(got, whole[: len(got)])


def side_by_side(texts: Sequence[NDArray[np.int32]], past: Sequence[int], sizes: Sequence[int]) -> Batch:
    """The next tokens of the first texts, each with ten blocks of its own."""
    parts = list(zip(texts, past, sizes, strict=False))
    return Batch(
        tokens=np.concatenate([ids[start : start + n] for ids, start, n in parts]),
        positions=np.concatenate([np.arange(start, start + n, dtype=np.int32) for _, start, n in parts]),
        starts=np.cumsum([0, *sizes], dtype=np.int32),
        blocks=np.arange(10 * len(sizes), dtype=np.int32).reshape(-1, 10),
        rows=np.arange(sum(sizes), dtype=np.int32),
    )


def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[str, list[NDArray[np.float32]]] = {}
    for isa in native.isas():
        monkeypatch.setenv("DAPJI_ISA", isa)
        for name in ("softmax", "groups by their two best", "one, weighing its input"):
            for format in ("Q4_K", "F16"):
                executor = opened(*model(experts(ROUTINGS[name]), format=format, logit_softcap=5.0))
                steps = [Batch.single(text(50)), Batch.single(text(2), past=50)]
                logits = np.concatenate([executor.step(step) for step in steps])
                results.setdefault(f"{name} {format}", []).append(logits)
    for first, *others in results.values():
        for other in others:
            np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("format", ["F32", "Q8_0"])
def test_experts_that_nobody_chose_are_not_read(format: str) -> None:
    """They hold NaN, which would reach every product."""
    config, tensors = model(experts(PLAIN, selection_bias=True), format=format)
    bias = np.zeros(8, dtype=np.float32)
    bias[[2, 5]] = 10.0
    tensors["layers.0.feed_forward.selection_bias"] = Tensor.from_float32("bias", bias)
    spoilt = dict(tensors)
    for part in ("gate", "up", "down"):
        name = f"layers.0.feed_forward.experts.{part}"
        data = tensors[name].data.copy().reshape(8, -1)
        data[[0, 1, 3, 4, 6, 7]] = 0xFF  # NaN as float32, and as the float16 scales of Q8_0
        shape = tensors[name].shape
        spoilt[name] = replace(tensors[name], source=data.reshape(shape[0] * shape[1], -1))
        assert np.isnan(spoilt[name].float32()[0]).any()
    for n in (1, 8, 40):
        got, want = (opened(config, one).step(Batch.single(text(n))) for one in (spoilt, tensors))
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["softmax", "sigmoid, scaled", "best groups", "groups by their two best"])
def test_of_equal_experts_the_first_are_chosen(name: str) -> None:
    """The router's rows are in threes the same; k is no multiple of three."""
    config, tensors = model(experts(replace(ROUTINGS[name], n_experts=12, n_experts_per_token=4)))
    router = tensors["layers.0.feed_forward.router"].float32()
    tensors["layers.0.feed_forward.router"] = Tensor.from_float32("router", router[np.arange(12) // 3 * 3])
    agrees(config, tensors)


def test_a_number_that_is_none_reaches_its_own_token_alone() -> None:
    """Whatever experts a router without a number chooses."""
    config, tensors = model(experts(ROUTINGS["groups by their two best"]))
    values = tensors["embed"].float32().copy()
    values[3] = np.nan
    tensors["embed"] = Tensor.from_float32("embed", values)
    for ids in ([1, 3, 2], [1, 3, 2] * 5):
        n = len(ids)
        executor = opened(config, tensors, n_blocks=10 * n)
        got = np.isnan(executor.step(side_by_side([np.array([i], dtype=np.int32) for i in ids], [0] * n, [1] * n)))
        np.testing.assert_array_equal(got.all(axis=1), np.array(ids) == 3)
        np.testing.assert_array_equal(got.any(axis=1), np.array(ids) == 3)


def test_packed_experts_are_kept_like_other_matrices() -> None:
    class Kept:
        """A cache in memory."""

        def __init__(self) -> None:
            self.names: list[str] = []
            self.packed: NDArray[np.uint8] | None = None

        def read(self, matrices: Sequence[Tensor], n_bytes: int) -> NDArray[np.uint8] | None:
            assert self.packed is None or (self.names, len(self.packed)) == ([m.name for m in matrices], n_bytes)
            return self.packed

        def keep(self, matrices: Sequence[Tensor], packed: NDArray[np.uint8]) -> None:
            self.names, self.packed = [matrix.name for matrix in matrices], packed

        def close(self) -> None:
            pass

    config, tensors = model(experts(PLAIN))
    cache = Kept()
    first, second = (opened(config, tensors, cache=cache).step(Batch.single(text(20))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert len(set(cache.names)) == len(cache.names) == 2 + 4 + 1 + 3 * 8


def test_layers_may_route_differently() -> None:
    agrees(*model(*(experts(ROUTINGS[name]) for name in ("many", "one, weighing its input", "best groups"))))


# ---- outside experts ----


@pytest.mark.parametrize("norms", ["before", "after", "both"])
def test_norms_scales_and_caps_are_the_references(norms: str) -> None:
    feed_forward = FeedForwardConfig(hidden_dim=160, activation="gelu_tanh")
    config, tensors = model(*[feed_forward] * 2, norms=norms, norm_offset=1.0, embed_scale=7.5, logit_softcap=1.5)
    agrees(config, tensors)
    for one in (
        replace(config, norm_offset=0.0), replace(config, embed_scale=1.0), replace(config, logit_softcap=None),
    ):  # fmt: skip
        got, other = (opened(c, tensors).step(Batch.single(text(20))) for c in (config, one))
        assert np.abs(got - other).max() > 0.05


def test_the_cap_is_of_the_rows_that_are_asked_for() -> None:
    config, tensors = model(FeedForwardConfig(hidden_dim=64), logit_softcap=2.0)
    batch = Batch.single(text(20))
    whole = opened(config, tensors, threads=3).step(batch)
    some = opened(config, tensors, threads=3).step(replace(batch, rows=np.array([3, 19], dtype=np.int32)))
    np.testing.assert_array_equal(some, whole[[3, 19]])


def test_the_program_is_a_few_fused_operations() -> None:
    config, tensors = model(experts(PLAIN, shared_hidden_dim=256), format="Q4_K", logit_softcap=5.0)
    assert opened(config, tensors)._program.describe()[4:] == [
        "norm",
        "linear F32 8x256 Q4_K 256x256 Q4_K 256x256 (gated)",
        "linear Q4_K 256x256 (added)",
        "experts, 2 of 8 for a token: Q4_K 256x256 Q4_K 256x256 (gated) Q4_K 256x256 (added)",
        "norm of hidden rows",
        "select rows",
        "norm, linear Q4_K 80x256",
        "softcap of the logits",
    ]
    config, tensors = model(FeedForwardConfig(hidden_dim=64), norms="both", embed_scale=2.0)
    assert opened(config, tensors)._program.describe() == [
        "embed F32 80x256, scaled",
        "norm, linear F32 256x256 F32 64x256 F32 64x256",
        "attention of layer 0, 8 heads over 2 of 32",
        "linear F32 256x256",
        "norm (added)",
        "norm, linear F32 64x256 F32 64x256 (gated)",
        "linear F32 256x64",
        "norm (added)",
        "norm of hidden rows",
        "select rows",
        "norm, linear F32 80x256",
    ]
