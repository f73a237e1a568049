"""Tiny models with latent attention, for `tiny_models`."""

from typing import Any

import transformers

TINY: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {}
