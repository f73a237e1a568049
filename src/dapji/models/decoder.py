"""THE decoder: the computation of every model, stated once over `Ops`.

It reads mechanisms from the configuration and never a model's name. The same text computes on numpy, differentiates on
torch and records the native program. Knows no executor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from dapji.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from dapji.ops.protocol import Ops

V = TypeVar("V")
W = TypeVar("W")


def decode(config: ModelConfig, weights: Mapping[str, W], ops: Ops[V, W]) -> V:
    """Logits [R, V] float32 of the batch's rows. `weights` has the names of `weight_shapes(config)`."""
    x = ops.embed(weights["embed"])  # [T, D]
    for i, layer in enumerate(config.layers):
        attended = _attention(layer.attention, i, config.norm_eps, weights, ops, x)
        x = ops.add(x, attended)
        x = ops.add(x, _feed_forward(layer.feed_forward, i, config.norm_eps, weights, ops, x))
    x = ops.norm(ops.select_rows(x), weights["norm"], config.norm_eps)  # [R, D]
    return ops.linear(x, weights["embed" if config.tied_head else "head"])


def _attention(attention: AttentionConfig, layer: int, eps: float, weights: Mapping[str, W], ops: Ops[V, W], x: V) -> V:
    name = f"layers.{layer}.attention"
    x = ops.norm(x, weights[f"{name}.norm"], eps)
    q = ops.linear(x, weights[f"{name}.q"], weights.get(f"{name}.q_bias"))  # [T, H*Dh]
    k = ops.linear(x, weights[f"{name}.k"], weights.get(f"{name}.k_bias"))  # [T, K*Dh]
    v = ops.linear(x, weights[f"{name}.v"], weights.get(f"{name}.v_bias"))  # [T, K*Dh]
    if attention.rope is not None:
        table = ops.tables[attention.rope]
        q = ops.rope(q, table, attention.head_dim)
        k = ops.rope(k, table, attention.head_dim)
    mixed = ops.attention(
        q,
        k,
        v,
        layer=layer,
        n_heads=attention.n_heads,
        n_kv_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        window=attention.window,
        scale=attention.head_dim**-0.5,
    )  # [T, H*Dh]
    return ops.linear(mixed, weights[f"{name}.o"], weights.get(f"{name}.o_bias"))


def _feed_forward(
    feed_forward: FeedForwardConfig, layer: int, eps: float, weights: Mapping[str, W], ops: Ops[V, W], x: V
) -> V:
    name = f"layers.{layer}.feed_forward"
    x = ops.norm(x, weights[f"{name}.norm"], eps)
    gate = ops.linear(x, weights[f"{name}.gate"], weights.get(f"{name}.gate_bias"))  # [T, F]
    up = ops.linear(x, weights[f"{name}.up"], weights.get(f"{name}.up_bias"))  # [T, F]
    hidden = ops.gated(gate, up, feed_forward.activation)
    return ops.linear(hidden, weights[f"{name}.down"], weights.get(f"{name}.down_bias"))
