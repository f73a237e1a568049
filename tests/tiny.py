"""A tiny model in one GGUF file that says what a test wants: quick on every executor, with exact text to expect.

A real Llama: one layer, byte-level BPE, ChatML template. Its head is aligned with its embeddings so that each token
has one likely successor, and attention and feed-forward add nothing to that; so the answer to any chat is the script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from dapji.files import open_files
from dapji.models import families
from dapji.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig, weight_shapes
from dapji.ops.rope import RopeConfig
from dapji.ops.tensor import Tensor
from dapji.weights.files import TensorToWrite
from dapji.weights.gguf import write_gguf
from dapji.weights.safetensors import write_safetensors

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%") + "{# </think> #}"
"""Of a model that reasons; its answers begin inside."""
THOUGHTFUL = ["음", ", 생각", "</think>", "\n\n", "42", "입니다."]
"""For a model with that template."""
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = len(CONTROL)
"""Id of the token of byte 0."""


SCRIPT = ["안녕하세요!", " 답은", " 4", "2", "입니다.", " 🎉".encode()[:3], " 🎉".encode()[3:]]
"""The last two items are the halves of an emoji."""
ANSWER = "안녕하세요! 답은 42입니다. 🎉"
COUNTING = ["하나 ", "둘 ", "셋 "]
"""For a model without an end."""


def alphabet() -> list[str]:
    """GPT-2's character for every byte: printable ones stand for themselves, the others for 256 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_tiny(
    path: Path,
    script: Sequence[str | bytes],
    *,
    endless: bool = False,
    max_context: int = 4096,
    template: str = CHATML,
    control: Sequence[str] = (),
) -> Path:
    """The model whose answer is `script`, a token per item, over and over if `endless`. Gives `path`.

    `control`: further control tokens, for the script to hold. The prompt must end in a newline; text without a template
    is continued alike.
    """
    letters = alphabet()
    pieces = ["".join(letters[b] for b in (s.encode() if isinstance(s, str) else s)) for s in script]
    assert len(set(pieces)) == len(pieces), "an item has one successor, so it can appear once"
    words = [piece for piece in pieces if len(piece) > 1 and piece not in control]
    tokens = [*CONTROL, *letters, *words, *control]
    token_types = [3] * len(CONTROL) + [1] * (len(letters) + len(words)) + [3] * len(control)
    chain = [tokens.index(letters[ord("\n")]), *map(tokens.index, pieces)]
    assert len(set(chain)) == len(chain), "a newline alone begins the answer"
    chain.append(chain[1] if endless else tokens.index("<|im_end|>"))

    dim = 64
    config = ModelConfig(
        family="llama",
        dim=dim,
        vocab_size=len(tokens),
        max_context=max_context,
        norm_eps=1e-5,
        layers=(
            LayerConfig(
                attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=32, rope=RopeConfig(dim=32, theta=10000.0)),
                feed_forward=FeedForwardConfig(hidden_dim=32),
            ),
        ),
        tied_head=False,
    )
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in weight_shapes(config).items()}
    for name in values:
        if name.endswith("norm"):
            values[name][:] = 1
        if name.endswith((".o", ".down")):
            values[name][:] = 0
    values["head"] *= np.float32(0.1)
    for token, successor in pairwise(chain):
        values["head"][successor] += values["embed"][token]

    metadata, named = families.to_gguf(config, {n: Tensor.from_float32(n, v) for n, v in values.items()})
    metadata |= {
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(token_types, dtype=np.int32),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template,
    }
    write_gguf(path, metadata, [TensorToWrite.of(name, tensor) for name, tensor in named.items()])
    return path


def write_adapter(folder: Path, model: Path, successors: Mapping[str, str]) -> Path:
    """An adapter as PEFT writes it, for a tiny model: after the first of each pair of tokens comes the second."""
    files = open_files(model)
    letters, tokens = alphabet(), list(files.checkpoint.metadata["tokenizer.ggml.tokens"])
    pairs = [[tokens.index("".join(letters[b] for b in text.encode())) for text in pair] for pair in successors.items()]
    a = np.stack([files.tensors["embed"].float32()[first] for first, _ in pairs])  # [n, D]
    b = np.zeros((len(tokens), len(pairs)), dtype=np.float32)
    for i, (_, second) in enumerate(pairs):
        b[second, i] = 3
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": len(pairs), "lora_alpha": len(pairs), "target_modules": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    matrices = {"A": a, "B": b}
    tensors = [
        Tensor.from_float32(f"base_model.model.lm_head.lora_{letter}.weight", matrix)
        for letter, matrix in matrices.items()
    ]
    write_safetensors(folder / "adapter_model.safetensors", [TensorToWrite.of(each.name, each) for each in tensors])
    return folder
