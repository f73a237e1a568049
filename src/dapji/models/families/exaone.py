"""EXAONE 3.0, 3.5 and Deep: Llama's computation under names of their own."""

from __future__ import annotations

from dapji.errors import ConfigError
from dapji.models.config import ModelConfig
from dapji.models.families.family import (
    HF_IGNORABLE,
    Family,
    config_from_gguf,
    config_to_gguf,
    sizes_from_hf,
    sizes_to_hf,
    uniform_layer,
    windows,
)
from dapji.models.families.fields import Fields
from dapji.models.families.layout import GGUF, Layout
from dapji.models.families.rope import ROPE_FREQS

_NAMES = {
    "num_hidden_layers": "num_layers",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
_HF = Layout(
    whole={"embed": "transformer.wte.weight", "norm": "transformer.ln_f.weight", "head": "lm_head.weight"},
    layers="transformer.h",
    parts={
        "attention.norm": "ln_1",
        "attention.q": "attn.attention.q_proj",
        "attention.k": "attn.attention.k_proj",
        "attention.v": "attn.attention.v_proj",
        "attention.o": "attn.attention.out_proj",
        "feed_forward.norm": "ln_2",
        "feed_forward.gate": "mlp.c_fc_0",
        "feed_forward.up": "mlp.c_fc_1",
        "feed_forward.down": "mlp.c_proj",
    },
)


def _from_hf(fields: Fields) -> ModelConfig:
    # what its published code means by absent keys
    fields = fields.assuming({"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True})
    sizes = sizes_from_hf(fields, names=_NAMES)
    # embed_dropout is of training, auto_map names the published code
    fields.finish((*HF_IGNORABLE, "embed_dropout", "auto_map"))
    layer = sizes.layer()
    return sizes.model("exaone", (layer,) * sizes.n_layers)


def _to_hf(config: ModelConfig) -> dict[str, object]:
    attention, feed_forward = uniform_layer(config)
    if attention.qkv_bias or attention.out_bias or feed_forward.bias:
        raise ConfigError("config.json of exaone has no form for biases")
    if any(window is not None for window in windows(config)):
        raise ConfigError("config.json of exaone has no form for a window")
    return sizes_to_hf(config, attention, feed_forward.hidden_dim, feed_forward.activation, names=_NAMES)


EXAONE = Family(
    name="exaone",
    models="EXAONE 3.0, 3.5, Deep",
    licence="EXAONE AI Model License 1.1 - NC",
    hf_architecture="ExaoneForCausalLM",
    gguf_architecture="exaone",
    hf=_HF,
    gguf=GGUF,
    rope_tensors=(ROPE_FREQS,),
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=lambda fields, facts: config_from_gguf("exaone", fields, facts),
    to_gguf=config_to_gguf,
)
