"""A whole model from and to foreign formats: configuration and weights together, so that each checks the other.

Takes and returns plain mappings: the files are read and written in `weights`. Weights are renamed and their rows
reordered, never converted, so that every direction is exact in every format.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dapji.errors import ConfigError
from dapji.models.config import ModelConfig, weight_shapes
from dapji.models.families.family import Family, config_from_gguf, config_to_gguf
from dapji.models.families.fields import Fields
from dapji.models.families.llama import LLAMA
from dapji.models.families.mistral import MISTRAL
from dapji.models.families.names import gguf_name, halve, hf_name, interleave, take
from dapji.models.families.qwen2 import QWEN2
from dapji.models.families.rope import gguf_frequency_factors
from dapji.ops.tensor import Tensor

FAMILIES = (LLAMA, MISTRAL, QWEN2)
"""Of those with one GGUF architecture, the first that has the file's mechanisms reads it."""

_ROPE_FREQS = "rope_freqs.weight"
_HF_RECOMPUTED = ".self_attn.rotary_emb.inv_freq"
"""Tensors that old checkpoints carry and that follow from the configuration."""


def from_hf(config_json: Mapping[str, object], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model out of a Hugging Face folder: the parsed `config.json` and the tensors of its safetensors.

    Returns the configuration and the weights by canonical name. Raises ConfigError on an unsupported family, on
    unknown keys, unsupported values, missing or unexpected tensors and wrong shapes.
    """
    config = config_from_hf(config_json)
    given = {name: tensors[name] for name in tensors if not name.endswith(_HF_RECOMPUTED)}
    if config.tied_head and (head := given.pop(hf_name("head"), None)) is not None:
        embed = given.get(hf_name("embed"))
        if embed is not None and not _same(head, embed):
            raise ConfigError(
                f"config.json says tie_word_embeddings, but {hf_name('head')} differs from {hf_name('embed')}",
                hint="set tie_word_embeddings to false if the head is a matrix of its own",
            )
    return config, take(config, given, hf_name)


def config_from_hf(config_json: Mapping[str, object]) -> ModelConfig:
    """The configuration alone."""
    fields = Fields(config_json, where="config.json")
    return fields.choice("model_type", {family.name: family for family in FAMILIES}).from_hf(fields)


def to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The inverse: a `config.json` that transformers loads (without token ids, which the tokenizer knows) and the
    tensors by their names there. Raises ConfigError where the family's config.json cannot say something."""
    family = _family(config)
    config_json = {"model_type": family.name, "architectures": [family.hf_architecture], **family.to_hf(config)}
    return config_json, {hf_name(name): tensors[name] for name in weight_shapes(config)}


def from_gguf(metadata: Mapping[str, object], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model out of a GGUF file's metadata and tensors; errors as `from_hf`.

    Metadata of other subjects (general.*, tokenizer.*) is not looked at.
    """
    architecture = Fields(metadata, where="GGUF", prefix="general.").choice(
        "architecture", {family.gguf_architecture: family.gguf_architecture for family in FAMILIES}
    )
    embed = gguf_name("embed")
    if embed not in tensors:
        raise ConfigError(f"missing tensor: {embed}")
    given = {name: tensors[name] for name in tensors}
    factors = given.pop(_ROPE_FREQS, None)
    fields = Fields(metadata, where="GGUF", prefix=f"{architecture}.")
    window = "attention.sliding_window" in fields
    family = next(f for f in FAMILIES if f.gguf_architecture == architecture and (f.window or not window))
    if factors is not None and not family.rope_freqs:
        raise ConfigError(f"GGUF: {_ROPE_FREQS} is not supported in the architecture {architecture}")
    config = config_from_gguf(
        family.name,
        fields,
        vocab_size=given[embed].shape[0],
        tied_head=gguf_name("head") not in given,
        qkv_bias=gguf_name("layers.0.attention.q_bias") in given,
        out_bias=gguf_name("layers.0.attention.o_bias") in given,
        feed_forward_bias=gguf_name("layers.0.feed_forward.down_bias") in given,
        frequency_factors=None if factors is None else tuple(float(factor) for factor in factors.float32().ravel()),
    )
    weights = take(config, given, gguf_name)
    return config, halve(config, weights) if family.interleaved else weights


def to_gguf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The inverse: the metadata of the architecture and the tensors by GGUF name, to which the writer adds the
    tokenizer. Raises ConfigError where GGUF cannot say something."""
    family = _family(config)
    metadata: dict[str, object] = {"general.architecture": family.gguf_architecture}
    for key, value in config_to_gguf(config).items():
        metadata[f"{family.gguf_architecture}.{key}"] = value
    ordered = interleave(config, tensors) if family.interleaved else tensors
    named = {gguf_name(name): ordered[name] for name in weight_shapes(config)}
    rope = config.layers[0].attention.rope
    factors = None if rope is None else gguf_frequency_factors(rope)
    if factors is not None:
        if not family.rope_freqs:
            raise ConfigError(f"GGUF has no form for this rope scaling in the architecture {family.gguf_architecture}")
        named[_ROPE_FREQS] = Tensor.from_float32(_ROPE_FREQS, np.array(factors, dtype=np.float32))
    return metadata, named


def _family(config: ModelConfig) -> Family:
    return next(family for family in FAMILIES if family.name == config.family)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.format == b.format and a.shape == b.shape and np.array_equal(a.data, b.data)
