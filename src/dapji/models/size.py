"""What a model of a configuration takes: parameters, those read per token, cached values. From shapes alone.

Knows no weights and no files, so that a model which no machine here could hold can be planned.
"""

from __future__ import annotations

import math

from dapji.models.config import AttentionConfig, ExpertsConfig, LatentAttentionConfig, ModelConfig, weight_shapes
from dapji.ops.attention import KvShape
from dapji.ops.reference import Q8_BLOCK, KvFormat


def parameters(config: ModelConfig) -> int:
    """Of the decoder and what predicts the tokens after the next."""
    return sum(map(math.prod, weight_shapes(config).values()))


def active_parameters(config: ModelConfig) -> int:
    """Those that one token of an answer takes part in."""
    shapes = weight_shapes(config)
    return round(sum(share * math.prod(shapes[name]) for name, share in read_shares(config).items()))


def read_shares(config: ModelConfig) -> dict[str, float]:
    """How much of each weight is read for one token of an answer, 0 to 1. Of experts those that are chosen; of the
    embedding, unless it is the head too, one row, which counts as nothing."""
    shares = {}
    for name in weight_shapes(config):
        if name.startswith("predictors.") or (name == "embed" and not config.tied_head):
            shares[name] = 0.0
            continue
        shares[name] = 1.0
        if ".experts." in name:
            experts = config.layers[int(name.split(".")[1])].feed_forward
            assert isinstance(experts, ExpertsConfig)
            shares[name] = experts.routing.n_experts_per_token / experts.routing.n_experts
    return shares


def kv_shapes(config: ModelConfig) -> list[KvShape]:
    """What the cache of each layer holds per token."""
    return [_kv_shape(layer.attention) for layer in config.layers]


def cached_values(config: ModelConfig) -> int:
    """Numbers that the cache holds per token, all layers."""
    return sum(shape.n_kv_heads * (shape.key_dim + shape.value_dim) for shape in kv_shapes(config))


def cached_bytes(config: ModelConfig, kv: KvFormat) -> int:
    """What these take per token."""
    if kv != "q8":
        return cached_values(config) * (2 if kv == "f16" else 4)
    # codes of a byte, and a float32 for each Q8_BLOCK of a head
    return sum(
        shape.n_kv_heads * (dim + 4 * -(-dim // Q8_BLOCK))
        for shape in kv_shapes(config)
        for dim in (shape.key_dim, shape.value_dim)
    )


def _kv_shape(attention: AttentionConfig | LatentAttentionConfig) -> KvShape:
    if isinstance(attention, LatentAttentionConfig):
        return KvShape(n_kv_heads=1, key_dim=attention.latent_dim + attention.rope.dim, value_dim=0)
    return KvShape(n_kv_heads=attention.n_kv_heads, key_dim=attention.head_dim, value_dim=attention.head_dim)
