"""Tiny models with latent attention, for `tiny_models`."""

from typing import Any

import transformers

_V2, _V3 = transformers.DeepseekV2Config, transformers.DeepseekV3Config

_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-5,
}
"""No two sizes are equal, and rms_norm_eps is not that of the latent vectors."""


def _yarn(mscale: float, mscale_all_dim: float, **values: Any) -> dict[str, Any]:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }
    return {"rope_parameters": {**yarn, **values}}


_GROUPS = {"n_group": 4, "topk_group": 2}

TINY: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "deepseek-v2": (
        _V2,
        {
            **_LATENT,
            **_yarn(1.0, 1.0),
            **_GROUPS,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek-v2-lite": (_V2, {**_LATENT, **_yarn(0.707, 0.707), "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek-v3": (_V3, {**_LATENT, **_yarn(1.0, 1.0), **_GROUPS, "n_shared_experts": 1}),
    "deepseek-v3-halves": (
        _V3,
        {**_LATENT, **_yarn(1.0, 0.707), **_GROUPS, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "moonlight": (_V3, {**_LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "kimi-k2": (
        _V3,
        {
            **_LATENT,
            **_yarn(1.0, 1.0, beta_fast=1.0),
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
        },
    ),
}

UNSAYABLE = {"deepseek-v3-halves": "only where mscale and mscale_all_dim are equal"}
LACKING = {"deepseek-v2": "that a group of experts counts as its best, not as its two best"}
"""As in test_llama_cpp.py."""
