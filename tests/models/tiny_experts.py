"""Tiny models with routed experts (and what is new beside them), for `tiny_models`."""

from typing import Any

import gguf
import transformers

_QWEN3, _QWEN3_MOE = transformers.Qwen3Config, transformers.Qwen3MoeConfig
_MIXTRAL, _LLAMA4 = transformers.MixtralConfig, transformers.Llama4TextConfig

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
_QWEN3_EXPERTS = {"head_dim": 24, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}

_LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
    }
}
_LLAMA4_SIZES = {"head_dim": 24, "num_hidden_layers": 4, "num_local_experts": 4, "intermediate_size_mlp": 80}

TINY: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "qwen3": (_QWEN3, {**_ROPE, "head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-yarn": (_QWEN3, {**_YARN, "head_dim": 24}),
    "qwen3-bias-window": (
        _QWEN3,
        {
            "head_dim": 24,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
        },
    ),
    "qwen3-moe": (_QWEN3_MOE, {**_ROPE, **_QWEN3_EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-yarn": (_QWEN3_MOE, {**_YARN, **_QWEN3_EXPERTS, "norm_topk_prob": True}),
    "qwen3-moe-dense-layer": (_QWEN3_MOE, {**_QWEN3_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1]}),
    "qwen3-moe-sparse-step": (_QWEN3_MOE, {**_QWEN3_EXPERTS, "attention_bias": True, "decoder_sparse_step": 2}),
    "mixtral": (_MIXTRAL, {**_ROPE, "sliding_window": None}),
    # Scout: heads normed, experts in every layer; the layer that does not rotate is the last of four
    "llama-4": (
        _LLAMA4,
        {**_LLAMA4_SIZES, **_LLAMA3, "attention_chunk_size": 24, "floor_scale": 16, "attn_scale": 0.5},
    ),
    # Maverick: heads not normed, dense layers between
    "llama-4-dense-layers": (
        _LLAMA4,
        {
            **_LLAMA4_SIZES,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
            "attention_chunk_size": 24,
            "floor_scale": 16,
        },
    ),
    "llama-4-odd": (
        _LLAMA4,
        {
            **_LLAMA4_SIZES,
            "num_experts_per_tok": 2,
            "moe_layers": [0, 3],
            "no_rope_layers": [0, 1, 1, 0],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
            "attention_chunk_size": 24,
            "attn_temperature_tuning": False,
            "attention_bias": True,
        },
    ),
    "llama-4-16": (_LLAMA4, {**_LLAMA4_SIZES, **_LLAMA3, "num_local_experts": 16}),
    "llama-4-128": (
        _LLAMA4,
        {
            **_LLAMA4_SIZES,
            "num_local_experts": 128,
            "use_qk_norm": False,
            "interleave_moe_layer_step": 2,
            "intermediate_size": 32,
        },
    ),
    "mixtral-window": (_MIXTRAL, {**_ROPE, "sliding_window": 24, "head_dim": 24, "num_local_experts": 5}),
}
UNSAYABLE = {
    "qwen3-bias-window": "no form for a bias of o",
    "qwen3-moe-dense-layer": "no form for dense layers beside those of experts",
    "qwen3-moe-sparse-step": "no form for a bias of o",
    "llama-4": "no form in the architecture llama4 for attention_chunk_size = 24",
    "llama-4-dense-layers": "no form in the architecture llama4 for attention_chunk_size = 24",
    "llama-4-odd": "no form in the architecture llama4 for layers that are not rotated",
}
"""What GGUF has no form for, and we refuse to write."""
LACKING = {"mixtral-window": "windows in the architecture llama"}
"""What a GGUF file says and llama.cpp does not read."""
ARCHITECTURES = {
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "llama4_text": gguf.MODEL_ARCH.LLAMA4,
}
"""By model_type."""
_MERGED = {
    "qwen3_moe": ("model.layers.{}.mlp.experts.{}_proj", "model.layers.{}.mlp.gate", ("gate", "up", "down")),
    "llama4_text": (
        "model.layers.{}.feed_forward.experts.{}_proj",
        "model.layers.{}.feed_forward.router",
        ("gate", "up", "down"),
    ),
    "mixtral": ("layers.{}.feed_forward.experts.{}", "model.layers.{}.block_sparse_moe.gate", ("w1", "w3", "w2")),
}
"""What llama.cpp's converter calls stacked experts and the router before it looks up their names."""


def merged_name(family: str, weight: str) -> str | None:
    """That of a weight of ours which Hugging Face has not under one name; None: any other."""
    if family not in _MERGED or "feed_forward." not in weight:
        return None
    experts, router, parts = _MERGED[family]
    _, layer, part = weight.split(".", 2)
    if part == "feed_forward.router":
        return router.format(layer) + ".weight"
    for ours, theirs in zip(("gate", "up", "down"), parts, strict=True):
        if part == f"feed_forward.shared.{ours}":
            return f"model.layers.{layer}.feed_forward.shared_expert.{ours}_proj.weight"
        if part == f"feed_forward.experts.{ours}":
            return experts.format(layer, theirs) + ".weight"
    return None


def expected_metadata(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """What llama.cpp's converter writes of experts, with {arch} for the architecture."""
    llm = gguf.Keys.LLM
    keys = {}
    if (n_experts := getattr(config, "num_local_experts", None)) is not None:
        keys = {llm.EXPERT_COUNT: n_experts, llm.EXPERT_USED_COUNT: config.num_experts_per_tok}
    if config.model_type == "qwen3_moe":
        # the size of dense layers, of which there are none: a size that is there
        keys |= {
            llm.EXPERT_FEED_FORWARD_LENGTH: config.moe_intermediate_size,
            llm.FEED_FORWARD_LENGTH: config.moe_intermediate_size,
        }
    if config.model_type == "llama4_text":
        keys |= {
            llm.EXPERT_FEED_FORWARD_LENGTH: config.intermediate_size,
            llm.INTERLEAVE_MOE_LAYER_STEP: config.interleave_moe_layer_step,
            llm.FEED_FORWARD_LENGTH: config.intermediate_size
            if config.interleave_moe_layer_step == 1
            else config.intermediate_size_mlp,
            llm.VOCAB_SIZE: config.vocab_size,
            gguf.Keys.Attention.KEY_LENGTH: config.head_dim,
        }
    return keys
