"""`train`: a vocabulary of one's own: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) over texts.

Counting and merging are the `tokenizers` library's. What comes out is GGUF metadata, from which every other form
follows. Knows no files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, trainers

from dapji.errors import UsageError
from dapji.tokenizer import gguf
from dapji.tokenizer.description import byte_alphabet

_CONTROL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
"""The first two around every document, the others around the messages of a conversation."""
SMALLEST = len(_CONTROL) + 256
"""Control tokens and a token for each byte: any text can be written with these."""
_CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CUT = "smollm"
"""How texts are cut into words: digits one by one, then as GPT-2; what other programs know by this name."""


def train(texts: Iterable[str], vocab_size: int, *, bars: bool = False) -> dict[str, Any]:
    """`tokenizer.*` metadata of a vocabulary of so many tokens, at least SMALLEST, with a ChatML template. The same for
    the same texts.

    bars: the library's own, on stderr. Raises UsageError where the texts have fewer different pairs to merge.
    """
    assert vocab_size >= SMALLEST
    keys: dict[str, Any] = {"model": "gpt2", "pre": _CUT}
    encoder = tokenizers.Tokenizer(models.BPE())
    encoder.pre_tokenizer = gguf.describe(_metadata({**keys, "tokens": [], "merges": []})).encoder.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_CONTROL),
        initial_alphabet=sorted(byte_alphabet().values()),
        show_progress=bars,
    )
    encoder.train_from_iterator(texts, trainer)
    model = json.loads(encoder.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if len(tokens) < vocab_size:
        raise UsageError(
            f"the texts are enough for a vocabulary of {len(tokens)} tokens, not of {vocab_size}",
            hint="more text, or a smaller --vocab-size",
        )
    types = [gguf.CONTROL] * len(_CONTROL) + [gguf.NORMAL] * (vocab_size - len(_CONTROL))
    keys |= {
        "tokens": tokens,
        "token_type": np.array(types, dtype=np.int32),
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": tokens.index("<|begin_of_text|>"),
        "eos_token_id": tokens.index("<|end_of_text|>"),
        "eot_token_id": tokens.index("<|im_end|>"),
        "add_bos_token": True,
    }
    return {**_metadata(keys), "tokenizer.chat_template": _CHATML}


def _metadata(keys: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
