"""THE decoder: the computation of every model, stated once over `Ops`.

It reads mechanisms from the configuration and never a model's name. The same text computes on numpy, differentiates on
torch and records the native program. Knows no executor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from dapji.models.config import (
    AttentionConfig,
    ExpertsConfig,
    LatentAttentionConfig,
    LayerConfig,
    ModelConfig,
)
from dapji.ops.attention import Attention, LatentAttention
from dapji.ops.protocol import Activation, Ops

V = TypeVar("V")
W = TypeVar("W")


@dataclass(frozen=True)
class Decoded(Generic[V]):
    """Of the batch's rows, both float32."""

    hidden: V
    """[N, D]: the final norm's output, of the batch's `hidden_rows`."""
    logits: V
    """[R, V]: of its `rows`."""


def decode(config: ModelConfig, weights: Mapping[str, W], ops: Ops[V, W]) -> Decoded[V]:
    """`weights` has the names of `weight_shapes(config)`."""
    x = _stream(config, weights, ops, _directly)
    hidden = _normed(config, weights, ops, ops.select_hidden(x))
    logits = ops.linear(_normed(config, weights, ops, ops.select_rows(x)), weights[head_name(config)])
    if config.logit_softcap is not None:
        logits = ops.softcap(logits, config.logit_softcap)
    return Decoded(hidden, logits)


Run = Callable[[int, Callable[[V], V], V], V]
"""run(index, layer, x) gives layer(x)."""


def hidden_states(config: ModelConfig, weights: Mapping[str, W], ops: Ops[V, W], run: Run[V]) -> V:
    """The `hidden` of `decode` alone: what the head takes.

    run: for who frees a layer's activations and computes them again, or gathers its weights from elsewhere meanwhile;
    they are read while the layer runs.
    """
    return _normed(config, weights, ops, ops.select_hidden(_stream(config, weights, ops, run)))


def head_name(config: ModelConfig) -> str:
    """Of the weight that makes logits of hidden states."""
    return "embed" if config.tied_head else "head"


def _directly(index: int, layer: Callable[[V], V], x: V) -> V:
    return layer(x)


def _stream(config: ModelConfig, weights: Mapping[str, W], ops: Ops[V, W], run: Run[V]) -> V:
    """The residual stream after the last layer, [T, D]."""
    x = ops.embed(weights["embed"], config.embed_scale)  # [T, D]
    for i, layer in enumerate(config.layers):
        x = run(i, _Layer(config, layer, i, weights, ops).run, x)
    return x


def _normed(config: ModelConfig, weights: Mapping[str, W], ops: Ops[V, W], x: V) -> V:
    return ops.norm(x, weights["norm"], config.norm_eps, config.norm_offset)


@dataclass(frozen=True)
class _Layer(Generic[V, W]):
    config: ModelConfig
    layer: LayerConfig
    index: int
    weights: Mapping[str, W]
    ops: Ops[V, W]

    def run(self, x: V) -> V:
        """The residual stream [T, D], one layer further."""
        attended = self._before("attention", x)
        if isinstance(self.layer.attention, LatentAttentionConfig):
            attended = self._latent_attention(self.layer.attention, attended)
        else:
            attended = self._attention(self.layer.attention, attended)
        x = self.ops.add(x, self._after("attention", attended))
        taken = self._before("feed_forward", x)
        if isinstance(self.layer.feed_forward, ExpertsConfig):
            return self._experts(self.layer.feed_forward, x, taken)
        given = self._gated("feed_forward", self.layer.feed_forward.activation, taken)
        return self.ops.add(x, self._after("feed_forward", given))

    def _before(self, part: str, x: V) -> V:
        return x if self.layer.norms == "after" else self._norm(x, f"{part}.norm")

    def _after(self, part: str, x: V) -> V:
        return x if self.layer.norms == "before" else self._norm(x, f"{part}.post_norm")

    def _attention(self, attention: AttentionConfig, x: V) -> V:
        head_dim = attention.head_dim
        q = self._linear(x, "attention.q")  # [T, H*Dh]
        k = self._linear(x, "attention.k")  # [T, K*Dh]
        v = self._linear(x, "attention.v")  # [T, K*Dh]
        if attention.qk_norm is not None:
            eps, offset = self.config.norm_eps, self.config.norm_offset
            q = self.ops.norm_heads(q, self._optional("attention.q_norm"), eps, offset, head_dim)
            k = self.ops.norm_heads(k, self._optional("attention.k_norm"), eps, offset, head_dim)
        if attention.rope is not None:
            table = self.ops.tables[attention.rope]
            q = self.ops.rope(q, table, head_dim)
            k = self.ops.rope(k, table, head_dim)
        asked = Attention(
            n_heads=attention.n_heads,
            n_kv_heads=attention.n_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5 if attention.scale is None else attention.scale,
            window=attention.window,
            chunk=attention.chunk,
            softcap=attention.softcap,
            temperature=attention.temperature,
        )
        mixed = self.ops.attention(q, k, v, layer=self.index, attention=asked)  # [T, H*Dh]
        return self._linear(mixed, "attention.o")

    def _latent_attention(self, attention: LatentAttentionConfig, x: V) -> V:
        query = x if attention.query_dim is None else self._linear(x, "attention.q_down")
        latent = self._linear(x, "attention.kv_down")  # [T, latent_dim]
        k_rope = self._linear(x, "attention.k_rope")  # [T, rope_dim]
        if attention.query_dim is not None:
            query = self._norm(query, "attention.q_down_norm", attention.norm_eps)
        q_nope = self._linear(query, "attention.q_nope")  # [T, H*nope_dim]
        q_rope = self._linear(query, "attention.q_rope")  # [T, H*rope_dim]
        table, rope_dim = self.ops.tables[attention.rope], attention.rope.dim
        mixed = self.ops.latent_attention(
            q_nope,
            self.ops.rope(q_rope, table, rope_dim),
            self._norm(latent, "attention.kv_down_norm", attention.norm_eps),
            self.ops.rope(k_rope, table, rope_dim),
            self._weight("attention.k_up"),
            self._weight("attention.v_up"),
            layer=self.index,
            attention=LatentAttention(
                n_heads=attention.n_heads,
                latent_dim=attention.latent_dim,
                nope_dim=attention.nope_dim,
                rope_dim=rope_dim,
                value_dim=attention.value_dim,
                scale=attention.scale,
            ),
        )  # [T, H*value_dim]
        return self._linear(mixed, "attention.o")

    def _experts(self, experts: ExpertsConfig, x: V, taken: V) -> V:
        """x: the residual stream. taken: what the experts take, normed."""
        logits = self._linear(taken, "feed_forward.router")  # [T, E]
        if experts.shared_hidden_dim:
            x = self.ops.add(x, self._gated("feed_forward.shared", experts.activation, taken))
        given = self.ops.experts(
            taken,
            logits,
            self._optional("feed_forward.selection_bias"),
            self._weight("feed_forward.experts.gate"),
            self._weight("feed_forward.experts.up"),
            self._weight("feed_forward.experts.down"),
            routing=experts.routing,
            activation=experts.activation,
        )
        return self.ops.add(x, given)

    def _gated(self, name: str, activation: Activation, x: V) -> V:
        gate = self._linear(x, f"{name}.gate")  # [T, F]
        up = self._linear(x, f"{name}.up")  # [T, F]
        return self._linear(self.ops.gated(gate, up, activation), f"{name}.down")

    def _linear(self, x: V, name: str) -> V:
        return self.ops.linear(x, self._weight(name), self._optional(f"{name}_bias"))

    def _norm(self, x: V, name: str, eps: float | None = None) -> V:
        eps = self.config.norm_eps if eps is None else eps
        return self.ops.norm(x, self._weight(name), eps, self.config.norm_offset)

    def _weight(self, name: str) -> W:
        return self.weights[f"layers.{self.index}.{name}"]

    def _optional(self, name: str) -> W | None:
        return self.weights.get(f"layers.{self.index}.{name}")
