"""Mistral 7B and its successors of the same architecture: Llama's, with a sliding window in the first version."""

from __future__ import annotations

from dapji.errors import ConfigError
from dapji.models.config import ModelConfig
from dapji.models.families.family import HF_IGNORABLE, Family, sizes_from_hf, sizes_to_hf
from dapji.models.families.fields import Fields


def _from_hf(fields: Fields) -> ModelConfig:
    sizes = sizes_from_hf(fields, default_n_kv_heads=8)
    # 4096 is what transformers means by an absent key; later models write null
    window = fields.optional_integer("sliding_window", 4096)
    fields.finish(HF_IGNORABLE)
    layer = sizes.layer(window=window, qkv_bias=False, out_bias=False, feed_forward_bias=False)
    return sizes.model("mistral", (layer,) * sizes.n_layers)


def _to_hf(config: ModelConfig) -> dict[str, object]:
    layer = config.layers[0]
    if layer.attention.qkv_bias or layer.attention.out_bias or layer.feed_forward.bias:
        raise ConfigError("config.json of mistral has no form for biases")
    if any(other.attention.window != layer.attention.window for other in config.layers):
        raise ConfigError("config.json of mistral has no form for windows in some layers only")
    return {**sizes_to_hf(config), "sliding_window": layer.attention.window}


MISTRAL = Family(
    name="mistral",
    hf_architecture="MistralForCausalLM",
    gguf_architecture="llama",
    interleaved=True,
    rope_freqs=True,
    window=True,
    from_hf=_from_hf,
    to_hf=_to_hf,
)
