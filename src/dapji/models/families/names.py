"""Weight names, both ways: Hugging Face <-> canonical <-> GGUF, and the order of rows where it differs.

Every family here uses the same names. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, ModelConfig, weight_shapes
from dapji.models.families.fields import listed
from dapji.ops.tensor import Tensor

_HF = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_HF_LAYER = {
    "attention.norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "feed_forward.norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_GGUF = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
_GGUF_LAYER = {
    "attention.norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "feed_forward.norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate",
    "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}


def hf_name(name: str) -> str:
    """Canonical -> Hugging Face."""
    return _foreign(name, _HF, _HF_LAYER, "model.layers")


def gguf_name(name: str) -> str:
    """Canonical -> GGUF."""
    return _foreign(name, _GGUF, _GGUF_LAYER, "blk")


def _foreign(name: str, whole: Mapping[str, str], layer: Mapping[str, str], layers: str) -> str:
    if name in whole:
        return whole[name]
    _, index, part = name.split(".", 2)
    kind = "bias" if part.endswith("_bias") else "weight"
    return f"{layers}.{index}.{layer[part.removesuffix('_bias')]}.{kind}"


def take(config: ModelConfig, tensors: Mapping[str, Tensor], foreign: Callable[[str], str]) -> dict[str, Tensor]:
    """The weights of `config` under their canonical names, out of tensors under foreign names.

    Raises ConfigError unless exactly these tensors are there, each of the shape that the configuration says.
    """
    shapes = weight_shapes(config)
    names = {name: foreign(name) for name in shapes}
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise ConfigError(f"missing {_tensors(missing)}: {listed(missing)}")
    unexpected = sorted(tensors.keys() - names.values())
    if unexpected:
        raise ConfigError(f"unexpected {_tensors(unexpected)}: {listed(unexpected)}")
    for name, shape in shapes.items():
        tensor = tensors[names[name]]
        if tensor.shape != shape:
            raise ConfigError(f"{names[name]} has shape {list(tensor.shape)}, but the configuration says {list(shape)}")
    return {name: tensors[names[name]] for name in shapes}


def _tensors(names: list[str]) -> str:
    return "tensor" if len(names) == 1 else f"{len(names)} tensors"


def interleave(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of q and k from halves (pairs i, i + dim/2: ours and Hugging Face's) to GGUF's (pairs 2i, 2i + 1)."""
    return _reorder(config, tensors, lambda pairs: pairs.T)


def halve(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `interleave`."""
    return _reorder(config, tensors, lambda pairs: pairs.reshape(-1, 2).T)


def _reorder(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    order: Callable[[NDArray[np.int64]], NDArray[np.int64]],
) -> dict[str, Tensor]:
    reordered = dict(tensors)
    for i, layer in enumerate(config.layers):
        for name, n_heads in (("q", layer.attention.n_heads), ("k", layer.attention.n_kv_heads)):
            index = _rows(layer.attention, n_heads, order)
            weight, bias = f"layers.{i}.attention.{name}", f"layers.{i}.attention.{name}_bias"
            reordered[weight] = tensors[weight].take_rows(index)
            if bias in tensors:
                reordered[bias] = _take_values(tensors[bias], index)
    return reordered


def _rows(
    attention: AttentionConfig, n_heads: int, order: Callable[[NDArray[np.int64]], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Which row comes where: within each head, the rotated rows [2, dim/2] in `order`, the rest in place."""
    head = np.arange(attention.head_dim, dtype=np.int64)
    if attention.rope is not None:
        rotated = head[: attention.rope.dim]
        head = np.concatenate([order(rotated.reshape(2, -1)).ravel(), head[attention.rope.dim :]])
    return (np.arange(n_heads, dtype=np.int64)[:, None] * attention.head_dim + head).ravel()


def _take_values(vector: Tensor, index: NDArray[np.int64]) -> Tensor:
    """The same vector with its values in the order of `index`."""
    if vector.format.block > 1:
        raise ConfigError(f"{vector.name}: the format {vector.format.name} is not supported for a bias")
    values = vector.data.reshape(vector.cols, vector.format.block_bytes)[index]
    return Tensor(name=vector.name, format=vector.format, shape=vector.shape, stored=values.reshape(1, -1))
