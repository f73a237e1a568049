"""DeepSeek V3, V3.1 and R1, Moonlight: latent attention, and experts by sigmoid with a bias for their selection."""

from __future__ import annotations

from dapji.errors import ConfigError
from dapji.models.config import ModelConfig
from dapji.models.families.experts import GgufRouting
from dapji.models.families.family import Family
from dapji.models.families.fields import Fields
from dapji.models.families.latent import (
    GGUF_LATENT,
    HF_LATENT,
    HF_LATENT_HALVES,
    gguf_layout,
    model_from_gguf,
    model_from_hf,
    model_to_gguf,
    model_to_hf,
    parts_of,
)
from dapji.models.families.layout import Layout
from dapji.ops.routing import Routing

_GGUF_ROUTING = GgufRouting(group_score="top2", stated=True)


def _routing(fields: Fields) -> Routing:
    fields.require("scoring_func", "sigmoid")
    fields.require("topk_method", "noaux_tc")
    return Routing(
        n_experts=fields.integer("n_routed_experts"),
        n_experts_per_token=fields.integer("num_experts_per_tok"),
        score="sigmoid",
        n_groups=fields.integer("n_group"),
        n_groups_per_token=fields.integer("topk_group"),
        group_score="top2",
        normalized=fields.boolean("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 2.5),
    )


def _hf_layout(fields: Fields) -> Layout:
    return HF_LATENT if fields.boolean("rope_interleave", True) else HF_LATENT_HALVES


def deepseek_v3_from_hf(fields: Fields, family: str) -> ModelConfig:
    _hf_layout(fields)
    return model_from_hf(fields, family, _routing, selection_bias=True)


def deepseek_v3_to_hf(config: ModelConfig) -> dict[str, object]:
    experts = parts_of(config).experts
    routing = experts.routing
    if routing.score != "sigmoid" or not experts.selection_bias:
        raise ConfigError(f"config.json of {config.family} has a form only for sigmoid routing with a selection bias")
    return model_to_hf(
        config,
        {
            "scoring_func": "sigmoid",
            "norm_topk_prob": routing.normalized,
            "topk_method": "noaux_tc",
            "n_group": routing.n_groups,
            "topk_group": routing.n_groups_per_token,
            "num_nextn_predict_layers": len(config.predictors),
        },
    )


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    models="DeepSeek V3, V3.1, R1; Moonlight",
    licence="MIT (first V3: DeepSeek Model License)",
    hf_architecture="DeepseekV3ForCausalLM",
    gguf_architecture="deepseek2",
    hf=HF_LATENT,
    hf_layout=_hf_layout,
    gguf=GGUF_LATENT,
    gguf_layout=gguf_layout,
    from_hf=lambda fields: deepseek_v3_from_hf(fields, "deepseek_v3"),
    to_hf=deepseek_v3_to_hf,
    from_gguf=lambda fields, facts: model_from_gguf("deepseek_v3", fields, facts, _GGUF_ROUTING, selection_bias=True),
    to_gguf=lambda config: model_to_gguf(config, _GGUF_ROUTING),
)
