"""Llama 4: most layers rotate and attend in chunks, some do neither, and experts take what the router has weighed.

The published models see images too; of them the text part is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dapji.errors import ConfigError
from dapji.models.config import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    Shape,
    weight_shapes,
)
from dapji.models.families import experts
from dapji.models.families.experts import GgufRouting
from dapji.models.families.family import (
    GGUF_IGNORABLE,
    HF_IGNORABLE,
    Family,
    GgufFacts,
    Sizes,
    Wrapper,
    sizes_from_gguf,
    sizes_from_hf,
    sizes_to_gguf,
    sizes_to_hf,
)
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF_INTERLEAVED, HF, Rule, interleaved, renamed, turned
from dapji.models.families.patterns import all_but_every, limited_from_hf, rotated_from_hf
from dapji.models.families.rope import ROPE_FREQS
from dapji.ops.attention import Temperature
from dapji.ops.protocol import Activation
from dapji.ops.routing import Routing
from dapji.ops.tensor import Tensor

_LAYER_TYPES = ("full_attention", "chunked_attention")
_ROUTING = GgufRouting(score="sigmoid", weighs="input")
_GGUF_INTERVAL, _GGUF_CHUNK, _GGUF_TEMPERATURE = 4, 8192, Temperature(scale=0.1, length=8192)
"""What llama.cpp assumes: GGUF has no keys that it reads for them."""
_GGUF_WITHOUT_QK_NORM = 128
"""So many experts, and heads are not normed."""


@dataclass(frozen=True, kw_only=True)
class _Attentions:
    """Those of all layers."""

    plain: AttentionConfig
    """Rotated, and no more."""
    rotated: Sequence[bool]
    chunk: int | None
    chunked: Sequence[bool]
    qk_norm: bool
    """Where rotated."""
    temperature: Temperature | None
    """Where not."""

    def __post_init__(self) -> None:
        scaling = None if self.plain.rope is None else self.plain.rope.scaling
        if self.qk_norm and scaling is not None and scaling.kind == "yarn":
            # The norm, which comes after the rotation there, undoes yarn's attention factor.
            raise ConfigError("llama4_text: rope scaling yarn beside use_qk_norm is not supported")

    def layer(self, i: int) -> AttentionConfig:
        attention = replace(self.plain, chunk=self.chunk if self.chunked[i] else None)
        if self.rotated[i]:
            return replace(attention, qk_norm="plain" if self.qk_norm else None)
        return replace(attention, rope=None, temperature=self.temperature)

    @staticmethod
    def of(config: ModelConfig) -> _Attentions:
        """Raises ConfigError for attention that the family has not."""
        own = [layer.attention for layer in config.layers if isinstance(layer.attention, AttentionConfig)]
        rotated = [attention for attention in own if attention.rope is not None]
        if not rotated:
            raise ConfigError("llama4_text has no form for a model without rotated layers")
        found = _Attentions(
            plain=replace(rotated[0], chunk=None, qk_norm=None),
            rotated=[attention.rope is not None for attention in own],
            chunk=next((attention.chunk for attention in own if attention.chunk is not None), None),
            chunked=[attention.chunk is not None for attention in own],
            qk_norm=rotated[0].qk_norm is not None,
            temperature=next((attention.temperature for attention in own if attention.rope is None), None),
        )
        for i, layer in enumerate(config.layers):
            if layer.attention != found.layer(i):
                raise ConfigError(f"llama4_text has no form for the attention of layer {i} beside that of the others")
        return found


def _experts(n_experts: int, n_experts_per_token: int, hidden_dim: int, activation: Activation) -> ExpertsConfig:
    return ExpertsConfig(
        routing=Routing(n_experts=n_experts, n_experts_per_token=n_experts_per_token, score="sigmoid", weighs="input"),
        hidden_dim=hidden_dim,
        shared_hidden_dim=hidden_dim,
        activation=activation,
    )


def _model(
    sizes: Sizes, attentions: _Attentions, routed: ExpertsConfig, dense: FeedForwardConfig, places: Sequence[int]
) -> ModelConfig:
    layers = [
        LayerConfig(attention=attentions.layer(i), feed_forward=routed if i in places else dense)
        for i in range(sizes.n_layers)
    ]
    return sizes.model("llama4_text", tuple(layers))


def _from_hf(fields: Fields) -> ModelConfig:
    fields = fields.assuming({"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500_000.0})
    sizes = sizes_from_hf(fields)
    n_layers = sizes.n_layers
    bias = fields.boolean("attention_bias", False)
    chunk = fields.optional_integer("attention_chunk_size", 8192)
    rotated = rotated_from_hf(fields, n_layers)
    chunked = limited_from_hf(fields, [rotates and chunk is not None for rotates in rotated], _LAYER_TYPES)
    if chunk is None and any(chunked):
        raise ConfigError("config.json: layer_types has chunked_attention, but attention_chunk_size is null")
    temperature = Temperature(scale=fields.number("attn_scale", 0.1), length=fields.integer("floor_scale", 8192))
    # Files of the first days have the number 4, which is true.
    tuned = (
        fields.integer("attn_temperature_tuning") != 0
        if fields.holds("attn_temperature_tuning", int) and not fields.holds("attn_temperature_tuning", bool)
        else fields.boolean("attn_temperature_tuning", True)
    )
    attentions = _Attentions(
        plain=replace(sizes.attention, qkv_bias=bias, out_bias=bias),
        rotated=rotated,
        chunk=chunk,
        chunked=chunked,
        qk_norm=fields.boolean("use_qk_norm", True),
        temperature=temperature if tuned else None,
    )
    routed = _experts(
        fields.integer("num_local_experts", 16),
        fields.integer("num_experts_per_tok", 1),
        sizes.hidden_dim,
        sizes.activation,
    )
    dense = replace(sizes.feed_forward, hidden_dim=fields.integer("intermediate_size_mlp", 16_384))
    step = _step(fields, "config.json")
    places = fields.integers("moe_layers") if "moe_layers" in fields else list(range(step - 1, n_layers, step))
    if beyond := [i for i in places if not 0 <= i < n_layers]:
        raise ConfigError(f"config.json: moe_layers has {beyond[0]}, but there are {n_layers} layers")
    # for_llm_compressor, cache_implementation: of programs that wrote or run the files
    fields.finish((*HF_IGNORABLE, *experts.HF_IGNORABLE, "for_llm_compressor", "cache_implementation"))
    return _model(sizes, attentions, routed, dense, places)


def _step(fields: Fields, where: str) -> int:
    step = fields.integer("interleave_moe_layer_step", 1)
    if step < 1:
        raise ConfigError(f"{where}: interleave_moe_layer_step ({step}) must be positive")
    return step


def _feed_forwards(config: ModelConfig) -> tuple[ExpertsConfig, FeedForwardConfig]:
    """The experts, and the dense layers; where there are none, any."""
    routed, dense = experts.kinds(config)
    routing = routed.routing
    sayable = _experts(routing.n_experts, routing.n_experts_per_token, routed.hidden_dim, routed.activation)
    experts.require_form(routed, sayable, "llama4_text")
    plain = FeedForwardConfig(
        hidden_dim=routed.hidden_dim if dense is None else dense.hidden_dim, activation=routed.activation
    )
    if dense not in (None, plain):
        raise ConfigError("llama4_text has no form for biases or another activation in dense layers")
    return routed, plain


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attentions = _Attentions.of(config)
    plain, temperature = attentions.plain, attentions.temperature
    if plain.qkv_bias != plain.out_bias:
        raise ConfigError(
            "config.json of llama4_text has one attention_bias, "
            f"but qkv_bias is {plain.qkv_bias} and out_bias is {plain.out_bias}"
        )
    routed, dense = _feed_forwards(config)
    written: dict[str, object] = {
        **sizes_to_hf(config, plain, routed.hidden_dim, routed.activation),
        "attention_bias": plain.qkv_bias,
        "use_qk_norm": attentions.qk_norm,
        "no_rope_layers": [int(rotates) for rotates in attentions.rotated],
        "attention_chunk_size": attentions.chunk,
        "layer_types": [_LAYER_TYPES[chunked] for chunked in attentions.chunked],
        "attn_temperature_tuning": temperature is not None,
        "intermediate_size_mlp": dense.hidden_dim,
        "num_local_experts": routed.routing.n_experts,
        "num_experts_per_tok": routed.routing.n_experts_per_token,
        "moe_layers": experts.places(config),
    }
    if temperature is not None:
        written |= {"attn_scale": temperature.scale, "floor_scale": temperature.length}
    return written


def _gguf_attentions(plain: AttentionConfig, n_layers: int, n_experts: int) -> _Attentions:
    """What llama.cpp computes."""
    rotated = all_but_every(_GGUF_INTERVAL, n_layers)
    return _Attentions(
        plain=plain,
        rotated=rotated,
        chunk=_GGUF_CHUNK,
        chunked=rotated,
        qk_norm=n_experts != _GGUF_WITHOUT_QK_NORM,
        temperature=_GGUF_TEMPERATURE,
    )


def _from_gguf(fields: Fields, facts: GgufFacts) -> ModelConfig:
    sizes = sizes_from_gguf(fields, facts)
    hidden_dim = fields.integer("expert_feed_forward_length")
    routed = ExpertsConfig(routing=_ROUTING.read(fields), hidden_dim=hidden_dim, shared_hidden_dim=hidden_dim)
    step = _step(fields, "GGUF")
    attentions = _gguf_attentions(sizes.attention, sizes.n_layers, routed.routing.n_experts)
    fields.finish(GGUF_IGNORABLE)
    return _model(sizes, attentions, routed, sizes.feed_forward, range(step - 1, sizes.n_layers, step))


def _to_gguf(config: ModelConfig) -> dict[str, object]:
    attentions = _Attentions.of(config)
    routed, dense = _feed_forwards(config)
    n_experts = routed.routing.n_experts
    have, only = attentions, _gguf_attentions(attentions.plain, config.n_layers, n_experts)
    for what, value, other in (
        ("layers that are not rotated", have.rotated, only.rotated),
        ("attention_chunk_size", have.chunk, only.chunk),
        ("chunks", have.chunked, only.chunked),
        (f"use_qk_norm with {n_experts} experts", have.qk_norm, only.qk_norm),
        ("temperature", have.temperature, only.temperature if not all(have.rotated) else None),
        ("attention_bias", have.plain.qkv_bias or have.plain.out_bias, False),
        ("hidden_act", routed.activation, "silu"),
    ):
        if value != other:
            raise ConfigError(f"GGUF has no form in the architecture llama4 for {what} = {value!r}, only {other!r}")
    places = experts.places(config)
    step = places[0] + 1
    if places != list(range(step - 1, config.n_layers, step)):
        raise ConfigError(f"GGUF has no form for experts in the layers {places}, which do not follow at equal distance")
    assert attentions.plain.rope is not None
    return {
        **sizes_to_gguf(config, attentions.plain, attentions.plain.rope, dense.hidden_dim),
        **_ROUTING.write(routed.routing),
        "expert_feed_forward_length": routed.hidden_dim,
        "interleave_moe_layer_step": step,
    }


_PARTS = {
    "feed_forward.gate": "feed_forward.gate_proj",
    "feed_forward.up": "feed_forward.up_proj",
    "feed_forward.down": "feed_forward.down_proj",
    "feed_forward.router": "feed_forward.router",
    "feed_forward.shared.gate": "feed_forward.shared_expert.gate_proj",
    "feed_forward.shared.up": "feed_forward.shared_expert.up_proj",
    "feed_forward.shared.down": "feed_forward.shared_expert.down_proj",
}
_LAYOUT = replace(HF, parts={**HF.parts, **_PARTS})


def _rules(config: ModelConfig) -> list[Rule]:
    """Rotated rows in pairs, and the experts of a layer in two tensors, each matrix transposed."""
    rules, shapes = interleaved(_LAYOUT, config), weight_shapes(config)
    for i in experts.places(config):
        ours, foreign = f"layers.{i}.feed_forward.experts", f"{_LAYOUT.layers}.{i}.feed_forward.experts"
        rules.append(_gate_and_up(f"{foreign}.gate_up_proj", ours, shapes[f"{ours}.gate"]))
        rules.append(turned(renamed(f"{foreign}.down_proj", f"{ours}.down", shapes[f"{ours}.down"])))
    return rules


def _gate_and_up(foreign: str, experts: str, shape: Shape) -> Rule:
    """One tensor [E, D, 2F] that is two weights [E, F, D], each expert apart, so that one at a time is in memory."""
    n, hidden_dim, dim = shape
    halves = np.arange(2 * hidden_dim, dtype=np.int64).reshape(2, -1)

    def read(given: Sequence[Tensor]) -> list[Tensor]:
        matrices = [matrix.transposed() for matrix in given[0].split()]  # E of [2F, D]
        return [
            Tensor.joined(
                f"{given[0].name} ({part})",
                [matrix.take_rows(half, f"{matrix.name} ({part})") for matrix in matrices],
                *shape,
            )
            for part, half in zip(("gate", "up"), halves, strict=True)
        ]

    def write(own: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(*([matrix.without_blocks() for matrix in tensor.split()] for tensor in own), strict=True)
        matrices = [
            Tensor.joined(f"{foreign}[{i}]", pair, 2 * hidden_dim, dim).transposed() for i, pair in enumerate(pairs)
        ]
        return [Tensor.joined(foreign, matrices, n, dim, 2 * hidden_dim)]

    return Rule(
        foreign=(foreign,),
        ours=(f"{experts}.gate", f"{experts}.up"),
        shapes=((n, dim, 2 * hidden_dim),),
        read=read,
        write=write,
    )


LLAMA4 = Family(
    name="llama4_text",
    models="Llama 4 Scout, Maverick (text)",
    licence="Llama 4 Community License",
    hf_architecture="Llama4ForCausalLM",
    gguf_architecture="llama4",
    hf=replace(_LAYOUT, rules=_rules),
    gguf=GGUF_INTERLEAVED,
    rope_tensors=(ROPE_FREQS,),
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
    wrapper=Wrapper(
        model_type="llama4",
        prefix="language_model.",
        left_out=("vision_model.", "multi_modal_projector."),
        ignorable=("vision_config", "image_token_index", "boi_token_index", "eoi_token_index"),
    ),
)
