"""DeepSeek V2, V2.5, V2-Lite and Coder-V2: latent attention, and experts by softmax, the large models' in groups."""

from __future__ import annotations

from dapji.errors import ConfigError
from dapji.models.config import ModelConfig
from dapji.models.families.experts import GgufRouting
from dapji.models.families.family import Family
from dapji.models.families.fields import Fields
from dapji.models.families.latent import (
    GGUF_LATENT,
    HF_LATENT,
    gguf_layout,
    model_from_gguf,
    model_from_hf,
    model_to_gguf,
    model_to_hf,
    parts_of,
)
from dapji.ops.routing import Routing

_GGUF_ROUTING = GgufRouting(stated=True)
_GROUPED = {"greedy": False, "group_limited_greedy": True}


def _routing(fields: Fields) -> Routing:
    fields.require("scoring_func", "softmax")
    fields.require("norm_topk_prob", False)
    grouped = fields.choice("topk_method", _GROUPED, "greedy")
    n_groups, n_chosen = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    return Routing(
        n_experts=fields.integer("n_routed_experts"),
        n_experts_per_token=fields.integer("num_experts_per_tok"),
        n_groups=n_groups if grouped else 1,
        n_groups_per_token=n_chosen if grouped else 1,
        scale=fields.number("routed_scaling_factor", 1.0),
    )


def _to_hf(config: ModelConfig) -> dict[str, object]:
    experts = parts_of(config).experts
    routing = experts.routing
    if routing.score != "softmax" or routing.normalized or experts.selection_bias:
        raise ConfigError(
            "config.json of deepseek_v2 has a form only for softmax routing, not normalised, without bias"
        )
    return model_to_hf(
        config,
        {
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "topk_method": "group_limited_greedy" if routing.n_groups > 1 else "greedy",
            "n_group": routing.n_groups,
            "topk_group": routing.n_groups_per_token,
        },
    )


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    models="DeepSeek V2, V2.5, V2-Lite, Coder-V2",
    licence="DeepSeek Model License",
    hf_architecture="DeepseekV2ForCausalLM",
    gguf_architecture="deepseek2",
    hf=HF_LATENT,
    gguf=GGUF_LATENT,
    gguf_layout=gguf_layout,
    from_hf=lambda fields: model_from_hf(fields, "deepseek_v2", _routing, selection_bias=False),
    to_hf=_to_hf,
    from_gguf=lambda fields, facts: model_from_gguf("deepseek_v2", fields, facts, _GGUF_ROUTING, selection_bias=False),
    to_gguf=lambda config: model_to_gguf(config, _GGUF_ROUTING),
    reads_gguf=lambda fields: _GGUF_ROUTING.read(fields).score == "softmax",
)
