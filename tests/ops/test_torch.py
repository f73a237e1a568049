"""The ops in torch against the numpy reference, op by op, and its cache bit by bit; on a GPU too where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from dapji.ops.attention import Attention, KvShape, LatentAttention, Temperature
from dapji.ops.batch import KV_BLOCK, Batch
from dapji.ops.protocol import Activation
from dapji.ops.reference import KvFormat, ReferenceCache, ReferenceOps, ReferenceWeight
from dapji.ops.rope import RopeConfig, RopeTables
from dapji.ops.routing import Routing
from dapji.ops.routing import route as reference_route
from dapji.ops.torch import CachedTorchOps, TorchCache, TorchOps, TorchTables, UncachedTorchOps, route

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 40
KV_SHAPE = KvShape(n_kv_heads=KV_HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM)
CONTEXT = 128
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


LATENT = LatentAttention(n_heads=HEADS, latent_dim=40, nope_dim=24, rope_dim=16, value_dim=20, scale=0.1)
LATENT_SHAPE = KvShape(n_kv_heads=1, key_dim=40 + 16, value_dim=0)

MECHANISMS = [
    pytest.param(mechanisms, id=" ".join(f"{key}-{value}" for key, value in mechanisms.items()) or "plain")
    for mechanisms in (
        {},
        *({"window": window} for window in (1, 6, 19, 100)),
        *({"chunk": chunk} for chunk in (1, 7, 22, 100)),
        {"window": 6, "chunk": 8},
        {"softcap": 0.5},
        {"softcap": 0.5, "window": 6},
    )
] + [pytest.param({"temperature": Temperature(scale=0.3, length=7), "chunk": 8}, id="temperature")]


def asked(**mechanisms: Any) -> Attention:
    return Attention(n_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=HEAD_DIM, scale=0.2, **mechanisms)


def held(values: np.ndarray) -> ReferenceWeight:
    return ReferenceWeight(values=values, quantized=False)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def two_sequences() -> Batch:
    """A chunk of 5 tokens after 20, and one of 18 from the start, in scattered blocks; some rows are wanted."""
    return Batch(
        tokens=np.arange(23, dtype=np.int32),
        positions=np.array([*range(20, 25), *range(18)], dtype=np.int32),
        starts=np.array([0, 5, 23], dtype=np.int32),
        blocks=np.array([[4, 1], [5, 0]], dtype=np.int32),
        rows=np.array([4, 5, 22], dtype=np.int32),
    )


def single_tokens(positions: list[int], blocks: list[list[int]]) -> Batch:
    return Batch(
        tokens=np.arange(len(positions), dtype=np.int32),
        positions=np.array(positions, dtype=np.int32),
        starts=np.arange(len(positions) + 1, dtype=np.int32),
        blocks=np.array(blocks, dtype=np.int32),
        rows=np.arange(len(positions), dtype=np.int32),
    )


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
    autouse=True,
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the tensors of every test lie."""
    with torch.device(request.param) as device:
        yield device


def both(
    batch: Batch, device: torch.device, kv: KvFormat = "f32", shape: KvShape = KV_SHAPE
) -> tuple[ReferenceOps, CachedTorchOps]:
    """Over caches that hold the same 20 tokens in blocks 4 and 1."""
    reference = ReferenceCache([shape], 6, kv)
    cache = TorchCache([shape], 6, kv, device)
    k = random(20, shape.n_kv_heads * shape.key_dim, seed=8)
    v = random(20, shape.n_kv_heads * shape.value_dim, seed=9) if shape.value_dim else None
    slots = np.array([*range(4 * KV_BLOCK, 5 * KV_BLOCK), *range(KV_BLOCK, KV_BLOCK + 4)])
    reference.write(0, slots, k, v)
    cache.keys[0].write(torch.tensor(slots), torch.tensor(k))
    if v is not None:
        cache.values[0].write(torch.tensor(slots), torch.tensor(v))
    return (
        ReferenceOps(batch=batch, cache=reference, tables=RopeTables(CONTEXT), activations="f32"),
        CachedTorchOps(batch, cache, TorchTables(CONTEXT, device), device),
    )


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("mechanisms", MECHANISMS)
def test_attention_over_the_cache(device: torch.device, kv: KvFormat, mechanisms: dict[str, Any]) -> None:
    reference, ops = both(two_sequences(), device, kv)
    q, k, v = (random(23, n * HEAD_DIM, seed=n) for n in (HEADS, KV_HEADS, 1 + KV_HEADS))
    v = v[:, : KV_HEADS * HEAD_DIM]
    want = reference.attention(q, k, v, layer=0, attention=asked(**mechanisms))
    got = ops.attention(*map(torch.tensor, (q, k, v)), layer=0, attention=asked(**mechanisms))
    np.testing.assert_allclose(got.cpu(), want, **CLOSE)


@pytest.mark.parametrize("mechanisms", MECHANISMS)
def test_ops_of_a_given_length_take_another_batch(device: torch.device, mechanisms: dict[str, Any]) -> None:
    """Single tokens after 20 and after 3, attended to as if there were 40; in the tensors of another batch."""
    batch = single_tokens([20, 3], [[4, 1], [5, -1]])
    reference, other = both(batch, device)
    ops, fixed = (
        CachedTorchOps(each, other._cache, other.tables, device, length=40)
        for each in (single_tokens([7, 33], [[0, -1, -1], [2, 3, 5]]), batch)
    )
    ops.take(fixed)
    q, k, v = (random(2, n * HEAD_DIM, seed=s) for n, s in ((HEADS, 1), (KV_HEADS, 2), (KV_HEADS, 3)))
    want = reference.attention(q, k, v, layer=0, attention=asked(**mechanisms))
    for each in (other, fixed, ops):
        got = each.attention(*map(torch.tensor, (q, k, v)), layer=0, attention=asked(**mechanisms))
        np.testing.assert_allclose(got.cpu(), want, **CLOSE)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_the_cache_rounds_as_the_reference_does(device: torch.device, kv: KvFormat) -> None:
    """Bit for bit, with a block of zeros and halves between two codes among the values."""
    x = random(9, KV_HEADS * HEAD_DIM)
    x[0] = 0
    x[1, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    slots = np.random.default_rng(1).permutation(2 * KV_BLOCK)[:9]
    reference = ReferenceCache([KV_SHAPE], 3, kv)
    reference.write(0, slots, x, x)
    cache = TorchCache([KV_SHAPE], 3, kv, device)
    cache.keys[0].write(torch.tensor(slots), torch.tensor(x))
    reference.copy_block(0, 2)
    cache.copy_block(0, 2)
    rows = cache.keys[0].read(torch.arange(3 * KV_BLOCK)[None], torch.float32)
    np.testing.assert_array_equal(rows[0].transpose(0, 1).cpu(), reference.keys[0])


def test_embed_norm_linear_and_rows(device: torch.device) -> None:
    reference, ops = both(two_sequences(), device)
    table, scale, w, b = random(30, 48), random(48, seed=1), random(64, 48, seed=2), random(64, seed=3)

    x = reference.embed(held(table), 1.5)
    np.testing.assert_array_equal(ops.embed(torch.tensor(table), 1.5).cpu(), x)
    for offset in (0.0, 1.0):
        normed = reference.norm(x, held(scale), 1e-5, offset)
        np.testing.assert_allclose(ops.norm(torch.tensor(x), torch.tensor(scale), 1e-5, offset).cpu(), normed, **CLOSE)
        for ones in (False, True):
            of_heads = reference.norm_heads(x, None if ones else held(scale[:16]), 1e-5, offset, 16)
            got = ops.norm_heads(torch.tensor(x), None if ones else torch.tensor(scale[:16]), 1e-5, offset, 16)
            np.testing.assert_allclose(got.cpu(), of_heads, **CLOSE)
    np.testing.assert_allclose(ops.softcap(torch.tensor(x), 0.7).cpu(), reference.softcap(x, 0.7), **CLOSE)
    y = reference.linear(x, held(w), held(b))
    product = ops.linear(torch.tensor(x), torch.tensor(w), torch.tensor(b))
    np.testing.assert_allclose(product.cpu(), y, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(ops.select_rows(torch.tensor(x)).cpu(), reference.select_rows(x))
    np.testing.assert_array_equal(ops.add(torch.tensor(x), torch.tensor(x)).cpu(), reference.add(x, x))


@pytest.mark.parametrize("dim", [HEAD_DIM, 16])
def test_rope(device: torch.device, dim: int) -> None:
    reference, ops = both(two_sequences(), device)
    rope = RopeConfig(theta=1e4, dim=dim)
    x = random(23, HEADS * HEAD_DIM)
    want = reference.rope(x, reference.tables[rope], HEAD_DIM)
    np.testing.assert_allclose(ops.rope(torch.tensor(x), ops.tables[rope], HEAD_DIM).cpu(), want, **CLOSE)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(device: torch.device, activation: Activation) -> None:
    reference, ops = both(two_sequences(), device)
    gate, up = random(23, 64) * 4, random(23, 64, seed=1)
    want = reference.gated(gate, up, activation)
    np.testing.assert_allclose(ops.gated(torch.tensor(gate), torch.tensor(up), activation).cpu(), want, **CLOSE)


@pytest.mark.parametrize("mechanisms", MECHANISMS)
def test_attention_without_a_cache_is_attention_with_one(device: torch.device, mechanisms: dict[str, Any]) -> None:
    """Two sequences of 20 tokens, each against the reference alone."""
    q, k, v = (random(40, n * HEAD_DIM, seed=s) for n, s in ((HEADS, 1), (KV_HEADS, 2), (KV_HEADS, 3)))
    ops = UncachedTorchOps(torch.arange(40), [20, 20], TorchTables(CONTEXT, device))
    got = ops.attention(*map(torch.tensor, (q, k, v)), layer=0, attention=asked(**mechanisms))
    for part in (slice(0, 20), slice(20, 40)):
        reference, _ = both(Batch.single(list(range(20))), device)
        want = reference.attention(q[part], k[part], v[part], layer=0, attention=asked(**mechanisms))
        np.testing.assert_allclose(got[part].cpu(), want, **CLOSE)


def latent_input(n_tokens: int) -> tuple[np.ndarray, ...]:
    """q_nope, q_rope, latent, k_rope, k_up, v_up."""
    sizes = (HEADS * LATENT.nope_dim, HEADS * LATENT.rope_dim, LATENT.latent_dim, LATENT.rope_dim)
    k_up = random(HEADS, LATENT.latent_dim, LATENT.nope_dim, seed=4) / 4
    v_up = random(HEADS, LATENT.value_dim, LATENT.latent_dim, seed=5) / 4
    return *(random(n_tokens, size, seed=seed) for seed, size in enumerate(sizes)), k_up, v_up


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("length", [None, 48])
def test_absorbed_latent_attention_is_naive_over_the_cache(
    device: torch.device, kv: KvFormat, length: int | None
) -> None:
    """The reference is naive. With a given length too, as what is recorded has."""
    batch = two_sequences() if length is None else single_tokens([20, 3], [[4, 1], [5, -1]])
    reference, ops = both(batch, device, kv, LATENT_SHAPE)
    if length is not None:
        ops = CachedTorchOps(batch, ops._cache, ops.tables, device, length=length)
    x = latent_input(len(batch.tokens))
    want = reference.latent_attention(*x[:4], *map(held, x[4:]), layer=0, attention=LATENT)
    got = ops.latent_attention(*map(torch.tensor, x), layer=0, attention=LATENT)
    np.testing.assert_allclose(got.cpu(), want, rtol=1e-5, atol=1e-5)  # sums over twice as many dimensions
    assert ops._cache.values[0].read(torch.arange(16)[None], torch.float32).numel() == 0


def test_latent_attention_without_a_cache_is_that_with_one(device: torch.device) -> None:
    """Two sequences of 20 tokens, naive here and absorbed there."""
    x = latent_input(40)
    ops = UncachedTorchOps(torch.arange(40), [20, 20], TorchTables(CONTEXT, device))
    got = ops.latent_attention(*map(torch.tensor, x), layer=0, attention=LATENT)
    for part in (slice(0, 20), slice(20, 40)):
        reference, cached = both(Batch.single(list(range(20))), device, shape=LATENT_SHAPE)
        rows, ups = [each[part] for each in x[:4]], x[4:]
        want = reference.latent_attention(*rows, *map(held, ups), layer=0, attention=LATENT)
        absorbed = cached.latent_attention(*map(torch.tensor, (*rows, *ups)), layer=0, attention=LATENT)
        np.testing.assert_allclose(got[part].cpu(), want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(absorbed.cpu(), want, rtol=1e-5, atol=1e-5)


def test_gradients_of_latent_attention(device: torch.device) -> None:
    """Against the formula of one head after another, in float64."""
    inputs = [torch.tensor(x, requires_grad=True) for x in latent_input(20)]
    ops = UncachedTorchOps(torch.arange(20), [20], TorchTables(CONTEXT, device))
    direction = torch.tensor(random(20, HEADS * LATENT.value_dim, seed=7))
    (ops.latent_attention(*inputs, layer=0, attention=LATENT) * direction).sum().backward()

    plain = [x.detach().double().requires_grad_() for x in inputs]
    q_nope, q_rope, latent, k_rope, k_up, v_up = plain
    seen = torch.ones(20, 20).tril().bool()
    heads = []
    for h in range(HEADS):
        nope = q_nope[:, h * LATENT.nope_dim : (h + 1) * LATENT.nope_dim] @ (latent @ k_up[h]).T
        rotated = q_rope[:, h * LATENT.rope_dim : (h + 1) * LATENT.rope_dim] @ k_rope.T
        scores = ((nope + rotated) * LATENT.scale).masked_fill(~seen, -torch.inf)
        heads.append(scores.softmax(dim=-1) @ latent @ v_up[h].T)
    (torch.cat(heads, dim=-1) * direction).sum().backward()
    for got, want in zip(inputs, plain, strict=True):
        torch.testing.assert_close(got.grad, want.grad.float(), rtol=1e-4, atol=1e-5)


ROUTINGS = {
    "softmax": Routing(n_experts=8, n_experts_per_token=2),
    "normalized": Routing(n_experts=8, n_experts_per_token=3, normalized=True),
    "one": Routing(n_experts=8, n_experts_per_token=1, score="sigmoid", weighs="input"),
    "groups": Routing(
        n_experts=12, n_experts_per_token=4, n_groups=4, n_groups_per_token=2, group_score="max", scale=3.0
    ),
    "groups-top2": Routing(
        n_experts=16,
        n_experts_per_token=3,
        score="sigmoid",
        n_groups=4,
        n_groups_per_token=2,
        group_score="top2",
        normalized=True,
        scale=2.5,
    ),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_routing(device: torch.device, routing: Routing, biased: bool, ties: bool) -> None:
    """Of equal experts the first is chosen, as in the reference."""
    logits, bias = random(200, routing.n_experts) * 2, random(routing.n_experts, seed=1) if biased else None
    if ties:
        logits = np.round(logits)
        bias = None if bias is None else np.round(bias)
    want = reference_route(logits, bias, routing)
    experts, weights = route(torch.tensor(logits), None if bias is None else torch.tensor(bias), routing)
    np.testing.assert_array_equal(experts.cpu(), want[0])
    np.testing.assert_allclose(weights.cpu(), want[1], **CLOSE)


def expert_input(n_tokens: int, routing: Routing) -> tuple[np.ndarray, ...]:
    """x, logits, selection_bias, gate, up, down."""
    n, hidden, dim = routing.n_experts, 24, 16
    matrices = (random(n, hidden, dim, seed=3), random(n, hidden, dim, seed=4), random(n, dim, hidden, seed=5) / 4)
    return random(n_tokens, dim), random(n_tokens, n, seed=1), random(n, seed=2), *matrices


def recordable(n_tokens: int, device: torch.device) -> CachedTorchOps:
    """As it is recorded for so many sequences with a token each."""
    batch = single_tokens([3] * n_tokens, [[i] for i in range(n_tokens)])
    cache = TorchCache([KV_SHAPE], n_tokens, "f32", device)
    return CachedTorchOps(batch, cache, TorchTables(CONTEXT, device), device, length=16)


@pytest.mark.parametrize("n_tokens", [1, 2, 23])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_experts(device: torch.device, routing: Routing, n_tokens: int) -> None:
    """One by one, and by the same operations whatever is chosen: gathered for a row or two, all of them for many."""
    x, logits, bias, *matrices = expert_input(n_tokens, routing)
    reference, cached = both(two_sequences(), device)
    how: dict[str, Any] = {"routing": routing, "activation": "gelu"}
    want = reference.experts(x, logits, held(bias), *map(held, matrices), **how)
    for ops in (cached, recordable(n_tokens, device)):
        got = ops.experts(*map(torch.tensor, (x, logits, bias, *matrices)), **how)
        np.testing.assert_allclose(got.cpu(), want, rtol=1e-5, atol=2e-5)  # of magnitude 20


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_gradients_of_experts(device: torch.device, routing: Routing, fixed: bool) -> None:
    """Of everything but the selection bias, through the weights too: against one token after another in float64."""
    x, logits, bias, *matrices = (torch.tensor(values) for values in expert_input(23, routing))
    inputs = [x, logits, *matrices]
    ops: TorchOps = recordable(23, device) if fixed else both(two_sequences(), device)[1]
    direction = torch.tensor(random(*x.shape, seed=7))
    for each in inputs:
        each.requires_grad_()
    given = ops.experts(x, logits, bias, *matrices, routing=routing, activation="silu")
    (given * direction).sum().backward()

    chosen, _ = reference_route(logits.detach().cpu().numpy(), bias.cpu().numpy(), routing)
    plain = [each.detach().double().requires_grad_() for each in inputs]
    x, logits, gate, up, down = plain
    total = torch.zeros((), dtype=torch.float64)
    for token, experts in enumerate(chosen):
        scores = logits[token].sigmoid() if routing.score == "sigmoid" else logits[token].softmax(dim=0)
        weights = [scores[expert] * routing.scale for expert in experts]
        if routing.normalized:
            weights = [weight / sum(weights) * routing.scale for weight in weights]
        for expert, weight in zip(experts, weights, strict=True):
            taken = x[token] * weight if routing.weighs == "input" else x[token]
            out = down[expert] @ (torch.nn.functional.silu(gate[expert] @ taken) * (up[expert] @ taken))
            total = total + ((out if routing.weighs == "input" else out * weight) * direction[token]).sum()
    total.backward()
    for got, want in zip(inputs, plain, strict=True):
        torch.testing.assert_close(got.grad, want.grad.float(), rtol=1e-4, atol=1e-4)  # of magnitude 30


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_what_is_recorded_depends_on_no_value(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph must not read values, nor have shapes that depend on them: tensors without values would raise. Nor
    may it copy from the host: tables are there after the first run, which is not recorded."""
    routing, cpu = ROUTINGS["groups-top2"], torch.device("cpu")
    batch = single_tokens([3] * n_tokens, [[i] for i in range(n_tokens)])
    tables = TorchTables(CONTEXT, cpu)
    with FakeTensorMode():
        cache = TorchCache([KV_SHAPE, LATENT_SHAPE], n_tokens, "q8", cpu)
        first, recorded = (CachedTorchOps(batch, cache, tables, cpu, length=16) for _ in range(2))
        whole = CachedTorchOps(batch, cache, tables, cpu)
        q, k = torch.empty(n_tokens, HEADS * HEAD_DIM), torch.empty(n_tokens, KV_HEADS * HEAD_DIM)
        latent = [torch.empty(x.shape) for x in latent_input(n_tokens)]
        experts = [torch.empty(x.shape) for x in expert_input(n_tokens, routing)]
        for ops in (first, recorded):
            turned = ops.rope(q, ops.tables[RopeConfig(theta=1e4, dim=16)], HEAD_DIM)
            for mechanisms in (each.values[0] for each in MECHANISMS):
                ops.attention(turned, k, k, layer=0, attention=asked(**mechanisms))
            ops.latent_attention(*latent, layer=1, attention=LATENT)
            ops.experts(*experts, routing=routing, activation="silu")
            monkeypatch.delattr(torch, "tensor", raising=False)
        with pytest.raises(DynamicOutputShapeException):  # so that this test can fail
            whole.experts(*experts, routing=routing, activation="silu")


def test_bfloat16_routes_in_float32(device: torch.device) -> None:
    """Two logits that bfloat16 tells apart have sigmoids that it does not, and a bias more digits than it has."""
    routing = Routing(n_experts=2, n_experts_per_token=1, score="sigmoid")
    logits = torch.tensor([[5.0, 5.03125]], dtype=torch.bfloat16)
    assert logits.sigmoid()[0, 0] == logits.sigmoid()[0, 1]
    experts, weights = route(logits, None, routing)
    assert experts.item() == 1
    assert weights.dtype == torch.float32
    experts, _ = route(logits, torch.tensor([10.001, 10.0]), routing)
    assert experts.item() == 0


def test_bfloat16_stays_bfloat16_with_norms_and_angles_in_float32(device: torch.device) -> None:
    reference, ops = both(two_sequences(), device)
    x = torch.tensor(random(23, HEADS * HEAD_DIM)).bfloat16()
    rope = RopeConfig(theta=1e4, dim=HEAD_DIM)
    rotated = ops.rope(x, ops.tables[rope], HEAD_DIM)
    assert rotated.dtype == torch.bfloat16
    exact = torch.tensor(reference.rope(x.float().cpu().numpy(), reference.tables[rope], HEAD_DIM))
    assert ((rotated.float() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()  # one rounding, at the end
    ones = torch.ones(HEADS * HEAD_DIM, dtype=torch.bfloat16)
    normed = ops.norm(x, ones, 1e-5, 0.0)
    exact = torch.tensor(
        reference.norm(
            x.float().cpu().numpy(), ReferenceWeight(values=ones.float().cpu().numpy(), quantized=False), 1e-5, 0.0
        )
    )
    assert normed.dtype == torch.bfloat16
    assert ((normed.float() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()
