"""Tiny models of dense layers that differ from the plain ones (norms, windows, caps), for `tiny_models`."""

from typing import Any

import transformers

TINY: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {}
