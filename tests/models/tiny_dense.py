"""Tiny models whose dense layers differ from the plain ones: norms elsewhere, windows in some layers, caps, for `tiny_models`."""

from typing import Any

import transformers

TINY: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {}
