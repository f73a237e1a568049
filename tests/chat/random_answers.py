"""Answers drawn at random under a grammar, byte by byte: what a model could write, whatever it would like to."""

from __future__ import annotations

import json
from collections.abc import Sequence

import llguidance
import llguidance.numpy
import numpy as np

from dapji.chat.grammar import Grammar

FORMATS_OF_CALLS = {
    "json": "<tool_call> <think></think>",
    "json without reasoning": "<tool_call>",
    "lists": "<TOOLCALL>",
    "ids": "<|START_ACTION|>",
    "names as keys": "<|tools_prefix|>",
    "no closer": "<|tool_call|>",
    "llama": '{"name": f, "parameters": {}} ipython',
    "llama lists": "[func_name1(",
    "llama 4": "<|python_start|>",
    "pythonic": "<|tool_call_start|>",
    "qwen 3 coder": "<tool_call><function= <think></think>",
    "seed": "<seed:tool_call><function=",
    "minimax": '<minimax:tool_call><invoke name="',
    "dsml": "｜DSML｜tool_calls",
    "minicpm": '<function name="<param name="',
    "glm": "<tool_call><arg_key><think></think>",
    "deepseek r1": "<｜tool▁calls▁begin｜>```json",
    "deepseek": "<｜tool▁calls▁begin｜>",
    "kimi": "<|tool_calls_section_begin|>",
    "kimi k3": "<|open|><|sep|><|close|>",
    "mistral": "[TOOL_CALLS]",
    "mistral without lists": "[TOOL_CALLS][ARGS]",
    "mistral with ids": "[TOOL_CALLS][ARGS][CALL_ID]",
    "gpt-oss": "<|channel|><|message|>",
}
"""Texts that templates contain, by which the formats of their answers are told."""
_LIKELY = {'"]})>': 8.0, " \n\t\r\\": 0.3}
"""Weights of bytes beside 1: so that brackets and strings end."""


class Vocabulary:
    """Bytes, the spellings of control tokens, and an end."""

    def __init__(self, control: Sequence[str] = ()) -> None:
        self.control = {spelling: 256 + i for i, spelling in enumerate(control)}
        self.eos_token_id = 256 + len(control)
        self.bos_token_id = None
        self.special_token_ids = [*self.control.values(), self.eos_token_id]
        self.tokens = [*(bytes([byte]) for byte in range(256)), *(s.encode() for s in control), b"<eos>"]
        self.weights = np.ones(len(self.tokens))
        self.weights[128:256] = 0.05
        self.weights[256:] = 6.0
        for characters, weight in _LIKELY.items():
            self.weights[list(characters.encode())] = weight
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self))

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())

    def matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, json.dumps({"grammars": json.loads(grammar.parts)}))
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def draw(
        self, matcher: llguidance.LLMatcher, seed: int, *, markers: Sequence[str] = (), limit: int = 1500
    ) -> list[int] | None:
        """Tokens of an answer, its end left out; None where the limit cuts it off. markers: written now and then by
        their letters, which chance would not spell."""
        matcher, chance, tokens = matcher.deep_copy(), np.random.default_rng(seed), []
        for _ in range(limit):
            if markers and chance.random() < 0.02:
                spelled = list(markers[chance.integers(len(markers))].encode())
                if matcher.validate_tokens(spelled) == len(spelled):
                    assert matcher.consume_tokens(spelled)
                    tokens += spelled
            bits = llguidance.numpy.allocate_token_bitmask(1, len(self.weights))
            llguidance.numpy.fill_next_token_bitmask(matcher, bits, 0)
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), count=len(self.weights), bitorder="little"))
            assert len(allowed), (bytes(t for t in tokens if t < 256), matcher.get_error())
            sums = np.cumsum(self.weights[allowed])
            token = int(allowed[np.searchsorted(sums, chance.random() * sums[-1], side="right")])
            if token == self.eos_token_id:
                return tokens
            assert matcher.consume_token(token)
            tokens.append(token)
        return None
