"""Tiny models with routed experts (and what is new beside them), for `tiny_models`."""

from typing import Any

import transformers

TINY: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {}
