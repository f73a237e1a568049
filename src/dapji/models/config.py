"""`ModelConfig`: what a decoder is made of. Fields name mechanisms, never models; sizes are checked on creation.

Knows neither config.json nor GGUF (`families` translates those) and no executor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dapji.errors import ConfigError
from dapji.ops.attention import Temperature
from dapji.ops.protocol import Activation
from dapji.ops.rope import RopeConfig
from dapji.ops.routing import Routing

Shape = tuple[int, ...]

Pooling = Literal["mean", "last"]
"""How a text's hidden states become one vector: their mean, or the last one."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention: n_heads query heads share n_kv_heads key/value heads."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None: all."""
    chunk: int | None = None
    """A token sees only those of its own chunk of so many tokens, from position 0 on; None: all."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["weighted", "plain"] | None = None
    """Each head of q and of k is normed before it is rotated, with a weight or without."""
    scale: float | None = None
    """Of scores; None: 1 / sqrt(head_dim)."""
    softcap: float | None = None
    """Scores s become softcap tanh(s / softcap)."""
    temperature: Temperature | None = None

    def __post_init__(self) -> None:
        _positive(n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.n_kv_heads})")
        if self.rope is not None and self.rope.dim > self.head_dim:
            raise ConfigError(f"rope.dim ({self.rope.dim}) must be at most head_dim ({self.head_dim})")
        _positive_if_given(window=self.window, chunk=self.chunk, scale=self.scale, softcap=self.softcap)


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention: the heads' keys and values are made of one latent vector per token."""

    n_heads: int
    query_dim: int | None
    """Of the latent vector that queries are made of; None: they are made of the input itself."""
    latent_dim: int
    nope_dim: int
    """Of each head's query and key that is not rotated."""
    value_dim: int
    rope: RopeConfig
    """Of the rest of each query, and of the one rotated key."""
    scale: float
    """Of scores."""
    norm_eps: float
    """Of the norms of the two latent vectors."""

    def __post_init__(self) -> None:
        _positive(
            n_heads=self.n_heads, latent_dim=self.latent_dim, nope_dim=self.nope_dim, value_dim=self.value_dim,
            scale=self.scale,
        )  # fmt: skip
        _positive_if_given(query_dim=self.query_dim)


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """down(activation(gate(x)) * up(x))."""

    hidden_dim: int
    activation: Activation = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        _positive(hidden_dim=self.hidden_dim)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Many small feed-forwards, of which a router chooses a few for each token, and one that every token takes."""

    routing: Routing
    hidden_dim: int
    """Of each expert."""
    shared_hidden_dim: int = 0
    """Of the one for all tokens; 0: there is none."""
    selection_bias: bool = False
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        _positive(hidden_dim=self.hidden_dim)
        if self.shared_hidden_dim < 0:
            raise ConfigError(f"shared_hidden_dim ({self.shared_hidden_dim}) must not be negative")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Attention, then a feed-forward, each added to the residual stream."""

    attention: AttentionConfig | LatentAttentionConfig
    feed_forward: FeedForwardConfig | ExpertsConfig
    norms: Literal["before", "after", "both"] = "before"
    """Where attention and feed-forward are normed: what they take, what they give to the residual stream, or both."""

    def __post_init__(self) -> None:
        if self.norms != "before" and isinstance(self.feed_forward, ExpertsConfig):
            raise ConfigError(f"norms {self.norms!r} are not supported in a layer of experts")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole decoder: embedding, layers, norm, head."""

    family: str
    """Which entry of `families` reads and writes it; for names and messages, never for dispatch in the decoder."""
    dim: int
    vocab_size: int
    max_context: int
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    tied_head: bool
    """The head is the embedding matrix."""
    headless: bool = False
    """Logits mean nothing: the decoder was published for its hidden states, without a head. tied_head stands in."""
    norm_offset: float = 0.0
    """Norms multiply by this + weight."""
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    """Logits x become logit_softcap tanh(x / logit_softcap)."""
    predictors: tuple[LayerConfig, ...] = ()
    """Layers that predict the tokens after the next (DeepSeek-AI 2024, multi-token prediction). Their weights are kept;
    the decoder does not run them."""

    def __post_init__(self) -> None:
        _positive(
            dim=self.dim, vocab_size=self.vocab_size, max_context=self.max_context, n_layers=self.n_layers,
            embed_scale=self.embed_scale,
        )  # fmt: skip
        _positive_if_given(logit_softcap=self.logit_softcap)
        if not self.norm_eps >= 0:
            raise ConfigError(f"norm_eps ({self.norm_eps}) must not be negative")

    @property
    def n_layers(self) -> int:
        return len(self.layers)


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every weight that a model of this configuration has: canonical name -> shape, matrices as [out, in], those of
    experts and of heads as [n, out, in]."""
    shapes: dict[str, Shape] = {"embed": (config.vocab_size, config.dim)}
    for i, layer in enumerate(config.layers):
        shapes |= {f"layers.{i}.{part}": shape for part, shape in _layer_shapes(layer, config.dim).items()}
    shapes["norm"] = (config.dim,)
    if not config.tied_head:
        shapes["head"] = (config.vocab_size, config.dim)
    for i, layer in enumerate(config.predictors):
        # norm and embed again: checkpoints hold copies of their own
        parts: dict[str, Shape] = {"embed": (config.vocab_size, config.dim)}
        parts |= {"embed_norm": (config.dim,), "hidden_norm": (config.dim,), "join": (config.dim, 2 * config.dim)}
        parts |= _layer_shapes(layer, config.dim)
        parts |= {"norm": (config.dim,), "head": (config.vocab_size, config.dim)}
        shapes |= {f"predictors.{i}.{part}": shape for part, shape in parts.items()}
    return shapes


def _layer_shapes(layer: LayerConfig, dim: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, part in (
        ("attention", _attention_shapes(layer.attention, dim)),
        ("feed_forward", _feed_forward_shapes(layer.feed_forward, dim)),
    ):
        if layer.norms != "after":
            shapes[f"{name}.norm"] = (dim,)
        shapes |= {f"{name}.{key}": shape for key, shape in part.items()}
        if layer.norms != "before":
            shapes[f"{name}.post_norm"] = (dim,)
    return shapes


def _attention_shapes(attention: AttentionConfig | LatentAttentionConfig, dim: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    if isinstance(attention, LatentAttentionConfig):
        query_input = dim if attention.query_dim is None else attention.query_dim
        if attention.query_dim is not None:
            shapes |= {"q_down": (attention.query_dim, dim), "q_down_norm": (attention.query_dim,)}
        shapes["q_nope"] = (attention.n_heads * attention.nope_dim, query_input)
        shapes["q_rope"] = (attention.n_heads * attention.rope.dim, query_input)
        shapes["kv_down"] = (attention.latent_dim, dim)
        shapes["kv_down_norm"] = (attention.latent_dim,)
        shapes["k_rope"] = (attention.rope.dim, dim)
        shapes["k_up"] = (attention.n_heads, attention.latent_dim, attention.nope_dim)
        shapes["v_up"] = (attention.n_heads, attention.value_dim, attention.latent_dim)
        shapes["o"] = (dim, attention.n_heads * attention.value_dim)
        return shapes
    q_dim, kv_dim = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    for name, rows in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
        shapes |= _linear(name, attention.qkv_bias, rows, dim)
        if attention.qk_norm == "weighted" and name != "v":
            shapes[f"{name}_norm"] = (attention.head_dim,)
    return shapes | _linear("o", attention.out_bias, dim, q_dim)


def _feed_forward_shapes(feed_forward: FeedForwardConfig | ExpertsConfig, dim: int) -> dict[str, Shape]:
    if isinstance(feed_forward, FeedForwardConfig):
        hidden, bias = feed_forward.hidden_dim, feed_forward.bias
        gate, up = _linear("gate", bias, hidden, dim), _linear("up", bias, hidden, dim)
        return gate | up | _linear("down", bias, dim, hidden)
    n, hidden, shared = feed_forward.routing.n_experts, feed_forward.hidden_dim, feed_forward.shared_hidden_dim
    shapes: dict[str, Shape] = {"router": (n, dim)}
    if feed_forward.selection_bias:
        shapes["selection_bias"] = (n,)
    shapes |= {"experts.gate": (n, hidden, dim), "experts.up": (n, hidden, dim), "experts.down": (n, dim, hidden)}
    if shared:
        shapes |= {"shared.gate": (shared, dim), "shared.up": (shared, dim), "shared.down": (dim, shared)}
    return shapes


def _linear(name: str, bias: bool, rows: int, cols: int) -> dict[str, Shape]:
    return {name: (rows, cols)} | ({f"{name}_bias": (rows,)} if bias else {})


def _positive(**sizes: float) -> None:
    for name, size in sizes.items():
        if not size > 0:
            raise ConfigError(f"{name} ({size}) must be positive")


def _positive_if_given(**sizes: float | None) -> None:
    _positive(**{name: size for name, size in sizes.items() if size is not None})
