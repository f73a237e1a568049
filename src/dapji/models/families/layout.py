"""Weights in foreign layouts, both ways: which foreign tensor holds which of our weights, and in what order of rows.

A `Layout` names the tensors of one file format for one family; where more than a name differs, it has `Rule`s. Rows,
matrices and halves of matrices change places and no value is converted, so that every direction is exact in every
format; the one exception is `shifted`. What has to be transposed leaves its blocks for float32, with the same values.
Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, ModelConfig, Shape, weight_shapes
from dapji.models.families.fields import listed
from dapji.ops.tensor import Tensor

Index = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Foreign tensors that hold some weights of ours, all of both."""

    foreign: tuple[str, ...]
    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """Of the foreign tensors."""
    read: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    """Foreign tensors -> ours."""
    write: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    """The inverse."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one family's weights are called in one file format."""

    whole: Mapping[str, str]
    """Of weights outside the layers: canonical -> foreign, as written."""
    layers: str
    """What stands before the number of a layer."""
    parts: Mapping[str, str]
    """Of weights in layers and in predictors: canonical -> foreign, without .weight and .bias."""
    plain: Mapping[str, str] = field(default_factory=dict)
    """Of weights in layers that are called neither .weight nor .bias, as written."""
    rules: Callable[[ModelConfig], list[Rule]] = lambda config: []
    """Where more than the name differs. They win over names."""

    def name(self, name: str, n_layers: int = 0) -> str:
        """Canonical -> foreign. n_layers: of the model; files number its predictors on after them."""
        if name in self.whole:
            return self.whole[name]
        kind, index, part = name.split(".", 2)
        return self.in_layer(int(index) + (n_layers if kind == "predictors" else 0), part)

    def in_layer(self, index: int, part: str) -> str:
        """The same of a part of a layer, such as attention.q_bias."""
        if part in self.plain:
            return f"{self.layers}.{index}.{self.plain[part]}"
        kind = "bias" if part.endswith("_bias") else "weight"
        return f"{self.layers}.{index}.{self.parts[part.removesuffix('_bias')]}.{kind}"

    def all_rules(self, config: ModelConfig) -> list[Rule]:
        """Rules for every weight of the configuration, in the order of `weight_shapes`."""
        n_layers = config.n_layers
        # rules are of layers; predictors are layers too, with higher numbers in the files and names of their own here
        layered = replace(config, layers=(*config.layers, *config.predictors), predictors=())
        rules: dict[str, Rule] = {}
        for rule in self.rules(layered):
            ours = tuple(_of_predictor(name, n_layers) for name in rule.ours)
            rules |= dict.fromkeys(ours, replace(rule, ours=ours))
        every = [
            rules.get(name) or renamed(self.name(name, n_layers), name, shape)
            for name, shape in weight_shapes(config).items()
        ]
        return list({rule.foreign: rule for rule in every}.values())


def _of_predictor(name: str, n_layers: int) -> str:
    """The canonical name, where layers from n_layers on are predictors."""
    if not name.startswith("layers."):
        return name
    _, index, part = name.split(".", 2)
    beyond = int(index) - n_layers
    return name if beyond < 0 else f"predictors.{beyond}.{part}"


def take(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by canonical name, out of foreign tensors.

    Raises ConfigError unless exactly these tensors are there, each of the shape that the configuration says.
    """
    names = [name for rule in rules for name in rule.foreign]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ConfigError(f"missing {_tensors(missing)}: {listed(missing)}")
    unexpected = sorted(tensors.keys() - names)
    if unexpected:
        raise ConfigError(f"unexpected {_tensors(unexpected)}: {listed(unexpected)}")
    taken: dict[str, Tensor] = {}
    for rule in rules:
        for name, shape in zip(rule.foreign, rule.shapes, strict=True):
            if tensors[name].shape != shape:
                raise ConfigError(
                    f"{name} has shape {list(tensors[name].shape)}, but the configuration says {list(shape)}"
                )
        taken |= zip(rule.ours, rule.read([tensors[name] for name in rule.foreign]), strict=True)
    return taken


def give(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `take`. Weights of several formats that share a foreign tensor go there as float32."""
    given: dict[str, Tensor] = {}
    for rule in rules:
        own = [tensors[name] for name in rule.ours]
        if len({tensor.format.name for tensor in own}) > 1:
            own = [tensor.in_float32() for tensor in own]
        given |= zip(rule.foreign, rule.write(own), strict=True)
    return given


def _tensors(names: list[str]) -> str:
    return "tensor" if len(names) == 1 else f"{len(names)} tensors"


# ---- kinds of rules ----


def renamed(foreign: str, ours: str, shape: Shape) -> Rule:
    return Rule(foreign=(foreign,), ours=(ours,), shapes=(shape,), read=lambda given: given, write=lambda own: own)


def rows(foreign: str, ours: Mapping[str, Shape], order: Index | None = None, shape: Shape | None = None) -> Rule:
    """One tensor with the rows of several weights: row r of it is row order[r] of theirs one after another.

    order None: as they stand. shape: of the foreign tensor, by default [rows, cols].
    """
    sizes = [int(np.prod(own[:-1])) for own in ours.values()]
    (cols,) = {own[-1] for own in ours.values()}
    whole = shape or (sum(sizes), cols)
    places = np.arange(sum(sizes), dtype=np.int64) if order is None else np.argsort(order)
    ends = np.cumsum(sizes)

    def read(given: Sequence[Tensor]) -> list[Tensor]:
        (tensor,) = given
        if len(ours) == 1:
            whole_order = tensor if order is None else tensor.take_rows(places)
            return [whole_order.reshape(*own) for own in ours.values()]
        return [
            tensor.take_rows(places[end - size : end], f"{tensor.name} ({name.rpartition('.')[2]})").reshape(*own)
            for (name, own), size, end in zip(ours.items(), sizes, ends, strict=True)
        ]

    def write(own: Sequence[Tensor]) -> list[Tensor]:
        joined = own[0].reshape(*whole) if len(own) == 1 else Tensor.joined(foreign, own, *whole)
        return [joined if order is None else joined.take_rows(order)]

    return Rule(foreign=(foreign,), ours=tuple(ours), shapes=(whole,), read=read, write=write)


def values(foreign: str, ours: str, order: Index) -> Rule:
    """A vector whose value i is value order[i] of ours."""
    return Rule(
        foreign=(foreign,),
        ours=(ours,),
        shapes=((len(order),),),
        read=lambda given: [_take_values(given[0], np.argsort(order))],
        write=lambda own: [_take_values(own[0], order)],
    )


def stacked(foreign: Sequence[str], ours: str, shape: Shape) -> Rule:
    """n matrices, each a tensor of its own, that are one weight [n, rows, cols] of ours."""
    return Rule(
        foreign=tuple(foreign),
        ours=(ours,),
        shapes=(shape[1:],) * shape[0],
        read=lambda given: [Tensor.joined(f"{given[0].name} and others", given, *shape)],
        write=lambda own: own[0].split(),
    )


def fused(layout: Layout, config: ModelConfig, parts: Mapping[str, Sequence[str]]) -> list[Rule]:
    """Rules for matrices of a layer that are several of ours, one after another.

    parts: foreign, without .weight -> ours, in that order.
    """
    shapes = weight_shapes(config)
    return [
        rows(
            f"{layout.layers}.{i}.{foreign}.weight",
            {name: shapes[name] for name in (f"layers.{i}.{part}" for part in own)},
        )
        for i in range(config.n_layers)
        for foreign, own in parts.items()
    ]


def shifted(foreign: str, ours: str, shape: Shape, by: float) -> Rule:
    """A vector that is stored with `by` added to each value, in float32: the one kind of rule that converts values."""

    def added(vector: Tensor, shift: float) -> Tensor:
        return Tensor.from_float32(vector.name, vector.float32() + np.float32(shift))

    return Rule(
        foreign=(foreign,),
        ours=(ours,),
        shapes=(shape,),
        read=lambda given: [added(given[0], -by)],
        write=lambda own: [added(own[0], by)],
    )


def shifted_norms(layout: Layout, config: ModelConfig, offset: float) -> list[Rule]:
    """Rules for the weights of all norms in a layout where norms multiply by offset + weight; none where the
    configuration's do so too, as it is of every model that was read from that layout."""
    by = config.norm_offset - offset
    norms = {name: shape for name, shape in weight_shapes(config).items() if name.endswith("norm")}
    return [shifted(layout.name(name), name, shape, by) for name, shape in norms.items()] if by else []


def turned(rule: Rule) -> Rule:
    """The rule of tensors that are stored transposed, each matrix for itself."""
    return replace(
        rule,
        shapes=tuple((*shape[:-2], shape[-1], shape[-2]) for shape in rule.shapes),
        read=lambda given: rule.read([tensor.transposed() for tensor in given]),
        write=lambda own: [tensor.transposed() for tensor in rule.write(own)],
    )


# ---- orders of rows ----


def interleaved(layout: Layout, config: ModelConfig) -> list[Rule]:
    """Rules for q and k, their biases too, of layouts whose rotated rows are in pairs (2i, 2i + 1), where ours are in
    halves (i, i + dim/2)."""
    rules = []
    shapes = weight_shapes(config)
    for i, layer in enumerate(config.layers):
        attention = layer.attention
        assert isinstance(attention, AttentionConfig)
        for part, n_heads in (("attention.q", attention.n_heads), ("attention.k", attention.n_kv_heads)):
            # where nothing is rotated the order means nothing, but files have the same in every layer
            order = pairs(n_heads, attention.head_dim, attention.rope.dim if attention.rope else attention.head_dim)
            name = f"layers.{i}.{part}"
            rules.append(rows(layout.in_layer(i, part), {name: shapes[name]}, order))
            if attention.qkv_bias:
                rules.append(values(layout.in_layer(i, f"{part}_bias"), f"{name}_bias", order))
    return rules


def pairs(n_heads: int, head_dim: int, rope_dim: int) -> Index:
    """Which of our rows comes where in such a layout: in each head the first rope_dim in pairs, the rest in place."""
    head = np.arange(head_dim, dtype=np.int64)
    head[:rope_dim] = head[:rope_dim].reshape(2, -1).T.ravel()
    return (np.arange(n_heads, dtype=np.int64)[:, None] * head_dim + head).ravel()


def _take_values(vector: Tensor, index: Index) -> Tensor:
    """The same vector with its values in the order of `index`."""
    if vector.format.block > 1:
        raise ConfigError(f"{vector.name}: the format {vector.format.name} is not supported for a bias")
    taken = vector.data.reshape(vector.cols, vector.format.block_bytes)[index]
    return Tensor(name=vector.name, format=vector.format, shape=vector.shape, source=taken.reshape(1, -1))


# ---- what most families use ----

HF = Layout(
    whole={"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"},
    layers="model.layers",
    parts={
        "attention.norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "feed_forward.norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    },
)
HF_EXPERTS = {f"experts.{part}": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
"""For `experts_one_by_one`."""
GGUF = Layout(
    whole={"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"},
    layers="blk",
    parts={
        "attention.norm": "attn_norm",
        "attention.q": "attn_q",
        "attention.k": "attn_k",
        "attention.v": "attn_v",
        "attention.o": "attn_output",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "attention.post_norm": "post_attention_norm",
        "feed_forward.norm": "ffn_norm",
        "feed_forward.gate": "ffn_gate",
        "feed_forward.up": "ffn_up",
        "feed_forward.down": "ffn_down",
        "feed_forward.post_norm": "post_ffw_norm",
        "feed_forward.router": "ffn_gate_inp",
        "feed_forward.experts.gate": "ffn_gate_exps",
        "feed_forward.experts.up": "ffn_up_exps",
        "feed_forward.experts.down": "ffn_down_exps",
        "feed_forward.shared.gate": "ffn_gate_shexp",
        "feed_forward.shared.up": "ffn_up_shexp",
        "feed_forward.shared.down": "ffn_down_shexp",
        "feed_forward.selection": "exp_probs_b",
    },
)
GGUF_INTERLEAVED = replace(GGUF, rules=lambda config: interleaved(GGUF, config))


def experts_one_by_one(layout: Layout, config: ModelConfig, parts: Mapping[str, str]) -> list[Rule]:
    """Rules for experts of which each matrix is a tensor of its own.

    parts: experts.gate, experts.up, experts.down -> foreign, with {} for the expert's number, without .weight.
    """
    rules = []
    for name, shape in weight_shapes(config).items():
        _, index, part = (*name.split(".", 2), "", "")[:3]
        if (role := part.removeprefix("feed_forward.")) in parts:
            foreign = [f"{layout.layers}.{index}.{parts[role].format(i)}.weight" for i in range(shape[0])]
            rules.append(stacked(foreign, name, shape))
    return rules
