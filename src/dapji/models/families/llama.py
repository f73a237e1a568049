"""Llama 1, 2, 3, 3.1, 3.2 and 3.3, and the models of the same architecture: SmolLM2, TinyLlama, Vicuna …"""

from __future__ import annotations

from dapji.errors import ConfigError
from dapji.models.config import ModelConfig
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
from dapji.models.families.layout import GGUF_INTERLEAVED, HF
from dapji.models.families.rope import ROPE_FREQS


def _from_hf(fields: Fields) -> ModelConfig:
    sizes = sizes_from_hf(fields)
    attention_bias = fields.boolean("attention_bias", False)
    layer = sizes.layer(
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        feed_forward_bias=fields.boolean("mlp_bias", False),
    )
    fields.finish(HF_IGNORABLE)
    return sizes.model("llama", (layer,) * sizes.n_layers)


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward = uniform_layer(config)
    if any(window is not None for window in windows(config)):
        raise ConfigError("config.json of llama has no form for a window")
    if attention.qkv_bias != attention.out_bias:
        raise ConfigError(
            "config.json of llama has one attention_bias, "
            f"but qkv_bias is {attention.qkv_bias} and out_bias is {attention.out_bias}"
        )
    return {
        **sizes_to_hf(config, attention, feed_forward.hidden_dim, feed_forward.activation),
        "attention_bias": attention.qkv_bias,
        "mlp_bias": feed_forward.bias,
    }


LLAMA = Family(
    name="llama",
    models="Llama 1, 2, 3, 3.1, 3.2, 3.3; SmolLM2, TinyLlama, Alpaca, Vicuna, R1-Distill-Llama",
    licence="Llama community licence of each version; Apache-2.0 (SmolLM2, TinyLlama); Llama 1, Alpaca: research only",
    hf_architecture="LlamaForCausalLM",
    gguf_architecture="llama",
    hf=HF,
    gguf=GGUF_INTERLEAVED,
    rope_tensors=(ROPE_FREQS,),
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=lambda fields, facts: config_from_gguf("llama", fields, facts),
    to_gguf=config_to_gguf,
    reads_gguf=lambda fields: "attention.sliding_window" not in fields,
)
