"""Rotary embedding as foreign configurations write it: Hugging Face's `config.json` and GGUF metadata, both ways.

Knows no model; sits beside the families that use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from dapji.errors import ConfigError
from dapji.models.families.fields import Fields
from dapji.ops.rope import (
    RopeConfig,
    RopeScaling,
    longrope_attention_factor,
    rope_frequencies,
    yarn_attention_factor,
)

_KINDS: dict[str, Literal["linear", "dynamic", "yarn", "llama3", "longrope"] | None] = {
    "default": None,
    "linear": "linear",
    "dynamic": "dynamic",
    "yarn": "yarn",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
}

ROPE_FREQS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, LONG_FACTORS, SHORT_FACTORS)
"""What GGUF says of a rope in tensors."""


def longest_context(scaling: RopeScaling | None, stated: int) -> int:
    """The model's limit, where its file states a length of `stated` tokens.

    With dynamic and yarn that may be the length before scaling (as where Qwen 2.5 is set up for long texts); then the
    scaling itself says how far it reaches.
    """
    if scaling is None or scaling.kind not in ("dynamic", "yarn"):
        return stated
    return max(stated, int(scaling.factor * scaling.original_context))


def rope_from_hf(fields: Fields, *, head_dim: int, stated_context: int, partial: bool = False) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before; "type" or "rope_type").

    As there, dynamic scaling starts at max_position_embeddings, and so do yarn, llama3 and longrope where
    original_max_position_embeddings is absent. partial: whether partial_rotary_factor may be other than 1.
    """
    fields.require("rope_interleaved", False)
    keys = [key for key in ("rope_parameters", "rope_scaling") if key in fields]
    if len(keys) == 2:
        raise ConfigError("config.json: rope_parameters and rope_scaling exclude each other")
    plain = Fields({}, where="config.json")
    return rope_of(
        fields,
        fields.mapping(keys[0]) if keys else plain,
        theta=fields.number("rope_theta", 10_000.0),
        head_dim=head_dim,
        stated_context=stated_context,
        partial=partial,
    )


def rope_of(
    fields: Fields, rope: Fields, *, theta: float, head_dim: int, stated_context: int, partial: bool = False
) -> RopeConfig:
    """The same of one object of parameters, `rope`, in a configuration that has several. theta: where it has none."""
    theta = rope.number("rope_theta", theta)
    dim = head_dim
    if partial:
        dim = int(head_dim * rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)))
    else:
        fields.require("partial_rotary_factor", 1.0)
        rope.require("partial_rotary_factor", 1.0)
    if "rope_type" in rope and "type" in rope:
        rope.require("type", rope.string("rope_type"))
    kind = rope.choice("type" if "type" in rope and "rope_type" not in rope else "rope_type", _KINDS, "default")
    scaling = None
    if kind == "longrope":
        scaling = _longrope_from_hf(fields, rope, stated_context)
    elif kind is not None:
        scaling = _scaling_from_hf(kind, rope, stated_context)
    rope.finish(ignorable=_IGNORABLE)
    return RopeConfig(theta=theta, dim=dim, scaling=scaling)


_IGNORABLE = ("original_max_position_embeddings", "finetuned")
"""Carried by some configurations whose scaling has no use for them."""


def _longrope_from_hf(fields: Fields, rope: Fields, stated_context: int) -> RopeScaling:
    """Phi writes original_max_position_embeddings outside of the scaling; there it counts."""
    original = rope.integer("original_max_position_embeddings", stated_context)
    if "original_max_position_embeddings" in fields:
        original = fields.integer("original_max_position_embeddings")
        rope.require("original_max_position_embeddings", original)
    return RopeScaling(
        kind="longrope",
        factor=rope.number("factor", _stretch(stated_context, original)),
        original_context=original,
        attention_factor=rope.number("attention_factor") if "attention_factor" in rope else None,
        short_factors=rope.numbers("short_factor"),
        long_factors=rope.numbers("long_factor"),
    )


def _stretch(context: int, original: int) -> float:
    """Longrope's factor, where nothing says it. Raises ConfigError where `RopeScaling` would, which comes too late."""
    if original < 2:
        raise ConfigError(f"rope scaling longrope: original_context ({original}) must be at least 2")
    return max(context / original, 1.0)


def _scaling_from_hf(
    kind: Literal["linear", "dynamic", "yarn", "llama3"], rope: Fields, stated_context: int
) -> RopeScaling:
    factor = rope.number("factor")
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind=kind, factor=factor, original_context=stated_context)
    original = rope.integer("original_max_position_embeddings", stated_context)
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=factor,
            original_context=original,
            low_frequency_factor=rope.number("low_freq_factor"),
            high_frequency_factor=rope.number("high_freq_factor"),
        )
    attention_factor = rope.number("attention_factor") if "attention_factor" in rope else None
    # Zero means absent for both, and one without the other has no effect.
    mscale, mscale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if attention_factor is None and mscale and mscale_all:
        stretch = 0.1 * math.log(max(factor, 1.0))
        attention_factor = (mscale * stretch + 1) / (mscale_all * stretch + 1)
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context=original,
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        attention_factor=attention_factor,
        truncate=rope.boolean("truncate", True),
    )


def partial_rotary_factor(rope: RopeConfig, head_dim: int) -> float:
    """A factor that gives rope.dim when it is multiplied by head_dim and rounded down."""
    factor = rope.dim / head_dim
    return factor if int(head_dim * factor) == rope.dim else math.nextafter(factor, 2)


def rope_to_hf(rope: RopeConfig, *, max_context: int) -> dict[str, object]:
    """`rope_theta` and `rope_scaling`, the form that every version of transformers reads, and with some scalings
    lengths beside them."""
    if rope.frequency_factors is not None:
        raise ConfigError(
            "config.json has no form for explicit rope frequency factors",
            hint="take the weights' original config.json with its rope_scaling",
        )
    scaling = rope.scaling
    if scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    written: dict[str, object] = {"rope_type": scaling.kind, "factor": scaling.factor}
    original = scaling.original_context
    if scaling.kind == "linear":
        lengths = {"max_position_embeddings": original, "max_sequence_length": max_context}
        return {"rope_theta": rope.theta, "rope_scaling": written, **(lengths if original < max_context else {})}
    if scaling.kind == "dynamic":
        if longest_context(scaling, original) != max_context:
            raise ConfigError(
                f"config.json: dynamic rope scaling of original_context ({original}) by factor ({scaling.factor}) does "
                f"not give max_context ({max_context})"
            )
        return {"rope_theta": rope.theta, "rope_scaling": written, "max_position_embeddings": original}
    if scaling.kind == "longrope":
        # "type", and the factor only where it has to be said: what the first readers of this scaling insist on
        written = {"type": "longrope", "short_factor": list(scaling.short_factors)}
        written["long_factor"] = list(scaling.long_factors)
        if scaling.factor != _stretch(max_context, original):
            written["factor"] = scaling.factor
        if scaling.attention_factor is not None:
            written["attention_factor"] = scaling.attention_factor
        return {"rope_theta": rope.theta, "rope_scaling": written, "original_max_position_embeddings": original}
    written["original_max_position_embeddings"] = original
    if scaling.kind == "llama3":
        written["low_freq_factor"] = scaling.low_frequency_factor
        written["high_freq_factor"] = scaling.high_frequency_factor
    else:
        written["beta_fast"] = scaling.beta_fast
        written["beta_slow"] = scaling.beta_slow
        written["truncate"] = scaling.truncate
        if scaling.attention_factor is not None:
            written["attention_factor"] = scaling.attention_factor
    return {"rope_theta": rope.theta, "rope_scaling": written}


def rope_from_gguf(
    fields: Fields,
    *,
    head_dim: int,
    stated_context: int,
    tensors: Mapping[str, tuple[float, ...]],
    log_multiplier: float = 0.0,
) -> RopeConfig:
    """Reads `<architecture>.rope.*` and the values of ROPE_TENSORS. As for llama.cpp, a factor without a type means
    linear, and lists of long and short factors mean longrope.

    Two keys change yarn's attention factor: yarn_attn_factor, into which llama.cpp's converter puts config.json's
    attention_factor, is the factor; attn_factor, which llama.cpp itself reads, multiplies it.

    log_multiplier: the one yarn_log_multiplier that is supported; a family that knows what to do with it has read it.
    """
    fields.require("rope.scaling.yarn_ext_factor", 1.0)
    fields.require("rope.scaling.yarn_log_multiplier", log_multiplier)
    theta = fields.number("rope.freq_base", 10_000.0)
    dim = fields.integer("rope.dimension_count", head_dim)
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    kinds = {kind: kind for kind in ("none", "linear", "yarn", "longrope")}
    kind = fields.choice("rope.scaling.type", kinds, "linear")
    original = fields.integer("rope.scaling.original_context_length", stated_context)
    scaling = None
    if kind == "longrope" or LONG_FACTORS in tensors or SHORT_FACTORS in tensors:
        scaling = _longrope_from_gguf(fields, _stretch(stated_context, original), original, tensors)
    elif kind == "linear" and factor not in (0, 1):
        scaling = RopeScaling(kind="linear", factor=factor, original_context=stated_context)
    elif kind == "yarn":
        default = yarn_attention_factor(max(factor, 1.0))
        attention_factor = fields.number("rope.scaling.yarn_attn_factor", default)
        attention_factor *= fields.number("rope.scaling.attn_factor", 1.0)
        scaling = RopeScaling(
            kind="yarn",
            factor=factor,
            original_context=original,
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=None if attention_factor == default else attention_factor,
        )
    return RopeConfig(theta=theta, dim=dim, scaling=scaling, frequency_factors=tensors.get(ROPE_FREQS))


def _longrope_from_gguf(
    fields: Fields, factor: float, original: int, tensors: Mapping[str, tuple[float, ...]]
) -> RopeScaling:
    if missing := [name for name in (LONG_FACTORS, SHORT_FACTORS) if name not in tensors]:
        raise ConfigError(f"missing tensor: {missing[0]}")
    attention_factor = fields.number("rope.scaling.attn_factor", 1.0)
    # compared as the float32 that the file holds
    default = np.float32(longrope_attention_factor(factor, original))
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_context=original,
        attention_factor=None if np.float32(attention_factor) == default else attention_factor,
        short_factors=tensors[SHORT_FACTORS],
        long_factors=tensors[LONG_FACTORS],
    )


def rope_to_gguf(rope: RopeConfig) -> dict[str, object]:
    """`rope.*` without the architecture's prefix. What goes into tensors: `rope_tensors`."""
    written: dict[str, object] = {"rope.dimension_count": rope.dim, "rope.freq_base": rope.theta}
    scaling = rope.scaling
    if scaling is None or scaling.kind == "llama3":
        return written
    if scaling.kind == "dynamic":
        raise ConfigError("GGUF has no form for dynamic rope scaling")
    if scaling.kind == "longrope":
        default = longrope_attention_factor(scaling.factor, scaling.original_context)
        written["rope.scaling.original_context_length"] = scaling.original_context
        written["rope.scaling.attn_factor"] = scaling.attention_factor or default
        return written
    written["rope.scaling.type"] = scaling.kind
    written["rope.scaling.factor"] = scaling.factor
    if scaling.kind == "yarn":
        if not scaling.truncate:
            raise ConfigError("GGUF has no form for yarn with truncate = false")
        written["rope.scaling.original_context_length"] = scaling.original_context
        written["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
        written["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
        if scaling.attention_factor is not None:
            written["rope.scaling.attn_factor"] = scaling.attention_factor / yarn_attention_factor(scaling.factor)
    return written


def rope_tensors(rope: RopeConfig) -> dict[str, tuple[float, ...]]:
    """The values of those of ROPE_TENSORS that it needs: divisors of the unscaled frequencies."""
    if rope.frequency_factors is not None:
        return {ROPE_FREQS: rope.frequency_factors}
    if rope.scaling is not None and rope.scaling.kind == "longrope":
        return {LONG_FACTORS: rope.scaling.long_factors, SHORT_FACTORS: rope.scaling.short_factors}
    if rope.scaling is None or rope.scaling.kind != "llama3":
        return {}
    plain = rope_frequencies(RopeConfig(theta=rope.theta, dim=rope.dim), context=1)
    scaled = rope_frequencies(rope, context=1)
    return {ROPE_FREQS: tuple(float(factor) for factor in np.divide(plain, scaled))}
