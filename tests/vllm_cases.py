"""A tiny model that vLLM takes too, and requests whose answers must be the same whoever computes them.

Three layers of random weights, a token for every byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dapji.chat.grammar import Grammar
from dapji.engine import Output, Request, Sampling
from dapji.errors import RequestError
from dapji.model import Model
from tiny import BYTES, CHATML, CONTROL, alphabet

CONTEXT = 512
_DIM, _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _LAYERS = 128, 192, 4, 2, 32, 3
_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": BYTES + 256,
    "hidden_size": _DIM,
    "intermediate_size": _HIDDEN,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "dtype": "float32",
}
_LAYER = {
    "input_layernorm": (_DIM,),
    "self_attn.q_proj": (_HEADS * _HEAD_DIM, _DIM),
    "self_attn.k_proj": (_KV_HEADS * _HEAD_DIM, _DIM),
    "self_attn.v_proj": (_KV_HEADS * _HEAD_DIM, _DIM),
    "self_attn.o_proj": (_DIM, _HEADS * _HEAD_DIM),
    "post_attention_layernorm": (_DIM,),
    "mlp.gate_proj": (_HIDDEN, _DIM),
    "mlp.up_proj": (_HIDDEN, _DIM),
    "mlp.down_proj": (_DIM, _HIDDEN),
}


def write_folder(path: Path) -> Path:
    """The same values everywhere. Gives `path`, which must not exist."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(_CONFIG))
    save_file(_weights(), path / "model.safetensors", metadata={"format": "pt"})
    tokens = [*CONTROL, *alphabet()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CONTROL[0],
        "eos_token": CONTROL[2],
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


def _weights() -> dict[str, NDArray[np.float32]]:
    """Out of raw bits of PCG64, which are the same for every version of numpy."""
    bits = np.random.PCG64(7)
    shapes = {"model.embed_tokens": (BYTES + 256, _DIM), "model.norm": (_DIM,), "lm_head": (BYTES + 256, _DIM)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(_LAYERS) for name, shape in _LAYER.items()}
    weights = {}
    for name, shape in shapes.items():
        uniform = (bits.random_raw(int(np.prod(shape))) >> 40) / 2**24 - 0.5
        around = 1.0 if "norm" in name else 0.0
        weights[f"{name}.weight"] = (around + 0.5 * uniform).astype(np.float32).reshape(shape)
    return weights


def ids(text: str) -> list[int]:
    return [BYTES + byte for byte in text.encode()]


PROMPT = ids("Say something.\n")
LONG = ids("All of this was read before. " * 12)
GREEDY = Sampling(temperature=0)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": " |\\n[ \\t]{0,40}"},
}
"""As llguidance reads it; how a client's schema comes to that is none of an engine's affair."""


def answers(model: Model) -> dict[str, Any]:
    """Lists of Outputs, or Scores. In a fixed order: one stand-in for vLLM gives recorded answers one after another."""
    engine = model.engine

    def generated(prompt: list[int] = PROMPT, max_tokens: int = 16, **options: Any) -> list[Output]:
        return list(engine.generate(Request(prompt=prompt, max_tokens=max_tokens, **{"sampling": GREEDY} | options)))

    def constrained(grammar: Grammar) -> list[Output]:
        return generated(max_tokens=60, constraint=model.grammars.start(grammar))

    found: dict[str, Any] = {"greedy": generated(logprobs=3)}
    third = found["greedy"][2].token
    found["penalties"] = generated(
        sampling=Sampling(
            temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=1, logit_bias={third: -100}
        )
    )
    found["stop token"] = generated(stop_tokens=frozenset({third}))
    found["minimum"] = generated(stop_tokens=frozenset({third}), min_tokens=5)
    found["stopped"] = generated(stop=after(4))
    found["scores"] = engine.score(LONG, start=5, n_top=2)
    found["read before"] = [generated(LONG, 2), generated(LONG, 2)][-1]
    content = Grammar(json.dumps([{"json_schema": SCHEMA}]))
    found["schema"] = constrained(content)
    found["answer"] = constrained(Grammar.answer('start: "so: " @content " " @content', content))
    found["nested"] = constrained(
        Grammar.answer('start: "so: " @content', Grammar.lark('start: "is " A\nA: /[a-z]{4}/'))
    )
    found["expression"] = constrained(Grammar.lark("start: /[a-c]{3}-[0-9]+x/"))
    found["lark"] = constrained(Grammar.lark('start: "is " WORD\nWORD: /[a-z]{4}/'))
    return found


def refused(model: Model) -> dict[str, str]:
    """What vLLM says to requests that it does not take, before its answer begins and behind its status 200."""
    found = {}
    hot = Request(prompt=PROMPT, max_tokens=2, sampling=Sampling(temperature=3))
    wrong = Request(prompt=PROMPT, max_tokens=2, sampling=GREEDY, constraint=_Wrong())
    for name, request in {"temperature": hot, "grammar": wrong}.items():
        try:
            list(model.engine.generate(request))
        except RequestError as error:
            found[name] = error.message
    return found


class _Wrong:
    """A grammar that is none."""

    source = '{"grammars": [{"lark_grammar": "start: bogus["}]}'

    def allowed(self) -> NDArray[np.intp]:
        raise NotImplementedError

    def push(self, token: int) -> None:
        raise NotImplementedError


def after(n: int) -> Callable[[int], bool]:
    """Ends an answer at its n-th token."""
    count = iter(range(1, n + 1))
    return lambda token: next(count) == n
