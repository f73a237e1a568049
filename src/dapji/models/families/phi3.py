"""Phi-3, Phi-3.5, Phi-4 and their small ones: fused matrices, longrope, heads of which a part may be rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from dapji.models.families.family import (
    HF_IGNORABLE,
    Family,
    config_from_gguf,
    config_to_gguf,
    sizes_from_hf,
    sizes_to_hf,
    uniform_layer,
    windows,
)
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF, HF, fused
from dapji.models.families.rope import LONG_FACTORS, SHORT_FACTORS, rope_from_hf

_QKV = ("attention.q", "attention.k", "attention.v")
_GATE_UP = ("feed_forward.gate", "feed_forward.up")
_HF_FUSED: Mapping[str, tuple[str, ...]] = {"self_attn.qkv_proj": _QKV, "mlp.gate_up_proj": _GATE_UP}
_GGUF_FUSED: Mapping[str, tuple[str, ...]] = {"attn_qkv": _QKV, "ffn_up": _GATE_UP}
_HF = replace(HF, rules=lambda config: fused(HF, config, _HF_FUSED))
_GGUF = replace(GGUF, rules=lambda config: fused(GGUF, config, _GGUF_FUSED))


def _from_hf(fields: Fields) -> ModelConfig:
    # what transformers means by absent keys
    fields = fields.assuming({"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5})
    sizes = sizes_from_hf(fields, read_rope=partial(rope_from_hf, partial=True))
    window = fields.integer("sliding_window") if "sliding_window" in fields else None
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.require(key, False)
    for key in ("interpolate_factor", "full_attn_mod"):
        fields.require(key, 1)
    # dropouts are of training, auto_map names the published code
    training = ("embd_pdrop", "resid_pdrop", "auto_map")
    fields.finish((*HF_IGNORABLE, *training, "original_max_position_embeddings"))
    layer = sizes.layer(window=window)
    return sizes.model("phi3", (layer,) * sizes.n_layers)


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward = _layer(config)
    written = sizes_to_hf(config, attention, feed_forward.hidden_dim, feed_forward.activation, partial_rope=True)
    return {**written, "sliding_window": attention.window}


def _to_gguf(config: ModelConfig) -> dict[str, object]:
    attention, _ = _layer(config)
    # 0 is written too: without the key, llama.cpp once took a window from the model's size
    return {**config_to_gguf(config), "attention.sliding_window": attention.window or 0}


def _layer(config: ModelConfig) -> tuple[AttentionConfig, FeedForwardConfig]:
    """Of the one layer that all are equal to. Raises ConfigError where neither format can say it."""
    attention, feed_forward = uniform_layer(config)
    if attention.qkv_bias or attention.out_bias or feed_forward.bias:
        raise ConfigError("phi3 has no form for biases")
    if len(set(windows(config))) > 1:
        raise ConfigError("phi3 has no form for windows in some layers only")
    return attention, feed_forward


PHI3 = Family(
    name="phi3",
    models="Phi-3, 3.5, 4, 4-mini",
    licence="MIT",
    hf_architecture="Phi3ForCausalLM",
    gguf_architecture="phi3",
    hf=_HF,
    gguf=_GGUF,
    rope_tensors=(LONG_FACTORS, SHORT_FACTORS),
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=lambda fields, facts: config_from_gguf("phi3", fields, facts),
    to_gguf=_to_gguf,
)
