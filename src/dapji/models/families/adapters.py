"""Adapters in foreign formats: PEFT's folders and llama.cpp's GGUF files, by the layouts that their models have.

A layout moves the rows of a weight; those of an adapter's B move with them, whatever is fused, split or rotated. Takes
plain mappings: the files are read in `weights`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from dapji.errors import ConfigError
from dapji.models.adapter import Adapter, adaptable
from dapji.models.config import ModelConfig, Shape
from dapji.models.families.fields import Fields, listed
from dapji.models.families.layout import Index, Rule
from dapji.models.families.translate import family_of, hf_layout_of
from dapji.ops.formats import FORMATS, Bytes
from dapji.ops.low_rank import LowRank
from dapji.ops.tensor import Tensor

_PEFT = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"
"""What its name ends in, after the module's."""
_PEFT_IGNORABLE = (
    # by whom, of what, on what
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    # which weights: the tensors say it
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    # training, and how it began
    "lora_dropout",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "ensure_weight_tying",
    "megatron_config",
    "megatron_core",
    "runtime_config",
    # of use_qalora
    "qalora_group_size",
)
_PEFT_REFUSED = (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "lora_bias",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
"""What changes more than low-rank matrices can, or in another way."""
_MERGE = "merge it into its base with PEFT, and use the result as a model of its own"
_OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of ways to initialise that take from the base what they give to the adapter."""
_GGUF_KEYS = ("type", "lora.alpha", "lora.task_name", "lora.prompt_prefix")


@dataclass(frozen=True, kw_only=True)
class _Foreign:
    """A pair as it is stored, for one foreign weight."""

    a: Tensor
    b: Tensor
    rank: int
    """What the configuration says."""
    scale: float
    magnitude: Tensor | None = None


def adapter_from_peft(
    config: ModelConfig,
    adapter_config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    *,
    config_json: Mapping[str, object] | None = None,
) -> Adapter:
    """An adapter for that model out of PEFT's parsed adapter_config.json and the tensors of adapter_model.safetensors.

    config_json: of the model, where it came from a folder; else it is taken to be laid out as the family's folders are.
    Raises ConfigError on another method than LoRA, on keys that are unknown or change more than that, and where the
    tensors do not fit the model.
    """
    fields = Fields({k: v for k, v in adapter_config.items() if v not in (None, [], {})}, where=_PEFT)
    fields.choice("peft_type", {"LORA": None})
    for key in _PEFT_REFUSED:
        if adapter_config.get(key):
            raise ConfigError(f"{_PEFT}: {key} is not supported in an adapter", hint=_MERGE)
    if fields.holds("init_lora_weights", str) and fields.string("init_lora_weights").startswith(_OWN_BASE):
        raise ConfigError(
            f"{_PEFT}: init_lora_weights {fields.string('init_lora_weights')!r} is for a base that it has changed",
            hint="convert it when it is saved: save_pretrained(path_initial_model_for_weight_conversion=…)",
        )
    fields.choice("bias", {"none": None}, "none")
    rank, alpha = fields.integer("r", 8), fields.number("lora_alpha", 8)
    root, dora = fields.boolean("use_rslora", False), fields.boolean("use_dora", False)
    ranks, alphas = _pattern(adapter_config, "rank_pattern"), _pattern(adapter_config, "alpha_pattern")
    fields.finish((*_PEFT_IGNORABLE, *_PEFT_REFUSED, "init_lora_weights", "rank_pattern", "alpha_pattern"))
    family = family_of(config)
    given: dict[str, _Foreign] = {}
    matrices, magnitudes = dict(tensors), {}
    if dora:
        magnitudes = {n.removesuffix(_MAGNITUDE): matrices.pop(n) for n in tensors if n.endswith(_MAGNITUDE)}
    for module, a, b in _paired(matrices, ".lora_A.weight", ".lora_B.weight"):
        magnitude = magnitudes.pop(module, None)
        if dora and magnitude is None:
            raise ConfigError(f"the adapter lacks {module}{_MAGNITUDE}")
        name = module.removeprefix(_PEFT_PREFIX)
        own = int(_matching(ranks, name, rank))
        scale = _matching(alphas, name, alpha) / (math.sqrt(own) if root else own)
        if family.wrapper is not None:
            name = name.removeprefix(family.wrapper.prefix)
        given[f"{name}.weight"] = _Foreign(a=a, b=b, rank=own, scale=scale, magnitude=magnitude)
    if magnitudes:
        raise ConfigError(f"the adapter has magnitudes without matrices: {listed(sorted(magnitudes))}")
    return _adapter(config, hf_layout_of(family, config_json).all_rules(config), given)


def adapter_to_peft(config: ModelConfig, adapter: Adapter) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The inverse of `adapter_from_peft`, of a folder as we write it: adapter_config.json and the tensors.

    Where the layout joins matrices, a joined one has the ranks of all of them together. Raises ConfigError where it
    splits one, and where only some have a magnitude, or some parts of a joined one.
    """
    dora = {name for name, pair in adapter.pairs.items() if pair.magnitude is not None}
    if dora and (other := sorted(adapter.pairs.keys() - dora)):
        raise ConfigError(f"the adapter has no magnitude for {other[0]}; PEFT's have one for all matrices or for none")
    rules = hf_layout_of(family_of(config), None).all_rules(config)
    modules = {weight.removesuffix(".weight"): pair for weight, pair in _foreign_pairs(rules, adapter)}
    shapes = adaptable(config)
    every = {rule.foreign[0].removesuffix(".weight") for rule in rules if any(name in shapes for name in rule.ours)}
    ranks = Counter(pair.rank for pair in modules.values())
    rank, scale = ranks.most_common(1)[0][0], next(iter(adapter.pairs.values())).scale
    own_rank = {module: pair.rank for module, pair in modules.items() if pair.rank != rank}
    own_alpha = {m: pair.scale * pair.rank for m, pair in modules.items() if pair.scale * pair.rank != scale * rank}
    ends = {module.rpartition(".")[2] for module in modules}
    whole = all(module in modules for module in every if module.rpartition(".")[2] in ends)
    adapter_config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": own_rank,
        "alpha_pattern": own_alpha,
        "use_dora": bool(dora),
        "target_modules": sorted(ends if whole else modules),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for module, pair in modules.items():
        tensors[f"{_PEFT_PREFIX}{module}.lora_A.weight"] = pair.a
        tensors[f"{_PEFT_PREFIX}{module}.lora_B.weight"] = pair.b
        if pair.magnitude is not None:
            name = f"{_PEFT_PREFIX}{module}{_MAGNITUDE}"
            tensors[name] = Tensor.from_float32(name, pair.magnitude)
    return adapter_config, tensors


def _foreign_pairs(rules: Sequence[Rule], adapter: Adapter) -> Iterator[tuple[str, LowRank]]:
    """The foreign matrices that it changes, and how. Raises ConfigError where one of ours is several of them."""
    for rule in rules:
        if changed := [name for name in rule.ours if name in adapter.pairs]:
            if len(rule.foreign) > 1:
                raise ConfigError(f"the adapter changes {changed[0]}, which is {listed(rule.foreign)} there")
            yield rule.foreign[0], _joined(rule, adapter)


def _joined(rule: Rule, adapter: Adapter) -> LowRank:
    """The pair for the one foreign matrix of a rule: each of ours has rows of A, and columns of B, of its own, unless
    they share A, as after they were read from such a matrix."""
    name, n_rows = rule.foreign[0], rule.shapes[0][0]
    parts = [(adapter.pairs[own], order) for own, order in _parts(rule, rule.shapes[0]) if own in adapter.pairs]
    first, scale = parts[0][0], parts[0][0].scale
    whole = len(parts) == len(rule.ours)
    magnitude = None if first.magnitude is None else np.zeros(n_rows, dtype=np.float32)
    if magnitude is not None:
        if not whole:  # whose rows would keep lengths that only the base knows
            missing = next(own for own in rule.ours if own not in adapter.pairs)
            raise ConfigError(f"the adapter has no magnitude for {missing}, which PEFT has as a part of {name}")
        for pair, order in parts:
            magnitude[slice(None) if order is None else order] = pair.magnitude
    if whole and all(pair.a is first.a and pair.scale == scale for pair, _ in parts):
        rows = first.b
        if len(parts) > 1:
            rows = Tensor.joined(f"{name} b", [pair.b for pair, _ in parts], n_rows, first.rank)
        orders = [order for _, order in parts if order is not None]
        rows = rows.take_rows(np.argsort(np.concatenate(orders))) if orders else rows
        return LowRank(a=first.a, b=rows, scale=scale, magnitude=magnitude)
    a = np.concatenate([pair.a.float32() for pair, _ in parts])
    b = np.zeros((n_rows, len(a)), dtype=np.float32)
    at = 0
    for pair, order in parts:
        b[slice(None) if order is None else order, at : at + pair.rank] = pair.b.float32() * (pair.scale / scale)
        at += pair.rank
    return LowRank(
        a=Tensor.from_float32(f"{name} a", a), b=Tensor.from_float32(f"{name} b", b), scale=scale, magnitude=magnitude
    )


def adapter_from_gguf(config: ModelConfig, metadata: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Adapter:
    """The same out of a GGUF file of the type adapter, as llama.cpp writes it."""
    family = family_of(config)
    general = Fields(metadata, where="GGUF", prefix="general.")
    general.choice("type", {"adapter": None}, "model")
    architecture = general.string("architecture")
    if architecture != family.gguf_architecture:
        raise ConfigError(f"the adapter is for a {architecture}, but the model is a {family.gguf_architecture}")
    fields = Fields(metadata, where="GGUF", prefix="adapter.")
    fields.choice("type", {"lora": None})
    alpha = fields.number("lora.alpha")
    fields.finish(_GGUF_KEYS)
    given = {
        weight: _Foreign(a=a, b=b, rank=a.shape[0], scale=alpha / a.shape[0] if alpha else 1.0)
        for weight, a, b in _paired(tensors, ".lora_a", ".lora_b")
    }
    return _adapter(config, family.gguf.all_rules(config), given)


def adapter_to_gguf(config: ModelConfig, adapter: Adapter) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The inverse of `adapter_from_gguf`: the metadata, to which a writer adds a name, and the tensors.

    The file has one alpha (of float32) for all matrices, whose scale is alpha / rank; those of another scale have it in
    B, as float32. Raises ConfigError where GGUF splits a matrix that the adapter changes, and of magnitudes.
    """
    if dora := [name for name, pair in adapter.pairs.items() if pair.magnitude is not None]:
        raise ConfigError(
            f"the adapter has a magnitude for {dora[0]} (DoRA), for which GGUF has no form",
            hint="dapji merge puts it into the model's own weights",
        )
    family = family_of(config)
    pairs = dict(_foreign_pairs(family.gguf.all_rules(config), adapter))
    alphas = Counter(pair.scale * pair.rank for pair in pairs.values())
    alpha = alphas.most_common(1)[0][0] or 1.0  # 0 stands for a scale of 1
    metadata: dict[str, object] = {
        "general.type": "adapter",
        "general.architecture": family.gguf_architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    tensors = {}
    for weight, pair in pairs.items():
        b = pair.b
        if pair.scale * pair.rank != alpha:
            b = Tensor.from_float32(b.name, b.float32() * np.float32(pair.scale * pair.rank / alpha))
        tensors[f"{weight}.lora_a"] = pair.a
        tensors[f"{weight}.lora_b"] = b
    return metadata, tensors


def _paired(tensors: Mapping[str, Tensor], a_end: str, b_end: str) -> list[tuple[str, Tensor, Tensor]]:
    """What stands before the ends, a and b."""
    if others := [name for name in tensors if not name.endswith((a_end, b_end))]:
        raise ConfigError(f"the adapter has more than low-rank matrices: {listed(sorted(others))}", hint=_MERGE)
    pairs = []
    for prefix in dict.fromkeys(name.removesuffix(a_end).removesuffix(b_end) for name in tensors):
        if missing := [prefix + end for end in (a_end, b_end) if prefix + end not in tensors]:
            raise ConfigError(f"the adapter lacks {missing[0]}")
        a, b = tensors[prefix + a_end], tensors[prefix + b_end]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise ConfigError(f"{a.name} and {b.name} have shapes {list(a.shape)} and {list(b.shape)}, no common rank")
        pairs.append((prefix, a, b))
    if not pairs:
        raise ConfigError("the adapter has no tensors")
    return pairs


def _pattern(adapter_config: Mapping[str, object], key: str) -> Mapping[str, float]:
    """Of modules: the end of a name -> its number. PEFT takes regular expressions, of which people write names."""
    values = adapter_config.get(key) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{_PEFT}: {key} must be an object")
    fields = Fields(values, where=f"{_PEFT}: {key}")
    for name in values:
        if not re.fullmatch(r"(\^|\.\*\\?\.)?(\w|\\?\.)+", name):
            raise ConfigError(f"{_PEFT}: {key} has {name!r}, and only names of modules are supported")
    return {name.replace("\\.", ".").removeprefix(".*."): fields.number(name) for name in values}


def _matching(pattern: Mapping[str, float], module: str, default: float) -> float:
    for name, value in pattern.items():
        if f".{module}".endswith(f".{name}") or f"^{module}" == name:
            return value
    return default


def _adapter(config: ModelConfig, rules: Sequence[Rule], given: Mapping[str, _Foreign]) -> Adapter:
    """given: by foreign name of the weight."""
    by_name = {rule.foreign[0]: rule for rule in rules if len(rule.foreign) == 1}
    shapes = adaptable(config)
    pairs: dict[str, LowRank] = {}
    for weight, pair in given.items():
        if weight not in by_name:
            raise ConfigError(
                f"the adapter changes {weight.removesuffix('.weight')}, which is no matrix of this model that adapters "
                "can change",
                hint="it may be for another model; routed experts are never changed",
            )
        if pair.a.shape[0] != pair.rank:
            raise ConfigError(f"{pair.a.name} has rank {pair.a.shape[0]}, but {_PEFT} says {pair.rank}")
        rule = by_name[weight]
        (shape,) = rule.shapes
        if len(shape) != 2 or (pair.b.shape[0], pair.a.shape[1]) != shape:
            raise ConfigError(
                f"{weight.removesuffix('.weight')} is {list(shape)} in this model, but the adapter's matrices "
                f"{list(pair.b.shape)} and {list(pair.a.shape)} are for {[pair.b.shape[0], pair.a.shape[1]]}",
                hint="the adapter is for another model",
            )
        if pair.magnitude is not None and pair.magnitude.shape != shape[:1]:
            raise ConfigError(f"{pair.magnitude.name} is {list(pair.magnitude.shape)}, but a row has one of {shape[0]}")
        magnitude = None if pair.magnitude is None else pair.magnitude.float32()
        for name, order in _parts(rule, shape):
            if name not in shapes:
                _refuse(weight, name)
            b = pair.b if order is None else pair.b.take_rows(order, f"{pair.b.name} ({name.rpartition('.')[2]})")
            own = magnitude if magnitude is None or order is None else magnitude[order]
            pairs[name] = LowRank(a=pair.a, b=b, scale=pair.scale, magnitude=own)
    adapter = Adapter(pairs=pairs)
    adapter.check(config)
    return adapter


def _parts(rule: Rule, shape: Shape) -> list[tuple[str, Index | None]]:
    """Our weights that the rule makes of a foreign matrix, and which of its rows they are; None: all, as they stand."""

    def unread() -> Bytes:
        raise AssertionError("rows change places by their numbers alone")

    probe = Tensor(name=rule.foreign[0], format=FORMATS["F32"], shape=shape, source=unread)
    parts = list(zip(rule.ours, rule.read([probe]), strict=True))
    for name, part in parts:
        if part.source is not unread or part.cols != shape[1]:
            _refuse(rule.foreign[0], name)
    return [(name, part.order) for name, part in parts]


def _refuse(weight: str, name: str) -> NoReturn:
    what = "the embedding" if name == "embed" else "an expert" if ".experts." in name else name.rpartition(".")[2]
    raise ConfigError(
        f"the adapter changes {weight.removesuffix('.weight')} ({what}), which is not supported", hint=_MERGE
    )
