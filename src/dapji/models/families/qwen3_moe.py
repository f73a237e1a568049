"""Qwen 3's models of experts: 30B-A3B, 235B-A22B, Qwen3-Coder-480B, and their successors of 2507."""

from __future__ import annotations

from dataclasses import replace

from dapji.errors import ConfigError
from dapji.models.config import ExpertsConfig, LayerConfig, ModelConfig
from dapji.models.families import experts
from dapji.models.families.experts import GgufRouting
from dapji.models.families.family import (
    GGUF_IGNORABLE,
    HF_IGNORABLE,
    Family,
    GgufFacts,
    sizes_from_gguf,
    sizes_from_hf,
    sizes_to_gguf,
    sizes_to_hf,
    uniform_attention,
    windows,
)
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF, HF, HF_EXPERTS, experts_one_by_one
from dapji.models.families.qwen3 import attention_from_hf, attention_to_hf, check_gguf_biases
from dapji.ops.routing import Routing

_LAYOUT = replace(HF, parts={**HF.parts, "feed_forward.router": "mlp.gate"})
_GGUF_ROUTING = GgufRouting(normalized=True)


def _routing(n_experts: int, n_experts_per_token: int, normalized: bool) -> Routing:
    return Routing(n_experts=n_experts, n_experts_per_token=n_experts_per_token, normalized=normalized)


def _from_hf(fields: Fields) -> ModelConfig:
    sizes = sizes_from_hf(fields.assuming({"num_key_value_heads": 4}))
    attention = attention_from_hf(fields, sizes)
    window = fields.optional_integer("sliding_window", 4096)
    if fields.boolean("use_sliding_window", False):
        attention = replace(attention, window=window)
    step = fields.integer("decoder_sparse_step", 1)
    if step < 1:
        raise ConfigError(f"config.json: decoder_sparse_step ({step}) must be positive")
    dense = fields.integers("mlp_only_layers") if "mlp_only_layers" in fields else []
    if beyond := [i for i in dense if not 0 <= i < sizes.n_layers]:
        raise ConfigError(f"config.json: mlp_only_layers has {beyond[0]}, but there are {sizes.n_layers} layers")
    routed = ExpertsConfig(
        # the first is what published files call it, the second what transformers 5 writes
        routing=_routing(
            fields.integer("num_experts" if "num_experts" in fields else "num_local_experts", 128),
            fields.integer("num_experts_per_tok", 8),
            fields.boolean("norm_topk_prob", False),
        ),
        hidden_dim=fields.integer("moe_intermediate_size", 768),
        activation=sizes.activation,
    )
    # what the files of Qwen3-Coder say beside
    fields.require("qkv_bias", False)
    fields.require("use_qk_norm", True)
    fields.require("shared_expert_intermediate_size", 0)
    # max_window_layers: has no effect with experts
    fields.finish((*HF_IGNORABLE, *experts.HF_IGNORABLE, "max_window_layers"))
    layers = [
        LayerConfig(
            attention=attention,
            feed_forward=sizes.feed_forward if i in dense or (i + 1) % step else routed,
        )
        for i in range(sizes.n_layers)
    ]
    return sizes.model("qwen3_moe", tuple(layers))


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention = uniform_attention(config)
    routed, dense = experts.kinds(config)
    routing = routed.routing
    sayable = ExpertsConfig(
        routing=_routing(routing.n_experts, routing.n_experts_per_token, routing.normalized),
        hidden_dim=routed.hidden_dim,
        activation=routed.activation,
    )
    experts.require_form(routed, sayable, "config.json of qwen3_moe")
    if len(set(windows(config))) > 1:
        raise ConfigError("config.json of qwen3_moe has no form for windows in some layers only")
    if dense is not None and (dense.bias or dense.activation != routed.activation):
        raise ConfigError("config.json of qwen3_moe has no form for biases or another activation in dense layers")
    hidden_dim = routed.hidden_dim if dense is None else dense.hidden_dim
    return {
        **sizes_to_hf(config, attention, hidden_dim, routed.activation),
        **attention_to_hf(attention, config.family),
        "use_sliding_window": attention.window is not None,
        "sliding_window": attention.window,
        "num_experts": routing.n_experts,
        "num_experts_per_tok": routing.n_experts_per_token,
        "norm_topk_prob": routing.normalized,
        "moe_intermediate_size": routed.hidden_dim,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(range(config.n_layers)) - set(experts.places(config))),
    }


def _from_gguf(fields: Fields, facts: GgufFacts) -> ModelConfig:
    # what the size of dense layers would be is stated, though there are none
    sizes = sizes_from_gguf(fields, facts)
    routed = experts.experts_from_gguf(fields, _GGUF_ROUTING)
    attention = replace(
        sizes.attention, qk_norm="weighted", qkv_bias=GGUF.in_layer(0, "attention.q_bias") in facts.names
    )
    fields.finish(GGUF_IGNORABLE)
    return sizes.model("qwen3_moe", (LayerConfig(attention=attention, feed_forward=routed),) * sizes.n_layers)


def _to_gguf(config: ModelConfig) -> dict[str, object]:
    attention = uniform_attention(config)
    routed, dense = experts.kinds(config)
    check_gguf_biases(attention, "qwen3moe")
    if dense is not None:
        raise ConfigError("GGUF has no form for dense layers beside those of experts in the architecture qwen3moe")
    if attention.window is not None or attention.rope is None:
        raise ConfigError(
            "GGUF has no form for a window or for heads that are not rotated in the architecture qwen3moe"
        )
    experts.require_form(routed, replace(routed, shared_hidden_dim=0, selection_bias=False), "GGUF")
    return {
        **sizes_to_gguf(config, attention, attention.rope, routed.hidden_dim),
        **experts.experts_to_gguf(routed, _GGUF_ROUTING),
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    models="Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder",
    licence="Apache-2.0",
    hf_architecture="Qwen3MoeForCausalLM",
    gguf_architecture="qwen3moe",
    hf=replace(_LAYOUT, rules=lambda config: experts_one_by_one(_LAYOUT, config, HF_EXPERTS)),
    gguf=GGUF,
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
