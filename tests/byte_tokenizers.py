"""Byte-level tokenizers with chosen control tokens, in our reading and in transformers'."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dapji.tokenizer import Tokenizer

_CONTROL = re.compile(
    r"<\|[\w/ .:-]{1,40}\|>|<｜[^｜\s]{1,40}｜>|<\|?\w+\|>|</?s>"
    r"|\[/?[A-Z_]{3,30}\]|<(?:start|end)_of_\w+>|<[a-z]{2,8}:\w+>"
)
"""What control tokens look like: <|im_end|>, <｜User｜>, [INST], </s>, <end_of_turn>, <seed:bos>, <turn|>."""
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

ENDS = {
    "Apertus-8B-Instruct": ["<|assistant_end|>"],
    "Apriel-1.6-15b-Thinker-fixed": ["<|end|>"],
    "ByteDance-Seed-OSS": ["<seed:eos>"],
    "Cohere2MoE": ["<|END_OF_TURN_TOKEN|>"],
    "CohereForAI-c4ai-command-r-plus-tool_use": ["<|END_OF_TURN_TOKEN|>"],
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ["<|END_OF_TURN_TOKEN|>"],
    "GLM-4.6": ["<|user|>", "<|observation|>"],
    "GLM-4.7-Flash": ["<|user|>", "<|observation|>"],
    "GigaChat3-10B-A1.8B": ["<|message_sep|>"],
    "GigaChat3.1-10B-A1.8B": ["<|message_sep|>"],
    "Kimi-K3": ["<|end_of_msg|>"],
    "MiniMax-M1": ["<end_of_sentence>"],
    "MiniMax-M2": ["[e~["],
    "MiniMax-M3": ["[e~["],
    "NVIDIA-Nemotron-Nano-v2": ["<SPECIAL_12>"],
    "Reka-Edge": ["<sep>"],
    "google-gemma-4-31B-it": ["<turn|>", "<|tool_response>"],
    "inclusionai-ling-3.0-flash": ["<|role_end|>"],
    "poolside-Laguna-S-2.1": ["</assistant>"],
    "poolside-Laguna-XS-2.1": ["</assistant>"],
    "poolside-Laguna-XS.2": ["</assistant>"],
    "tencent-Hy3": ["<｜hy_eos:opensource｜>"],
    "upstage-Solar-Open-100B": ["<|end|>", "<|calls|>"],
}
"""Template of llama.cpp's collection -> eos_token_id of its model, where the spelling does not tell end tokens."""


@dataclass(frozen=True)
class Tokenizers:
    ours: Tokenizer
    theirs: PreTrainedTokenizerFast


def control_tokens(source: str) -> set[str]:
    """What looks like a control token in a template."""
    return {match[0] for match in _CONTROL.finditer(source)}


def make_tokenizers(
    control: Iterable[str], folder: Path, ends: Sequence[str] = (), template: str | None = None
) -> Tokenizers:
    """Byte-level, without merges: what matters here is where control tokens are and that all text arrives.

    ends: what generation_config.json names as tokens that end an answer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    spellings = sorted({*control, *NAMES.values(), *ends})
    backend.add_special_tokens([AddedToken(spelling, normalized=False) for spelling in spellings])
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    if ends:
        ids = theirs.convert_tokens_to_ids(list(ends))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return Tokenizers(Tokenizer.from_folder(folder), theirs)
