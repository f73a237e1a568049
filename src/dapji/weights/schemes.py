"""Schemes: which format each tensor of a model gets, under the names that llama.cpp's llama-quantize uses.

A mix spends more bits where few weights matter much: the head, and for some layers the attention values and the
feed-forward outputs. Knows tensor names of GGUF, no files and no arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dapji.ops.formats import FORMATS, Format
from dapji.ops.tensor import Tensor

Layer = tuple[int, int]
"""Number of a layer, and how many there are."""


def _spread(layer: Layer) -> bool:
    """The first and the last eighth, and every third layer between."""
    i, n = layer
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first_eighth(layer: Layer) -> bool:
    return layer[0] < layer[1] // 8


def _first_four(layer: Layer) -> bool:
    return layer[0] < 4


@dataclass(frozen=True, kw_only=True)
class Scheme:
    name: str
    file_type: int
    """general.file_type"""
    default: str
    better: str | None = None
    """What the layers chosen below get."""
    better_values: Callable[[Layer], bool] = lambda layer: False
    """For attn_v, and for attn_qkv, which has the values in it."""
    better_down: Callable[[Layer], bool] = lambda layer: False
    """For ffn_down, of experts too."""


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="F32", file_type=0, default="F32"),
        Scheme(name="F16", file_type=1, default="F16"),
        Scheme(name="BF16", file_type=32, default="BF16"),
        Scheme(name="Q8_0", file_type=7, default="Q8_0"),
        Scheme(name="Q6_K", file_type=18, default="Q6_K"),
        Scheme(
            name="Q5_K_M",
            file_type=17,
            default="Q5_K",
            better="Q6_K",
            better_values=_spread,
            better_down=_spread,
        ),
        Scheme(
            name="Q4_K_M",
            file_type=15,
            default="Q4_K",
            better="Q6_K",
            better_values=_spread,
            better_down=_spread,
        ),
        Scheme(
            name="Q4_K_S",
            file_type=14,
            default="Q4_K",
            better="Q5_K",
            better_values=_first_four,
            better_down=_first_eighth,
        ),
        Scheme(name="Q4_0", file_type=2, default="Q4_0"),
    )
}

_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are no multiple of 256."""
_LAYER = re.compile(r"blk\.(\d+)\.")


def choose_formats(tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Format]:
    """The format of every tensor of a GGUF model: vectors and routers F32, other matrices by the scheme."""
    n_layers = 1 + max((int(match[1]) for name in tensors if (match := _LAYER.match(name))), default=-1)
    return {name: FORMATS[_choose(name, tensors, scheme, n_layers)] for name in tensors}


def _choose(name: str, tensors: Mapping[str, Tensor], scheme: Scheme, n_layers: int) -> str:
    tensor = tensors[name]
    if len(tensor.shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    if not name.endswith(".weight") or name.endswith("_norm.weight"):
        return tensor.format.name
    chosen = scheme.default
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    if name == head and chosen.startswith(("Q4", "Q5")):
        chosen = "Q6_K"
    elif match := _LAYER.match(name):
        chosen = _choose_in_layer(name[match.end() :], (int(match[1]), n_layers), tensors, scheme)
    if tensor.cols % FORMATS[chosen].block:
        chosen = _FALLBACKS.get(chosen, chosen)
    return chosen if tensor.cols % FORMATS[chosen].block == 0 else "F16"


def _choose_in_layer(part: str, layer: Layer, tensors: Mapping[str, Tensor], scheme: Scheme) -> str:
    """part: of the tensor's name, after the layer's number."""
    chosen = scheme.default
    if _n_experts(tensors) == 8 and FORMATS[chosen].block > 1:
        # Mixtral: attention is little beside the experts, so that more bits cost nearly nothing
        if part in ("attn_k.weight", "attn_v.weight"):
            return "Q8_0"
        if part == "attn_output.weight" and chosen == "Q4_K":
            return "Q5_K"
    values, down = part in ("attn_v.weight", "attn_qkv.weight"), part.startswith("ffn_down")
    if scheme.better and ((values and scheme.better_values(layer)) or (down and scheme.better_down(layer))):
        return scheme.better
    if chosen == "Q4_K" and values and _is_70b(tensors, layer[1]):
        return "Q5_K"
    return chosen


def _n_experts(tensors: Mapping[str, Tensor]) -> int:
    return next((tensors[name].shape[0] for name in tensors if name.endswith("ffn_down_exps.weight")), 0)


def _is_70b(tensors: Mapping[str, Tensor], n_layers: int) -> bool:
    """80 layers with grouped heads, whose attn_v is so small that more bits cost nearly nothing."""
    q, k = tensors.get("blk.0.attn_q.weight"), tensors.get("blk.0.attn_k.weight")
    return n_layers == 80 and q is not None and k is not None and q.rows != k.rows
