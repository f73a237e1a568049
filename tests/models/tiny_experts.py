"""Tiny models with routed experts (and what is new beside them), for `tiny_models`."""

from typing import Any

import gguf
import transformers

_QWEN3, _QWEN3_MOE = transformers.Qwen3Config, transformers.Qwen3MoeConfig
_MIXTRAL = transformers.MixtralConfig

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
    "mixtral-window": (_MIXTRAL, {**_ROPE, "sliding_window": 24, "head_dim": 24, "num_local_experts": 5}),
}
UNSAYABLE = {
    "qwen3-bias-window": "no form for a bias of o",
    "qwen3-moe-dense-layer": "no form for dense layers beside those of experts",
    "qwen3-moe-sparse-step": "no form for a bias of o",
}
"""What GGUF has no form for, and we refuse to write."""
LACKING = {"mixtral-window": "windows in the architecture llama"}
"""What a GGUF file says and llama.cpp does not read."""
ARCHITECTURES = {
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
}
"""By model_type."""
_MERGED = {
    "qwen3_moe": ("model.layers.{}.mlp.experts.{}_proj", "model.layers.{}.mlp.gate", ("gate", "up", "down")),
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
    return keys
