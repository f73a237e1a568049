"""What DeepSeek V2, V3 and Kimi K2 share: latent attention, leading dense layers, then experts; in config.json, in the
tensors of both formats, and in GGUF's architecture deepseek2.

Their families say how they route.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dapji.errors import ConfigError
from dapji.models.config import (
    ExpertsConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    ModelConfig,
    weight_shapes,
)
from dapji.models.families.experts import HF_IGNORABLE as EXPERTS_IGNORABLE
from dapji.models.families.experts import (
    GgufRouting,
    experts_from_gguf,
    experts_to_gguf,
    kinds,
    leading_dense,
    shared_count,
)
from dapji.models.families.family import (
    GGUF_IGNORABLE,
    HF_IGNORABLE,
    MAX_LAYERS,
    TO_HF_ACTIVATION,
    GgufFacts,
    Sizes,
    shortest,
    sizes_from_hf,
)
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF, HF, HF_EXPERTS, Index, Layout, Rule, experts_one_by_one, pairs, rows
from dapji.models.families.rope import longest_context, rope_from_gguf, rope_to_gguf, rope_to_hf
from dapji.ops.rope import RopeScaling
from dapji.ops.routing import Routing
from dapji.ops.tensor import Tensor

NORM_EPS = 1e-6
"""Of the norms of latent vectors. The published code gives them none, whatever rms_norm_eps says."""

_IGNORABLE = (
    *HF_IGNORABLE,
    *EXPERTS_IGNORABLE,
    "auto_map",
    # training
    "aux_loss_alpha",
    "seq_aux",
    # how a library runs it
    "ep_size",
)


# ---- config.json ----


def model_from_hf(
    fields: Fields, family: str, routing: Callable[[Fields], Routing], *, selection_bias: bool
) -> ModelConfig:
    """The whole model. routing: of all layers of experts."""
    rope_dim = fields.integer("qk_rope_head_dim")
    sizes = sizes_from_hf(fields.assuming({"head_dim": rope_dim}))
    nope_dim = fields.integer("qk_nope_head_dim")
    # what transformers adds to the published keys
    fields.require("head_dim", rope_dim)
    fields.require("qk_head_dim", nope_dim + rope_dim)
    for key in ("attention_bias", "mlp_bias"):
        fields.require(key, False)
    fields.require("moe_layer_freq", 1)
    if sizes.n_kv_heads != sizes.n_heads:
        raise ConfigError(
            f"config.json: num_key_value_heads ({sizes.n_kv_heads}) must be num_attention_heads ({sizes.n_heads}): "
            "each head has keys of its own, made of the latent vector"
        )
    scaling = sizes.rope.scaling
    attention = LatentAttentionConfig(
        n_heads=sizes.n_heads,
        # 1536 is what transformers means by an absent key; null is none
        query_dim=fields.optional_integer("q_lora_rank", 1536),
        latent_dim=fields.integer("kv_lora_rank"),
        nope_dim=nope_dim,
        value_dim=fields.integer("v_head_dim"),
        rope=sizes.rope,
        scale=_score_scale(nope_dim + rope_dim, scaling, _mscale_all_dim_of(fields, scaling)),
        norm_eps=NORM_EPS,
    )
    hidden_dim = fields.integer("moe_intermediate_size")
    experts = ExpertsConfig(
        routing=routing(fields),
        hidden_dim=hidden_dim,
        shared_hidden_dim=hidden_dim * fields.integer("n_shared_experts"),
        selection_bias=selection_bias,
        activation=sizes.activation,
    )
    model = _model(
        family, sizes, attention, experts, fields.integer("first_k_dense_replace"),
        fields.integer("num_nextn_predict_layers", 0),
    )  # fmt: skip
    fields.finish(_IGNORABLE)
    return model


def _model(
    family: str, sizes: Sizes, attention: LatentAttentionConfig, experts: ExpertsConfig, n_dense: int, n_predictors: int
) -> ModelConfig:
    if not 0 <= n_dense <= sizes.n_layers:
        raise ConfigError(f"the number of leading dense layers ({n_dense}) must be 0 to n_layers ({sizes.n_layers})")
    if not 0 <= n_predictors <= MAX_LAYERS:
        raise ConfigError(f"the number of predictors ({n_predictors}) must be 0 to {MAX_LAYERS}")
    dense = LayerConfig(attention=attention, feed_forward=sizes.feed_forward)
    routed = LayerConfig(attention=attention, feed_forward=experts)
    model = sizes.model(family, (dense,) * n_dense + (routed,) * (sizes.n_layers - n_dense))
    return replace(model, predictors=(routed,) * n_predictors)


def _mscale_all_dim_of(fields: Fields, scaling: RopeScaling | None) -> float:
    if scaling is None or scaling.kind != "yarn":
        return 0.0
    key = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    return fields.mapping(key).number("mscale_all_dim", 0.0)


def _score_scale(head_dim: int, scaling: RopeScaling | None, mscale_all_dim: float) -> float:
    """1 / sqrt(head_dim), and where yarn stretches, that times (0.1 mscale_all_dim ln(factor) + 1)^2."""
    if head_dim < 1:
        raise ConfigError(f"head_dim ({head_dim}) must be positive")
    scale: float = head_dim**-0.5
    if scaling is None or not mscale_all_dim:
        return scale
    mscale = _mscale(scaling, mscale_all_dim)
    return scale * mscale * mscale


def _mscale(scaling: RopeScaling, mscale: float) -> float:
    return 0.1 * mscale * math.log(scaling.factor) + 1.0


def _mscale_all_dim(attention: LatentAttentionConfig) -> float:
    """The inverse of `_score_scale`; 0: scores are scaled as without yarn."""
    scaling = attention.rope.scaling
    head_dim = attention.nope_dim + attention.rope.dim
    plain = head_dim**-0.5
    if attention.scale == plain:
        return 0.0
    found = None
    if scaling is not None and scaling.kind == "yarn" and scaling.factor > 1:
        found = _decimal(
            (math.sqrt(attention.scale / plain) - 1) / (0.1 * math.log(scaling.factor)),
            lambda all_dim: _score_scale(head_dim, scaling, all_dim) == attention.scale,
        )
    if found is None:
        raise ConfigError(
            f"neither config.json nor GGUF has a form for scores scaled by {attention.scale}, only by "
            f"1 / sqrt(head_dim) ({plain:g}) and by what yarn makes of it"
        )
    return found


def _decimal(value: float, right: Callable[[float], bool]) -> float | None:
    """The shortest decimal near `value` that is right."""
    return next((short for digits in range(1, 18) if right(short := float(f"{value:.{digits}g}"))), None)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the layers of such a model consist of."""

    attention: LatentAttentionConfig
    experts: ExpertsConfig
    n_dense: int
    """How many layers come first that have no experts."""
    dense_hidden_dim: int


def parts_of(config: ModelConfig) -> Parts:
    """Raises ConfigError where the layers are not all of one kind of attention, dense ones first, then experts."""
    experts, dense = kinds(config)
    n_dense = leading_dense(config)
    last = config.layers[-1]
    attention = last.attention
    if not isinstance(attention, LatentAttentionConfig):
        raise ConfigError(f"{config.family} has no form for layers without latent attention")
    if attention.norm_eps != NORM_EPS:
        raise ConfigError(f"{config.family} has {NORM_EPS} as norm_eps of latent vectors, not {attention.norm_eps}")
    for i, layer in enumerate(config.layers):
        if replace(layer, feed_forward=experts) != last:
            raise ConfigError(f"{config.family} has no form for layers that differ: {i} is not as the last")
    if dense is not None and dense != FeedForwardConfig(hidden_dim=dense.hidden_dim, activation=experts.activation):
        raise ConfigError(f"{config.family} has no form for dense layers with biases or an activation of their own")
    if any(layer != last for layer in config.predictors):
        raise ConfigError(f"{config.family} has no form for predictors that differ from the last layer")
    # without dense layers nothing depends on it
    return Parts(
        attention=attention,
        experts=experts,
        n_dense=n_dense,
        dense_hidden_dim=experts.hidden_dim if dense is None else dense.hidden_dim,
    )


def model_to_hf(config: ModelConfig, routing: Mapping[str, object]) -> dict[str, object]:
    """The inverse of `model_from_hf`."""
    parts = parts_of(config)
    attention, experts = parts.attention, parts.experts
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.query_dim,
        "kv_lora_rank": attention.latent_dim,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope.dim,
        "v_head_dim": attention.value_dim,
        "intermediate_size": parts.dense_hidden_dim,
        "first_k_dense_replace": parts.n_dense,
        "moe_intermediate_size": experts.hidden_dim,
        "n_shared_experts": shared_count(experts, f"config.json of {config.family}"),
        "n_routed_experts": experts.routing.n_experts,
        "num_experts_per_tok": experts.routing.n_experts_per_token,
        "routed_scaling_factor": experts.routing.scale,
        **routing,
        "hidden_act": TO_HF_ACTIVATION[experts.activation],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        **_rope_to_hf(attention, config.max_context),
    }


def _rope_to_hf(attention: LatentAttentionConfig, max_context: int) -> dict[str, object]:
    """Yarn as published: mscale and mscale_all_dim instead of attention_factor."""
    written = rope_to_hf(attention.rope, max_context=max_context)
    scaling, all_dim = attention.rope.scaling, _mscale_all_dim(attention)
    if scaling is None or not all_dim:
        return written
    yarn = {**_mapping(written["rope_scaling"]), "mscale_all_dim": all_dim}
    factor = scaling.attention_factor
    if factor is not None:
        all_scale = _mscale(scaling, all_dim)
        mscale = _decimal(
            (factor * all_scale - 1) / (0.1 * math.log(scaling.factor)),
            lambda mscale: mscale != 0 and _mscale(scaling, mscale) / all_scale == factor,
        )
        if mscale is not None:
            del yarn["attention_factor"]
            yarn["mscale"] = mscale
    return {**written, "rope_scaling": yarn}


def _mapping(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return value


# ---- tensors ----


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Of the tensors that hold several weights, in a layer, without .weight."""

    q: str
    """Made of the input itself."""
    q_up: str
    """Made of the queries' latent vector."""
    kv_down: str
    kv_up: str | None
    """None: there are two instead, of the shapes of ours."""


def _rules(layers: str, names: _Names, paired: bool, config: ModelConfig) -> list[Rule]:
    """paired: rotated rows lie in pairs (2i, 2i + 1), where ours are in halves."""
    rules = []
    shapes = weight_shapes(config)
    for i, layer in enumerate(config.layers):
        attention = layer.attention
        assert isinstance(attention, LatentAttentionConfig)
        n, nope, rope, value = attention.n_heads, attention.nope_dim, attention.rope.dim, attention.value_dim
        latent = attention.latent_dim
        own = {
            part: f"layers.{i}.attention.{part}" for part in ("q_nope", "q_rope", "kv_down", "k_rope", "k_up", "v_up")
        }
        of_head = pairs(1, rope, rope) if paired else np.arange(rope, dtype=np.int64)
        heads = np.arange(n, dtype=np.int64)[:, None]
        q = names.q if attention.query_dim is None else names.q_up
        rules.append(
            rows(
                f"{layers}.{i}.{q}.weight",
                {own[part]: shapes[own[part]] for part in ("q_nope", "q_rope")},
                _side_by_side(heads * nope + np.arange(nope), n * nope + heads * rope + of_head),
            )
        )
        rules.append(
            rows(
                f"{layers}.{i}.{names.kv_down}.weight",
                {own[part]: shapes[own[part]] for part in ("kv_down", "k_rope")},
                np.concatenate([np.arange(latent), latent + of_head]),
            )
        )
        if names.kv_up is not None:
            rules.append(
                _kv_up(
                    rows(
                        f"{layers}.{i}.{names.kv_up}.weight",
                        {own["k_up"]: (n, nope, latent), own["v_up"]: (n, value, latent)},
                        _side_by_side(heads * nope + np.arange(nope), n * nope + heads * value + np.arange(value)),
                    )
                )
            )
    return rules


def _side_by_side(*parts: Index) -> Index:
    """Rows of several weights, [heads, rows of a head] each, head by head."""
    return np.concatenate(parts, axis=1).ravel()


def _kv_up(rule: Rule) -> Rule:
    """The rule of a tensor of k_up transposed beside v_up. Of blocks both become float32, to stand in one tensor."""

    def read(given: Sequence[Tensor]) -> list[Tensor]:
        k, v = rule.read(given)
        return [k.transposed(), v]

    def write(own: Sequence[Tensor]) -> list[Tensor]:
        k, v = own
        return list(rule.write([k.transposed(), v.without_blocks()]))

    return replace(rule, read=read, write=write)


_HF_NAMES = _Names(
    q="self_attn.q_proj", q_up="self_attn.q_b_proj", kv_down="self_attn.kv_a_proj_with_mqa", kv_up="self_attn.kv_b_proj"
)


def _hf_rules(paired: bool, config: ModelConfig) -> list[Rule]:
    return _rules(HF.layers, _HF_NAMES, paired, config) + experts_one_by_one(HF, config, HF_EXPERTS)


HF_LATENT = replace(
    HF,
    parts={
        **HF.parts,
        "attention.q_down": "self_attn.q_a_proj",
        "attention.q_down_norm": "self_attn.q_a_layernorm",
        "attention.kv_down_norm": "self_attn.kv_a_layernorm",
        "feed_forward.router": "mlp.gate",
        "feed_forward.shared.gate": "mlp.shared_experts.gate_proj",
        "feed_forward.shared.up": "mlp.shared_experts.up_proj",
        "feed_forward.shared.down": "mlp.shared_experts.down_proj",
        "embed": "embed_tokens",
        "embed_norm": "enorm",
        "hidden_norm": "hnorm",
        "join": "eh_proj",
        "norm": "shared_head.norm",
        "head": "shared_head.head",
    },
    plain={"feed_forward.selection_bias": "mlp.gate.e_score_correction_bias"},
    rules=partial(_hf_rules, True),
)
HF_LATENT_HALVES = replace(HF_LATENT, rules=partial(_hf_rules, False))
"""With rotated rows in halves, as ours."""

_GGUF_NAMES = _Names(q="attn_q", q_up="attn_q_b", kv_down="attn_kv_a_mqa", kv_up=None)

GGUF_LATENT = replace(
    GGUF,
    parts={
        **GGUF.parts,
        "attention.q_down": "attn_q_a",
        "attention.q_down_norm": "attn_q_a_norm",
        "attention.kv_down_norm": "attn_kv_a_norm",
        "attention.k_up": "attn_k_b",
        "attention.v_up": "attn_v_b",
        "embed": "nextn.embed_tokens",
        "embed_norm": "nextn.enorm",
        "hidden_norm": "nextn.hnorm",
        "join": "nextn.eh_proj",
        "norm": "nextn.shared_head_norm",
        "head": "nextn.shared_head_head",
    },
    rules=partial(_rules, GGUF.layers, _GGUF_NAMES, True),
)
_GGUF_UNSPLIT = replace(GGUF_LATENT, rules=partial(_rules, GGUF.layers, replace(_GGUF_NAMES, kv_up="attn_kv_b"), True))


def gguf_layout(facts: GgufFacts) -> Layout:
    """Files from before April 2025 hold k_up and v_up in one tensor."""
    return _GGUF_UNSPLIT if "blk.0.attn_kv_b.weight" in facts.names else GGUF_LATENT


# ---- GGUF metadata ----


def model_from_gguf(
    family: str, fields: Fields, facts: GgufFacts, routing: GgufRouting, *, selection_bias: bool
) -> ModelConfig:
    """The whole model. norm_eps of latent vectors is the published one, which GGUF does not say."""
    fields.require("vocab_size", facts.vocab_size)
    fields.require("attention.causal", True)
    n_heads, latent_dim = fields.integer("attention.head_count"), fields.integer("attention.kv_lora_rank")
    rope_dim = fields.integer("rope.dimension_count")
    stated_context = fields.integer("context_length")
    if "attention.key_length_mla" in fields:
        key_dim, value_dim = fields.integer("attention.key_length_mla"), fields.integer("attention.value_length_mla")
        fields.require("attention.head_count_kv", 1)
        fields.require("attention.key_length", latent_dim + rope_dim)
        fields.require("attention.value_length", latent_dim)
    else:
        key_dim, value_dim = fields.integer("attention.key_length"), fields.integer("attention.value_length")
        fields.require("attention.head_count_kv", n_heads)
    multiplier = fields.number("rope.scaling.yarn_log_multiplier", 0.0)
    rope = rope_from_gguf(
        fields, head_dim=rope_dim, stated_context=stated_context, tensors=facts.rope_tensors,
        log_multiplier=multiplier,
    )  # fmt: skip
    scaling = rope.scaling
    mscale_all_dim = shortest(10 * shortest(multiplier))  # as a decimal, before it became a float32 tenth
    if scaling is not None and scaling.kind == "yarn":
        if not multiplier:
            raise ConfigError("GGUF: rope.scaling.yarn_log_multiplier is missing, without which yarn is not defined")
        scaling = replace(scaling, attention_factor=1.0)
        rope = replace(rope, scaling=scaling)
    n_predictors = fields.integer("nextn_predict_layers", 0)
    n_layers = fields.integer("block_count") - n_predictors
    if GGUF_LATENT.name("predictors.0.join", n_layers) not in facts.names:
        n_predictors = 0
    attention = LatentAttentionConfig(
        n_heads=n_heads,
        query_dim=fields.integer("attention.q_lora_rank", 0) or None,
        latent_dim=latent_dim,
        nope_dim=key_dim - rope_dim,
        value_dim=value_dim,
        rope=rope,
        scale=_score_scale(key_dim, scaling, mscale_all_dim),
        norm_eps=NORM_EPS,
    )
    experts = experts_from_gguf(fields, routing, selection_bias=selection_bias)
    sizes = Sizes(
        dim=fields.integer("embedding_length"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=rope_dim,
        hidden_dim=fields.integer("feed_forward_length"),
        activation="silu",
        vocab_size=facts.vocab_size,
        max_context=longest_context(scaling, stated_context),
        norm_eps=shortest(fields.number("attention.layer_norm_rms_epsilon")),
        tied_head=facts.tied_head,
        rope=rope,
    )
    model = _model(family, sizes, attention, experts, fields.integer("leading_dense_block_count", 0), n_predictors)
    fields.finish(GGUF_IGNORABLE)
    return model


def model_to_gguf(config: ModelConfig, routing: GgufRouting) -> dict[str, object]:
    """The inverse of `model_from_gguf`, without the architecture's prefix, in the form with k_up and v_up apart."""
    parts = parts_of(config)
    attention, experts = parts.attention, parts.experts
    rope, scaling = attention.rope, attention.rope.scaling
    mscale_all_dim = _mscale_all_dim(attention)
    if scaling is not None and scaling.kind == "yarn":
        if not mscale_all_dim or scaling.attention_factor != 1.0:
            raise ConfigError("GGUF has a form for yarn only where mscale and mscale_all_dim are equal, and not 0")
        rope = replace(rope, scaling=replace(scaling, attention_factor=None))
    written = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_context,
        "embedding_length": config.dim,
        "block_count": config.n_layers + len(config.predictors),
        "feed_forward_length": parts.dense_hidden_dim,
        "leading_dense_block_count": parts.n_dense,
        "attention.head_count": attention.n_heads,
        # as llama.cpp computes: all heads attend over the latent vectors themselves
        "attention.head_count_kv": 1,
        "attention.key_length": attention.latent_dim + rope.dim,
        "attention.value_length": attention.latent_dim,
        "attention.key_length_mla": attention.nope_dim + rope.dim,
        "attention.value_length_mla": attention.value_dim,
        # 0 for llama.cpp, which wants the key
        "attention.q_lora_rank": attention.query_dim or 0,
        "attention.kv_lora_rank": attention.latent_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "expert_shared_count": 0,  # llama.cpp wants the key
        **experts_to_gguf(experts, routing),
        **rope_to_gguf(rope),
    }
    if mscale_all_dim:
        written["rope.scaling.yarn_log_multiplier"] = 0.1 * mscale_all_dim
    if config.predictors:
        written["nextn_predict_layers"] = len(config.predictors)
    return written
