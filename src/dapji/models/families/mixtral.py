"""Mixtral 8x7B and 8x22B: Mistral's layers with eight experts each."""

from __future__ import annotations

from dataclasses import replace

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, ExpertsConfig, LayerConfig, ModelConfig
from dapji.models.families import experts
from dapji.models.families.experts import GgufRouting
from dapji.models.families.family import (
    GGUF_IGNORABLE,
    HF_IGNORABLE,
    Family,
    GgufFacts,
    require_gguf_activation,
    sizes_from_gguf,
    sizes_from_hf,
    sizes_to_gguf,
    sizes_to_hf,
    uniform_attention,
    windows,
)
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF_INTERLEAVED, HF, experts_one_by_one
from dapji.models.families.rope import ROPE_FREQS
from dapji.ops.routing import Routing

_LAYOUT = replace(HF, parts={**HF.parts, "feed_forward.router": "block_sparse_moe.gate"})
_EXPERTS = {
    f"experts.{part}": f"block_sparse_moe.experts.{{}}.{name}"
    for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}
_GGUF_ROUTING = GgufRouting(normalized=True)


def _from_hf(fields: Fields) -> ModelConfig:
    sizes = sizes_from_hf(fields.assuming({"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6}))
    window = fields.integer("sliding_window") if "sliding_window" in fields else None
    routed = ExpertsConfig(
        routing=Routing(
            n_experts=fields.integer("num_local_experts", 8),
            n_experts_per_token=fields.integer("num_experts_per_tok", 2),
            normalized=True,
        ),
        hidden_dim=sizes.hidden_dim,
        activation=sizes.activation,
    )
    fields.finish((*HF_IGNORABLE, *experts.HF_IGNORABLE))
    layer = LayerConfig(attention=replace(sizes.attention, window=window), feed_forward=routed)
    return sizes.model("mixtral", (layer,) * sizes.n_layers)


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, routed = _layer(config, "config.json of mixtral")
    return {
        **sizes_to_hf(config, attention, routed.hidden_dim, routed.activation),
        "sliding_window": attention.window,
        "num_local_experts": routed.routing.n_experts,
        "num_experts_per_tok": routed.routing.n_experts_per_token,
    }


def _layer(config: ModelConfig, where: str) -> tuple[AttentionConfig, ExpertsConfig]:
    """What all layers have. Raises ConfigError where `where` cannot say it."""
    attention = uniform_attention(config)
    routed, dense = experts.kinds(config)
    if dense is not None:
        raise ConfigError(f"{where} has no form for dense layers beside those of experts")
    if attention.qkv_bias or attention.out_bias:
        raise ConfigError(f"{where} has no form for biases")
    if len(set(windows(config))) > 1:
        raise ConfigError(f"{where} has no form for windows in some layers only")
    sayable = ExpertsConfig(
        routing=_GGUF_ROUTING.sayable(routed.routing), hidden_dim=routed.hidden_dim, activation=routed.activation
    )
    experts.require_form(routed, sayable, where)
    return attention, routed


def _from_gguf(fields: Fields, facts: GgufFacts) -> ModelConfig:
    sizes = sizes_from_gguf(fields, facts)
    routed = ExpertsConfig(routing=_GGUF_ROUTING.read(fields), hidden_dim=sizes.hidden_dim)
    window = fields.integer("attention.sliding_window", 0) or None
    fields.finish(GGUF_IGNORABLE)
    layer = LayerConfig(attention=replace(sizes.attention, window=window), feed_forward=routed)
    return sizes.model("mixtral", (layer,) * sizes.n_layers)


def _to_gguf(config: ModelConfig) -> dict[str, object]:
    attention, routed = _layer(config, "the architecture llama of GGUF")
    if attention.rope is None:
        raise ConfigError("GGUF has no form for heads that are not rotated")
    require_gguf_activation(routed.activation)
    written = sizes_to_gguf(config, attention, attention.rope, routed.hidden_dim)
    if attention.window is not None:
        written["attention.sliding_window"] = attention.window
    return {**written, **_GGUF_ROUTING.write(routed.routing)}


MIXTRAL = Family(
    name="mixtral",
    models="Mixtral 8x7B, 8x22B",
    licence="Apache-2.0",
    hf_architecture="MixtralForCausalLM",
    gguf_architecture="llama",
    hf=replace(_LAYOUT, rules=lambda config: experts_one_by_one(_LAYOUT, config, _EXPERTS)),
    gguf=GGUF_INTERLEAVED,
    rope_tensors=(ROPE_FREQS,),
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
    reads_gguf=lambda fields: fields.integer("expert_count", 0) > 0,
)
