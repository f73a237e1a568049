"""Kimi K2, and the text part of K2.5 and K2.6: DeepSeek V3's mechanisms under a name of their own."""

from __future__ import annotations

from dataclasses import replace

from dapji.models.families.deepseek_v3 import DEEPSEEK_V3, deepseek_v3_from_hf
from dapji.models.families.family import Wrapper

KIMI_K2 = replace(
    DEEPSEEK_V3,
    name="kimi_k2",
    models="Kimi K2, K2.5 (text)",
    licence="Modified MIT",
    from_hf=lambda fields: deepseek_v3_from_hf(fields, "kimi_k2"),
    wrapper=Wrapper(
        model_type="kimi_k25",
        prefix="language_model.",
        left_out=("vision_tower.", "mm_projector."),
        ignorable=(
            "auto_map",
            "ignore_index",
            "media_placeholder_token_id",
            "use_unified_vision_chunk",
            "video_placeholder",
            "vision_config",
        ),
    ),
)
