"""`Family`: how one family of models writes its configuration and its weights in foreign formats.

The functions here are what families share; each family's module says what is its own. Sits below the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from dapji.errors import ConfigError
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF, Layout
from dapji.models.families.rope import (
    longest_context,
    partial_rotary_factor,
    rope_from_gguf,
    rope_from_hf,
    rope_to_gguf,
    rope_to_hf,
)
from dapji.ops.protocol import Activation
from dapji.ops.rope import RopeConfig

MAX_LAYERS = 4096
"""A count beyond this is refused before anything is made per layer."""

HF_IGNORABLE = (
    # how the weights are stored and by what they were written
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "unsloth_version",
    "unsloth_fixed",
    "_name_or_path",
    "transformers.js_config",
    # what is made of hidden states: weights/embedding.py reads it
    "is_matryoshka",
    "matryoshka_dimensions",
    # training
    "attention_dropout",
    "initializer_range",
    # how a library runs it, without changing the result
    "pretraining_tp",
    "use_cache",
    "_attn_implementation_autoset",
    # a tokenizer's length, where max_position_embeddings is the model's
    "model_max_length",
    # tokens: the tokenizer and the generation configuration say them
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "tokenizer_class",
    # generation, in files from before generation_config.json
    "do_sample",
    "max_length",
    "temperature",
    "top_k",
    "top_p",
    # what transformers 4 wrote into a text_config: generation again, and what only models of other kinds have
    "add_cross_attention",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "label2id",
    "length_penalty",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "torchscript",
    "typical_p",
    "use_bfloat16",
    # flags of converters
    "is_llama_config",
    "is_decoder",
    "is_encoder_decoder",
)
GGUF_IGNORABLE = (
    # 0 in files of dense models; those of experts read it
    "expert_used_count",
    # what is made of hidden states: weights/embedding.py reads it
    "pooling_type",
    "classifier.output_labels",
    # how the model was trained
    "rope.scaling.finetuned",
    # a remark of the first converters; the architecture decides
    "tensor_data_layout",
)

HF_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
TO_HF_ACTIVATION: dict[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family writes itself. `Fields` of GGUF leave out the architecture's prefix."""

    name: str
    """Also Hugging Face's model_type."""
    models: str
    """As their makers call them."""
    licence: str
    """Of the published weights, for orientation: what a model's own files say is what counts."""
    hf_architecture: str
    """The class of transformers that runs it."""
    gguf_architecture: str
    hf: Layout
    gguf: Layout
    hf_layout: Callable[[Fields], Layout] | None = None
    """Of a folder with this config.json, where folders are laid out in several ways; `hf` is what we write."""
    gguf_layout: Callable[[GgufFacts], Layout] | None = None
    """The same of a file with these tensors."""
    rope_tensors: tuple[str, ...] = ()
    """Those of ROPE_TENSORS that its GGUF files may have."""
    from_hf: Callable[[Fields], ModelConfig]
    to_hf: Callable[[ModelConfig], dict[str, object]]
    """Everything but model_type and architectures."""
    from_gguf: Callable[[Fields, GgufFacts], ModelConfig]
    to_gguf: Callable[[ModelConfig], dict[str, object]]
    reads_gguf: Callable[[Fields], bool] = lambda fields: True
    """Whether a file of this architecture is of this family, where several share it."""
    wrapper: Wrapper | None = None
    """The family's models for more than text."""


@dataclass(frozen=True, kw_only=True)
class GgufFacts:
    """What only the tensors of a GGUF file tell."""

    vocab_size: int
    names: Collection[str]
    """Of its tensors, ROPE_TENSORS aside."""
    rope_tensors: Mapping[str, tuple[float, ...]]
    """Values of those that are there."""

    @property
    def tied_head(self) -> bool:
        return GGUF.name("head") not in self.names


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A config.json whose text_config is the decoder's; the parts that see and hear are left out."""

    model_type: str
    prefix: str
    """Of the decoder's tensors, before the names that they have alone."""
    left_out: tuple[str, ...]
    """Prefixes of the other parts' tensors."""
    ignorable: tuple[str, ...] = ()
    """Further keys of the outer config.json that say nothing of the text."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What every family's config.json says, under the same keys."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    activation: Activation
    vocab_size: int
    max_context: int
    norm_eps: float
    tied_head: bool
    rope: RopeConfig

    def __post_init__(self) -> None:
        if not 1 <= self.n_layers <= MAX_LAYERS:
            raise ConfigError(f"n_layers ({self.n_layers}) must be 1 to {MAX_LAYERS}")

    @property
    def attention(self) -> AttentionConfig:
        """The plainest; families replace what theirs has otherwise."""
        return AttentionConfig(n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, head_dim=self.head_dim, rope=self.rope)

    @property
    def feed_forward(self) -> FeedForwardConfig:
        return FeedForwardConfig(hidden_dim=self.hidden_dim, activation=self.activation)

    def layer(
        self,
        *,
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        feed_forward_bias: bool = False,
    ) -> LayerConfig:
        """The plainest, but for these."""
        return LayerConfig(
            attention=replace(self.attention, window=window, qkv_bias=qkv_bias, out_bias=out_bias),
            feed_forward=replace(self.feed_forward, bias=feed_forward_bias),
        )

    def model(self, family: str, layers: tuple[LayerConfig, ...]) -> ModelConfig:
        return ModelConfig(
            family=family,
            dim=self.dim,
            vocab_size=self.vocab_size,
            max_context=self.max_context,
            norm_eps=self.norm_eps,
            layers=layers,
            tied_head=self.tied_head,
        )


def sizes_from_hf(
    fields: Fields,
    *,
    names: Mapping[str, str] | None = None,
    read_rope: Callable[..., RopeConfig] = rope_from_hf,
) -> Sizes:
    """The common keys of config.json. Absent mean num_key_value_heads num_attention_heads, and head_dim hidden_size /
    num_attention_heads, unless `fields` assume something else.

    names: what the family calls a key that is otherwise called so. read_rope: takes what `rope_from_hf` takes.
    """
    own = {key: key for key in _RENAMED} | dict(names or {})
    dim, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = _head_dim(dim, n_heads) if "head_dim" not in fields else fields.integer("head_dim")
    stated_context = fields.integer("max_position_embeddings")
    rope = read_rope(fields, head_dim=head_dim, stated_context=stated_context)
    # LongChat and Vicuna scale by "linear" and say here how far that reaches
    longest = max(stated_context, fields.integer("max_sequence_length", stated_context))
    return Sizes(
        dim=dim,
        n_layers=fields.integer(own["num_hidden_layers"]),
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        hidden_dim=fields.integer("intermediate_size"),
        activation=fields.choice(own["hidden_act"], HF_ACTIVATIONS, "silu"),
        vocab_size=fields.integer("vocab_size"),
        max_context=longest_context(rope.scaling, longest),
        norm_eps=fields.number(own["rms_norm_eps"], 1e-6),
        tied_head=fields.boolean("tie_word_embeddings", False),
        rope=rope,
    )


_RENAMED = ("num_hidden_layers", "hidden_act", "rms_norm_eps")
"""Keys that some families call otherwise."""


def sizes_to_hf(
    config: ModelConfig,
    attention: AttentionConfig,
    hidden_dim: int,
    activation: Activation,
    *,
    names: Mapping[str, str] | None = None,
    partial_rope: bool = False,
) -> dict[str, object]:
    """The inverse of `sizes_from_hf`. attention: of any layer that has a rope. partial_rope: whether it may be of a
    part of each head."""
    if attention.rope is None or (attention.rope.dim != attention.head_dim and not partial_rope):
        raise ConfigError(f"config.json of {config.family} has no form for heads that are not rotated as a whole")
    written = {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": hidden_dim,
        "hidden_act": TO_HF_ACTIVATION[activation],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        **rope_to_hf(attention.rope, max_context=config.max_context),
    }
    if partial_rope:
        written["partial_rotary_factor"] = partial_rotary_factor(attention.rope, attention.head_dim)
    return {(names or {}).get(key, key): value for key, value in written.items()}


def uniform_attention(config: ModelConfig) -> AttentionConfig:
    """That of all layers, but for their windows."""
    first = config.layers[0].attention
    assert isinstance(first, AttentionConfig)
    for i, layer in enumerate(config.layers):
        other = layer.attention
        if isinstance(other, AttentionConfig):
            other = replace(other, window=first.window)
        if other != first:
            raise ConfigError(f"{config.family} has no form for layers that differ: {i} is not as 0")
    return first


def uniform_layer(config: ModelConfig) -> tuple[AttentionConfig, FeedForwardConfig]:
    """Attention and feed-forward of the one layer that all are equal to, but for their windows."""
    attention, feed_forward = uniform_attention(config), config.layers[0].feed_forward
    assert isinstance(feed_forward, FeedForwardConfig)
    for i, layer in enumerate(config.layers):
        if replace(layer, attention=config.layers[0].attention) != config.layers[0]:
            raise ConfigError(f"{config.family} has no form for layers that differ: {i} is not as 0")
    return attention, feed_forward


def windows(config: ModelConfig) -> list[int | None]:
    """Of every layer."""
    return [layer.attention.window if isinstance(layer.attention, AttentionConfig) else None for layer in config.layers]


def _head_dim(dim: int, n_heads: int) -> int:
    if n_heads < 1 or dim % n_heads:
        raise ConfigError(f"hidden size ({dim}) must be divisible by the number of heads ({n_heads})")
    return dim // n_heads


def sizes_from_gguf(fields: Fields, facts: GgufFacts) -> Sizes:
    """The common keys of `<architecture>.*` metadata. What no key says is silu."""
    fields.require("vocab_size", facts.vocab_size)
    dim, n_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    fields.require("attention.causal", True)
    stated_context = fields.integer("context_length")
    head_dim = fields.integer("attention.key_length") if "attention.key_length" in fields else _head_dim(dim, n_heads)
    fields.require("attention.value_length", head_dim)
    rope = rope_from_gguf(fields, head_dim=head_dim, stated_context=stated_context, tensors=facts.rope_tensors)
    return Sizes(
        dim=dim,
        n_layers=fields.integer("block_count"),
        n_heads=n_heads,
        n_kv_heads=fields.integer("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        hidden_dim=fields.integer("feed_forward_length"),
        activation="silu",
        vocab_size=facts.vocab_size,
        max_context=longest_context(rope.scaling, stated_context),
        norm_eps=shortest(fields.number("attention.layer_norm_rms_epsilon")),
        tied_head=facts.tied_head,
        rope=rope,
    )


def config_from_gguf(family: str, fields: Fields, facts: GgufFacts) -> ModelConfig:
    """Of a family whose layers are alike, dense, and have biases where there are tensors of them."""
    if fields.integer("expert_count", 0):
        raise ConfigError(f"GGUF: experts (expert_count = {fields.integer('expert_count')}) are not supported")
    sizes = sizes_from_gguf(fields, facts)
    layer = sizes.layer(
        window=fields.integer("attention.sliding_window", 0) or None,
        qkv_bias=GGUF.in_layer(0, "attention.q_bias") in facts.names,
        out_bias=GGUF.in_layer(0, "attention.o_bias") in facts.names,
        feed_forward_bias=GGUF.in_layer(0, "feed_forward.down_bias") in facts.names,
    )
    fields.finish(GGUF_IGNORABLE)
    return sizes.model(family, (layer,) * sizes.n_layers)


def sizes_to_gguf(
    config: ModelConfig, attention: AttentionConfig, rope: RopeConfig, hidden_dim: int
) -> dict[str, object]:
    """The inverse of `sizes_from_gguf`. attention: of any layer, rope: of those that have one."""
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_context,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": hidden_dim,
        "attention.head_count": attention.n_heads,
        "attention.head_count_kv": attention.n_kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        **rope_to_gguf(rope),
    }


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """The inverse of `config_from_gguf`, without the architecture's prefix."""
    attention, feed_forward = uniform_layer(config)
    if len(set(windows(config))) > 1:
        raise ConfigError("GGUF has no form for windows in some layers only")
    require_gguf_activation(feed_forward.activation)
    if attention.rope is None:
        raise ConfigError("GGUF has no form for heads that are not rotated")
    written = sizes_to_gguf(config, attention, attention.rope, feed_forward.hidden_dim)
    if attention.window is not None:
        written["attention.sliding_window"] = attention.window
    return written


def require_gguf_activation(activation: Activation, only: Activation = "silu") -> None:
    """No key says it: an architecture has one."""
    if activation != only:
        raise ConfigError(f"GGUF: the activation {activation} is not supported, only {only} is")


def shortest(value: float) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
