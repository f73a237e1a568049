"""Families of models: foreign configurations and weight names, both ways. One small module per family."""

from dapji.models.families.adapters import adapter_from_gguf, adapter_from_peft, adapter_to_gguf, adapter_to_peft
from dapji.models.families.translate import (
    FAMILIES,
    RANK_HEAD,
    changed_gguf,
    config_from_hf,
    from_gguf,
    from_hf,
    gguf_rules,
    to_gguf,
    to_hf,
)

__all__ = [
    "FAMILIES",
    "RANK_HEAD",
    "adapter_from_gguf",
    "adapter_from_peft",
    "adapter_to_gguf",
    "adapter_to_peft",
    "changed_gguf",
    "config_from_hf",
    "from_gguf",
    "from_hf",
    "gguf_rules",
    "to_gguf",
    "to_hf",
]
