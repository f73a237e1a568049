"""A whole model from and to foreign formats: configuration and weights together, so that each checks the other.

Takes and returns plain mappings: the files are read and written in `weights`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dapji.errors import ConfigError
from dapji.models.config import ModelConfig, weight_shapes
from dapji.models.families import fp8
from dapji.models.families.deepseek_v2 import DEEPSEEK_V2
from dapji.models.families.deepseek_v3 import DEEPSEEK_V3
from dapji.models.families.exaone import EXAONE
from dapji.models.families.exaone4 import EXAONE4
from dapji.models.families.family import HF_IGNORABLE, Family, GgufFacts
from dapji.models.families.fields import Fields
from dapji.models.families.gemma import GEMMA2, GEMMA3
from dapji.models.families.kimi_k2 import KIMI_K2
from dapji.models.families.layout import GGUF, Layout, Rule, give, take
from dapji.models.families.llama import LLAMA
from dapji.models.families.llama4 import LLAMA4
from dapji.models.families.mistral import MISTRAL
from dapji.models.families.mixtral import MIXTRAL
from dapji.models.families.phi3 import PHI3
from dapji.models.families.qwen2 import QWEN2
from dapji.models.families.qwen3 import QWEN3
from dapji.models.families.qwen3_moe import QWEN3_MOE
from dapji.models.families.rope import ROPE_TENSORS, rope_tensors
from dapji.models.families.smollm3 import SMOLLM3
from dapji.ops.tensor import Tensor

FAMILIES = (
    MIXTRAL,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    LLAMA4,
    EXAONE,
    EXAONE4,
    GEMMA2,
    GEMMA3,
    PHI3,
    SMOLLM3,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    KIMI_K2,
)
"""Of those with one GGUF architecture, the first that has the file's mechanisms reads it."""

_HF_DECODER = "model."
"""What names begin with, unless the decoder was saved for itself, without the class that draws tokens."""
RANK_HEAD = "cls.output.weight"
"""Of GGUF: a matrix beside the decoder, which weights/embedding.py reads."""

_HF_RECOMPUTED = ".self_attn.rotary_emb.inv_freq"
"""Tensors that old checkpoints carry and that follow from the configuration."""


def from_hf(config_json: Mapping[str, object], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model out of a Hugging Face folder: the parsed `config.json` and the tensors of its safetensors.

    Returns the configuration and the weights by canonical name. Raises ConfigError on an unsupported family, on
    unknown keys, unsupported values, missing or unexpected tensors and wrong shapes.
    """
    family, fields, prefix = _read_config(config_json)
    config = family.from_hf(fields)
    stored = {
        name.removeprefix(prefix): tensors[name]
        for name in tensors
        if not name.endswith(_HF_RECOMPUTED) and not (prefix and name.startswith(_left_out(family)))
    }
    head_name, embed_name = family.hf.name("head"), family.hf.name("embed")
    if embed_name not in stored and embed_name.removeprefix(_HF_DECODER) in stored:
        stored = {_HF_DECODER + name: tensor for name, tensor in stored.items()}
        config = replace(config, headless=not config.tied_head, tied_head=True)
    given = fp8.dequantized(config_json, stored)
    if config.tied_head and (head := given.pop(head_name, None)) is not None:
        embed = given.get(embed_name)
        if embed is not None and not _same(head, embed):
            raise ConfigError(
                f"config.json says tie_word_embeddings, but {head_name} differs from {embed_name}",
                hint="set tie_word_embeddings to false if the head is a matrix of its own",
            )
    _check_room(config, given)
    layout = _hf_layout(family, fields)
    predictors = [
        name for rule in layout.all_rules(config) if rule.ours[0].startswith("predictors.") for name in rule.foreign
    ]
    if not any(name in given for name in predictors):
        # transformers writes how many there are, and leaves their weights out
        config = replace(config, predictors=())
    return config, take(layout.all_rules(config), given)


def config_from_hf(config_json: Mapping[str, object]) -> ModelConfig:
    """The configuration alone, whatever the weights are stored as."""
    family, fields, _ = _read_config(config_json)
    return family.from_hf(fields)


def _read_config(config_json: Mapping[str, object]) -> tuple[Family, Fields, str]:
    """The family, the fields of its decoder, and what its tensors' names begin with beside their own."""
    fields = Fields(_without_storage(config_json), where="config.json")
    types = {family.name: (family, False) for family in FAMILIES}
    types |= {family.wrapper.model_type: (family, True) for family in FAMILIES if family.wrapper is not None}
    family, wrapped = fields.choice("model_type", types)
    if not wrapped:
        return family, fields, ""
    assert family.wrapper is not None
    inner = fields.mapping("text_config")
    inner.require("model_type", family.name)
    fields.require("tie_word_embeddings", inner.boolean("tie_word_embeddings", False))
    fields.finish((*HF_IGNORABLE, *family.wrapper.ignorable))
    return family, inner, family.wrapper.prefix


def _hf_layout(family: Family, fields: Fields) -> Layout:
    return family.hf if family.hf_layout is None else family.hf_layout(fields)


def hf_layout_of(family: Family, config_json: Mapping[str, object] | None) -> Layout:
    """Of a folder with that config.json; None: as we write it, and as published."""
    return family.hf if config_json is None else _hf_layout(family, _read_config(config_json)[1])


def _without_storage(config_json: Mapping[str, object]) -> dict[str, object]:
    """What it says of the model, and not of how its weights are stored."""
    return {
        key: _without_storage(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in config_json.items()
        if key != fp8.KEY
    }


def _check_room(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Rules make lists as long as a weight has rows, before they see a tensor: a hostile size must not get that far."""
    if config.n_layers > len(tensors):  # before a table is made of every weight
        raise ConfigError(f"the configuration says {config.n_layers} layers, but there are only {len(tensors)} tensors")
    values = sum(math.prod(tensor.shape) for tensor in tensors.values())
    for name, shape in weight_shapes(replace(config, predictors=())).items():
        if math.prod(shape) > values:
            raise ConfigError(
                f"the configuration says {list(shape)} for {name}, but all tensors together have {values} values"
            )


def _left_out(family: Family) -> tuple[str, ...]:
    return () if family.wrapper is None else family.wrapper.left_out


def to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The inverse: a `config.json` that transformers loads (without token ids, which the tokenizer knows) and the
    tensors by their names there. Raises ConfigError where the family's config.json cannot say something."""
    family = family_of(config)
    config_json = {"model_type": family.name, "architectures": [family.hf_architecture], **family.to_hf(config)}
    named = give(family.hf.all_rules(config), tensors)
    if config.headless:
        config_json["tie_word_embeddings"] = False
        named = {name.removeprefix(_HF_DECODER): tensor for name, tensor in named.items()}
    return config_json, named


def from_gguf(metadata: Mapping[str, object], tensors: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model out of a GGUF file's metadata and tensors; errors as `from_hf`.

    Metadata of other subjects (general.*, tokenizer.*) is not looked at.
    """
    config, rules, given = _read_gguf(metadata, tensors)
    return config, take(rules, given)


def changed_gguf(
    metadata: Mapping[str, object], tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of a GGUF file, of which those that hold one of `weights` (by canonical name) are made anew."""
    _, rules, given = _read_gguf(metadata, tensors)
    own = {**take(rules, given), **weights}
    return {**tensors, **give([rule for rule in rules if any(name in weights for name in rule.ours)], own)}


def _read_gguf(
    metadata: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> tuple[ModelConfig, list[Rule], dict[str, Tensor]]:
    """The configuration, the rules of the file's layout, and the tensors that they are about."""
    architecture = Fields(metadata, where="GGUF", prefix="general.").choice(
        "architecture", {family.gguf_architecture: family.gguf_architecture for family in FAMILIES}
    )
    embed = GGUF.name("embed")
    if embed not in tensors:
        raise ConfigError(f"missing tensor: {embed}")
    given = {name: tensors[name] for name in tensors if name != RANK_HEAD}
    ropes = {name: given.pop(name) for name in ROPE_TENSORS if name in given}
    fields = Fields(metadata, where="GGUF", prefix=f"{architecture}.")
    family = next(f for f in FAMILIES if f.gguf_architecture == architecture and f.reads_gguf(fields))
    if others := [name for name in ropes if name not in family.rope_tensors]:
        raise ConfigError(f"GGUF: {others[0]} is not supported in the architecture {architecture}")
    facts = GgufFacts(
        vocab_size=given[embed].shape[0],
        names=given.keys(),
        rope_tensors={name: tuple(map(float, tensor.float32().ravel())) for name, tensor in ropes.items()},
    )
    config = family.from_gguf(fields, facts)
    _check_room(config, given)
    layout = family.gguf if family.gguf_layout is None else family.gguf_layout(facts)
    return config, layout.all_rules(config), given


def to_gguf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The inverse: the metadata of the architecture and the tensors by GGUF name, to which the writer adds the
    tokenizer. Raises ConfigError where GGUF cannot say something."""
    family = family_of(config)
    metadata: dict[str, object] = {"general.architecture": family.gguf_architecture}
    for key, value in family.to_gguf(config).items():
        metadata[f"{family.gguf_architecture}.{key}"] = value
    named = give(family.gguf.all_rules(config), tensors)
    for name, factors in _rope_tensors(config).items():
        if name not in family.rope_tensors:
            raise ConfigError(f"GGUF has no form for this rope scaling in the architecture {family.gguf_architecture}")
        named[name] = Tensor.from_float32(name, np.array(factors, dtype=np.float32))
    return metadata, named


def gguf_rules(config: ModelConfig) -> list[Rule]:
    """Which tensors of GGUF hold which weights; rope's aside. For who wants names and shapes without weights."""
    return family_of(config).gguf.all_rules(config)


def _rope_tensors(config: ModelConfig) -> dict[str, tuple[float, ...]]:
    """What the layers that have a rope need of them; to_gguf of the family has seen to it that they need the same."""
    ropes = [layer.attention.rope for layer in config.layers]
    return next((rope_tensors(rope) for rope in ropes if rope is not None), {})


def family_of(config: ModelConfig) -> Family:
    """That which the configuration names."""
    return next(family for family in FAMILIES if family.name == config.family)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.format == b.format and a.shape == b.shape and np.array_equal(a.data, b.data)
