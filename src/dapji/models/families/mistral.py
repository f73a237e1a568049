"""Mistral 7B and its successors of the same architecture: Llama's, with a sliding window in the first version."""

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
    sizes = sizes_from_hf(fields.assuming({"num_key_value_heads": 8}))
    # 4096 is what transformers means by an absent key; later models write null
    window = fields.optional_integer("sliding_window", 4096)
    fields.finish(HF_IGNORABLE)
    layer = sizes.layer(window=window)
    return sizes.model("mistral", (layer,) * sizes.n_layers)


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward = uniform_layer(config)
    if attention.qkv_bias or attention.out_bias or feed_forward.bias:
        raise ConfigError("config.json of mistral has no form for biases")
    if len(set(windows(config))) > 1:
        raise ConfigError("config.json of mistral has no form for windows in some layers only")
    return {
        **sizes_to_hf(config, attention, feed_forward.hidden_dim, feed_forward.activation),
        "sliding_window": attention.window,
    }


MISTRAL = Family(
    name="mistral",
    models="Mistral 7B, Nemo",
    licence="Apache-2.0",
    hf_architecture="MistralForCausalLM",
    gguf_architecture="llama",
    hf=HF,
    gguf=GGUF_INTERLEAVED,
    rope_tensors=(ROPE_FREQS,),
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=lambda fields, facts: config_from_gguf("mistral", fields, facts),
    to_gguf=config_to_gguf,
)
