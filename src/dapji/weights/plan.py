"""`plan`: what a model takes, written in a scheme and run, by its configuration alone.

From shapes, without a value, so that a model that no machine here could hold can be planned before it is downloaded.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import NoReturn

from dapji.errors import ConfigError
from dapji.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    ModelConfig,
    weight_shapes,
)
from dapji.models.families import gguf_rules
from dapji.models.size import active_parameters, cached_bytes, parameters, read_shares
from dapji.ops.formats import FORMATS
from dapji.ops.tensor import Tensor
from dapji.weights.schemes import SCHEMES, choose_formats


@dataclass(frozen=True, kw_only=True)
class SchemePlan:
    """Of a GGUF file."""

    bytes: int
    read_per_token: int
    """Bytes of weights that a step of one token reads, the cache aside."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Of keys and values."""

    per_token: int
    whole_context: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    family: str
    layers: dict[str, int]
    """What a layer consists of -> how many do."""
    parameters: int
    """Without those of predictors."""
    predictors: int
    predictor_parameters: int
    active_parameters: int
    """Those that one token takes part in."""
    context: int
    weights: dict[str, SchemePlan]
    cache: dict[str, CachePlan]


MOST_ROWS = 1 << 26
"""Of a weight. Lists as long as a weight has rows are made, so a hostile size must not get that far; the largest
published weights have some 10^6."""


def plan(config: ModelConfig, schemes: tuple[str, ...] = ("BF16", "Q8_0", "Q4_K_M")) -> Plan:
    """Raises ConfigError for a weight of more than MOST_ROWS rows."""
    for name, shape in weight_shapes(config).items():
        if math.prod(shape[:-1]) > MOST_ROWS:
            raise ConfigError(f"{name} would be {list(shape)}: more than {MOST_ROWS} rows are not planned")
    alone = parameters(replace(config, predictors=()))
    per_token = {kv: cached_bytes(config, kv) for kv in ("f16", "q8")}
    return Plan(
        family=config.family,
        layers=dict(Counter(map(_description, config.layers))),
        parameters=alone,
        predictors=len(config.predictors),
        predictor_parameters=parameters(config) - alone,
        active_parameters=active_parameters(config),
        context=config.max_context,
        weights={scheme: _scheme_plan(config, scheme) for scheme in schemes},
        cache={kv: CachePlan(per_token=n, whole_context=n * config.max_context) for kv, n in per_token.items()},
    )


def _scheme_plan(config: ModelConfig, scheme: str) -> SchemePlan:
    shares = read_shares(config)
    tensors, share_of = {}, {}
    for rule in gguf_rules(config):
        for name, shape in zip(rule.foreign, rule.shapes, strict=True):
            tensors[name] = Tensor(name=name, format=FORMATS["BF16"], shape=shape, source=_no_values)
            share_of[name] = shares[rule.ours[0]]  # what lies in one tensor is read together
    formats = choose_formats(tensors, SCHEMES[scheme])
    sizes = {name: tensor.rows * formats[name].row_bytes(tensor.cols) for name, tensor in tensors.items()}
    return SchemePlan(
        bytes=sum(sizes.values()),
        read_per_token=round(math.fsum(share_of[name] * size for name, size in sizes.items())),
    )


def _no_values() -> NoReturn:
    raise AssertionError("a plan has shapes and no values")


def _description(layer: LayerConfig) -> str:
    return f"{_attention(layer.attention)}, {_feed_forward(layer.feed_forward)}"


def _attention(attention: AttentionConfig | LatentAttentionConfig) -> str:
    if isinstance(attention, LatentAttentionConfig):
        return f"latent attention {attention.n_heads} heads (latent {attention.latent_dim}, rope {attention.rope.dim})"
    said = f"attention {attention.n_heads} heads of {attention.head_dim} (keys {attention.n_kv_heads})"
    if attention.window is not None:
        said += f" window {attention.window}"
    if attention.chunk is not None:
        said += f" chunk {attention.chunk}"
    return said if attention.rope is not None else f"{said} not rotated"


def _feed_forward(feed_forward: FeedForwardConfig | ExpertsConfig) -> str:
    if isinstance(feed_forward, FeedForwardConfig):
        return f"feed-forward {feed_forward.hidden_dim}"
    routing, shared = feed_forward.routing, feed_forward.shared_hidden_dim
    said = f"{routing.n_experts} experts of {feed_forward.hidden_dim}, {routing.n_experts_per_token} per token"
    return f"{said} + shared {shared}" if shared else said
