"""Qwen 2 and 2.5: biases on q, k and v, and optionally a sliding window from some layer on."""

from __future__ import annotations

from dataclasses import replace

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
from dapji.models.families.layout import GGUF, HF
from dapji.models.families.patterns import limited_from_hf, windows_to_hf


def _from_hf(fields: Fields) -> ModelConfig:
    sizes = sizes_from_hf(fields.assuming({"num_key_value_heads": 32}))
    fields.require("use_mrope", False)
    if "dual_chunk_attention_config" in fields:
        # The models for a million tokens attend as the others do up to this length, and in chunks only beyond it.
        chunks = fields.mapping("dual_chunk_attention_config")
        plain = chunks.integer("original_max_position_embeddings")
        sizes = replace(sizes, max_context=min(sizes.max_context, plain))
        chunks.finish(ignorable=("chunk_size", "local_size"))
    every = layer_windows(fields, sizes.n_layers)
    fields.finish(HF_IGNORABLE)
    return sizes.model("qwen2", tuple(sizes.layer(window=window, qkv_bias=True) for window in every))


def layer_windows(fields: Fields, n_layers: int) -> list[int | None]:
    """Of every layer: by layer_types, or else from max_window_layers on."""
    use_window = fields.boolean("use_sliding_window", False)
    stated = fields.optional_integer("sliding_window", 4096)
    window = stated if use_window else None
    first_windowed = fields.integer("max_window_layers", 28)
    windowed = limited_from_hf(fields, [window is not None and i >= first_windowed for i in range(n_layers)])
    if window is None and any(windowed):
        raise ConfigError("config.json: layer_types has sliding_attention, but use_sliding_window is false")
    return [window if it_has else None for it_has in windowed]


def layer_windows_to_hf(config: ModelConfig) -> dict[str, object]:
    """The inverse."""
    every = windows(config)
    first_windowed = next((i for i, window in enumerate(every) if window is not None), config.n_layers)
    return {
        **windows_to_hf(config),
        "use_sliding_window": first_windowed < config.n_layers,
        "max_window_layers": first_windowed,
    }


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward = uniform_layer(config)
    if not attention.qkv_bias or attention.out_bias or feed_forward.bias:
        raise ConfigError("config.json of qwen2 has biases on q, k and v, and no form for others")
    return {
        **sizes_to_hf(config, attention, feed_forward.hidden_dim, feed_forward.activation),
        **layer_windows_to_hf(config),
    }


QWEN2 = Family(
    name="qwen2",
    models="Qwen 2, 2.5, 2.5-Coder, R1-Distill-Qwen",
    licence="Apache-2.0 (some sizes: Qwen licences)",
    hf_architecture="Qwen2ForCausalLM",
    gguf_architecture="qwen2",
    hf=HF,
    gguf=GGUF,
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=lambda fields, facts: config_from_gguf("qwen2", fields, facts),
    to_gguf=config_to_gguf,
)
