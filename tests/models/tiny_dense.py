"""Tiny models of dense layers that differ from the plain ones (norms, windows, caps), for `tiny_models`."""

from typing import Any

import gguf
import numpy as np
import transformers

from dapji.models.config import ModelConfig
from dapji.ops.tensor import Tensor

ORIGINAL, WINDOW = 32, 24
"""As in `tiny_models`."""

_EXAONE4, _PHI3 = transformers.Exaone4Config, transformers.Phi3Config
_GEMMA2, _GEMMA3 = transformers.Gemma2Config, transformers.Gemma3TextConfig

_LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1_000_000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    }
}
_GEMMA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
}


def _longrope(dim: int, **values: Any) -> dict[str, Any]:
    """Phi's: factors that rise with the wavelength."""
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "short_factor": [1 + 0.05 * i for i in range(dim // 2)],
            "long_factor": [1.5 + 0.5 * i for i in range(dim // 2)],
            **values,
        },
        "original_max_position_embeddings": ORIGINAL,
        "pad_token_id": 0,
    }


TINY: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "exaone4": (
        _EXAONE4,
        {**_LLAMA3, "sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True},
    ),
    "exaone4-hybrid": (_EXAONE4, {**_LLAMA3, "num_hidden_layers": 5, "sliding_window": WINDOW}),
    "gemma2": (_GEMMA2, {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-scale": (_GEMMA2, {**_GEMMA, "query_pre_attn_scalar": 7, "attn_logit_softcapping": None}),
    "gemma3": (_GEMMA3, {**_GEMMA, "num_hidden_layers": 7}),
    "gemma3-linear": (
        _GEMMA3,
        {
            **_GEMMA,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": (_PHI3, {"pad_token_id": 0, "sliding_window": WINDOW, "num_key_value_heads": 4}),
    "phi3-longrope": (_PHI3, _longrope(16)),
    "phi4-mini": (_PHI3, {**_longrope(12, partial_rotary_factor=0.75), "tie_word_embeddings": True}),
}

UNSAYABLE = {"gemma2-scale": "gemma2 has softcaps of scores"}
"""What GGUF has no form for, and we refuse to write."""
LACKING = {
    "exaone4-hybrid": "windows in the architecture exaone4, unless it has 64 layers",
    "phi3": "windows in the architecture phi3",
}
"""What a GGUF file says and llama.cpp does not read."""
ARCHITECTURES = {
    "exaone4": gguf.MODEL_ARCH.EXAONE4,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
"""By model_type."""


def expected_metadata(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """What llama.cpp's converter writes of these families alone, with {arch} for the architecture."""
    llm, attention, rope = gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope
    keys: dict[str, Any] = {}
    if config.model_type not in ARCHITECTURES:
        return keys
    if config.model_type == "phi3" or config.sliding_window is not None:
        keys[attention.SLIDING_WINDOW] = config.sliding_window or 0
    if config.model_type == "exaone4" and config.sliding_window is not None:
        keys[attention.SLIDING_WINDOW_PATTERN] = [kind == "sliding_attention" for kind in config.layer_types]
    if config.model_type.startswith("gemma"):
        keys |= {attention.KEY_LENGTH: config.head_dim, attention.VALUE_LENGTH: config.head_dim}
        if config.final_logit_softcapping is not None:
            keys[llm.FINAL_LOGIT_SOFTCAPPING] = config.final_logit_softcapping
        if config.attn_logit_softcapping is not None:
            keys[llm.ATTN_LOGIT_SOFTCAPPING] = config.attn_logit_softcapping
    if config.model_type == "gemma3_text":
        full, local = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
        keys[rope.FREQ_BASE_SWA] = local["rope_theta"]
        if full["rope_type"] == "linear":
            keys |= {rope.SCALING_TYPE: "linear", rope.SCALING_FACTOR: full["factor"]}
    if config.model_type == "phi3":
        head_dim = config.hidden_size // config.num_attention_heads
        keys[rope.DIMENSION_COUNT] = int(head_dim * config.rope_parameters["partial_rotary_factor"])
        if config.rope_parameters["rope_type"] == "longrope":
            scale = config.max_position_embeddings / ORIGINAL
            keys[rope.SCALING_ORIG_CTX_LEN] = ORIGINAL
            keys[rope.SCALING_ATTN_FACTOR] = float(np.sqrt(1 + np.log(scale) / np.log(ORIGINAL)))
    return keys


def as_in_gguf(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights as they come out of a GGUF file: the norms with the offset in them."""
    return {
        name: Tensor.from_float32(name, tensor.float32() + np.float32(config.norm_offset))
        if config.norm_offset and name.endswith("norm")
        else tensor
        for name, tensor in tensors.items()
    }
