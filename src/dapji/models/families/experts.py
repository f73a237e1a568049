"""Experts as foreign configurations write them, both ways: what the families that have them share.

Knows no model. Layers of experts may stand beside dense ones; of each there is one kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from typing import Literal

from dapji.errors import ConfigError
from dapji.models.config import ExpertsConfig, FeedForwardConfig, ModelConfig
from dapji.models.families.family import shortest
from dapji.models.families.fields import Fields
from dapji.ops.routing import Routing

HF_IGNORABLE = (
    # training: what balances the experts
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)

_GATING: dict[Literal["softmax", "sigmoid"], int] = {"softmax": 1, "sigmoid": 2}
"""expert_gating_func in GGUF, where 0 means that nothing is said."""


def kinds(config: ModelConfig) -> tuple[ExpertsConfig, FeedForwardConfig | None]:
    """The experts of the layers that have some, and the feed-forward of the dense layers; None: there are none.

    Raises ConfigError where two of a kind differ, which no foreign configuration can say.
    """
    experts = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, ExpertsConfig)]
    dense = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, FeedForwardConfig)]
    if not experts:
        raise ConfigError(f"{config.family} has no form for a model without experts")
    if len(set(experts)) > 1 or len(set(dense)) > 1:
        raise ConfigError(f"{config.family} has no form for feed-forwards of several sizes or kinds")
    return experts[0], dense[0] if dense else None


def places(config: ModelConfig) -> list[int]:
    """The layers that have experts."""
    return [i for i, layer in enumerate(config.layers) if isinstance(layer.feed_forward, ExpertsConfig)]


def leading_dense(config: ModelConfig) -> int:
    """How many dense layers come first; raises ConfigError where some come after experts."""
    having = places(config)
    first = having[0] if having else config.n_layers
    if having != list(range(first, config.n_layers)):
        raise ConfigError(f"{config.family} has no form for dense layers after layers of experts")
    return first


def require_form(experts: ExpertsConfig, sayable: ExpertsConfig, where: str) -> None:
    """Raises ConfigError, which names the first mechanism that differs, unless the two are equal.

    sayable: the same as far as the file there can say it, and what its silence means.
    """
    parts = ((experts.routing, sayable.routing), (replace(experts, routing=sayable.routing), sayable))
    for have, want in parts:
        for field in fields_of(have):
            value, other = getattr(have, field.name), getattr(want, field.name)
            if value != other:
                raise ConfigError(f"{where} has no form for experts with {field.name} = {value!r}, only {other!r}")


@dataclass(frozen=True, kw_only=True)
class GgufRouting:
    """How an architecture of GGUF routes, by `<architecture>.expert_*`."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """Where no key says it, and so on."""
    normalized: bool = False
    weighs: Literal["output", "input"] = "output"
    group_score: Literal["max", "top2"] = "max"
    stated: bool = False
    """Keys may say otherwise; else llama.cpp does not look at them, and they must not."""

    def read(self, fields: Fields) -> Routing:
        if not self.stated:
            fields.require("expert_gating_func", _GATING[self.score])
            fields.require("expert_weights_norm", self.normalized)
            fields.require("expert_weights_scale", 1.0)
            fields.require("expert_group_count", 1)
        gating = fields.integer("expert_gating_func", 0) or _GATING[self.score]
        score = next((name for name, code in _GATING.items() if code == gating), None)
        if score is None:
            raise ConfigError(f"GGUF: expert_gating_func {gating} is not supported, only {_GATING} are")
        return Routing(
            n_experts=fields.integer("expert_count"),
            n_experts_per_token=fields.integer("expert_used_count"),
            score=score,
            n_groups=fields.integer("expert_group_count", 1),
            n_groups_per_token=fields.integer("expert_group_used_count", 1),
            group_score=self.group_score,
            normalized=fields.boolean("expert_weights_norm", self.normalized),
            scale=shortest(fields.number("expert_weights_scale", 1.0)) or 1.0,
            weighs=self.weighs,
        )

    def write(self, routing: Routing) -> dict[str, object]:
        """The inverse, of a routing that `sayable` is equal to."""
        written: dict[str, object] = {
            "expert_count": routing.n_experts,
            "expert_used_count": routing.n_experts_per_token,
        }
        if not self.stated:
            return written
        return {
            **written,
            "expert_gating_func": _GATING[routing.score],
            "expert_weights_norm": routing.normalized,
            "expert_weights_scale": routing.scale,
            "expert_group_count": routing.n_groups,
            "expert_group_used_count": routing.n_groups_per_token,
        }

    def sayable(self, routing: Routing) -> Routing:
        """The same as far as such metadata can say it."""
        if self.stated:
            group_score = self.group_score if routing.n_groups > 1 else routing.group_score
            return replace(routing, weighs=self.weighs, group_score=group_score)
        return Routing(
            n_experts=routing.n_experts,
            n_experts_per_token=routing.n_experts_per_token,
            score=self.score,
            normalized=self.normalized,
            weighs=self.weighs,
        )


def experts_from_gguf(fields: Fields, routing: GgufRouting, *, selection_bias: bool = False) -> ExpertsConfig:
    """Experts whose size has a key of its own, and as many shared ones as a key says, which are as one of their sizes
    together."""
    hidden_dim = fields.integer("expert_feed_forward_length")
    return ExpertsConfig(
        routing=routing.read(fields),
        hidden_dim=hidden_dim,
        shared_hidden_dim=fields.integer("expert_shared_count", 0) * hidden_dim,
        selection_bias=selection_bias,
    )


def shared_count(experts: ExpertsConfig, where: str) -> int:
    """Of how many experts' size the shared one is. Raises ConfigError where that is no whole number."""
    count, rest = divmod(experts.shared_hidden_dim, experts.hidden_dim)
    if rest:
        raise ConfigError(
            f"{where} has no form for a shared_hidden_dim ({experts.shared_hidden_dim}) that is no multiple of "
            f"hidden_dim ({experts.hidden_dim})"
        )
    return count


def experts_to_gguf(experts: ExpertsConfig, routing: GgufRouting) -> dict[str, object]:
    """The inverse of `experts_from_gguf`. Raises ConfigError where the architecture cannot say something."""
    shared = shared_count(experts, "GGUF")
    require_form(experts, replace(experts, routing=routing.sayable(experts.routing), activation="silu"), "GGUF")
    written = {**routing.write(experts.routing), "expert_feed_forward_length": experts.hidden_dim}
    return {**written, "expert_shared_count": shared} if shared else written
