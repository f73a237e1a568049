"""Greedy text of a real model, the same on every executor, token for token.

SmolLM2-135M with its weights dequantised to float32, so that every executor multiplies the same numbers. Where an
executor prefers another token, its two best logits must be a tie, and the place is listed.

With its weights as they are, Q4_1, the native executor rounds activations to int8. Every instruction set must then give
the same bits as plain C++ does. The numpy reference of that arithmetic adds up in another order, which can put an
activation on the other side of an int8 step; so there a tie is wider, no wider than the rounding itself makes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dapji.models import families
from dapji.models.config import ModelConfig
from dapji.models.executor import ExecutorKind, open_executor
from dapji.ops import native
from dapji.ops.batch import KV_BLOCK
from dapji.ops.tensor import Tensor
from dapji.tokenizer import Tokenizer
from dapji.weights import store
from dapji.weights.checkpoint import open_checkpoint
from greedy import decode

MODEL = "smollm2-135m"
KINDS: list[ExecutorKind] = ["reference", "torch", "native"]
TIE = 1e-4
ROUNDED_TIE = 0.75
"""On logits of magnitude 20: 0.54 is the most among the 4,000 tokens of the long texts; 0.33 occurs between int8 and
float32 activations as well."""

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived a",
    "def fibonacci(n):\n    ",
    "Dear Ms. Kim,\n\nThank you for your letter of",
    "Q: Why is the sky blue?\nA:",
    "The three most important things about baking bread are",
    "In 1969, two astronauts",
    "To be, or not to be:",
    "1, 1, 2, 3, 5, 8, 13,",
    "A cat and a dog walk into a bar. The cat says",
    "대한민국의 수도는",
    "옛날 옛적에 깊은 산속에",
    "안녕하세요? 저는",
    "하늘이 파란 이유는",
    "맛있는 김치찌개를 끓이려면 먼저",
    "서울에서 부산까지 기차로",
    "오늘 날씨가 아주 좋아서",
    "세종대왕은 한글을",
    "다음 문장을 영어로 번역하세요: 나는 학교에 갑니다.",
    "답지(Dapji)는 열린 언어 모델을 위한",
]


@pytest.fixture(scope="module")
def quantised() -> tuple[ModelConfig, dict[str, Tensor], list[list[int]]]:
    """Configuration, weights as published, the prompts as tokens."""
    checkpoint = open_checkpoint(store.resolve(MODEL))
    config, tensors = families.from_gguf(checkpoint.metadata, checkpoint.tensors)
    tokenizer = Tokenizer.from_gguf(checkpoint.metadata)
    return config, tensors, [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def model(
    quantised: tuple[ModelConfig, dict[str, Tensor], list[list[int]]],
) -> tuple[ModelConfig, dict[str, Tensor], list[list[int]]]:
    """The same with float32 weights."""
    config, tensors, prompts = quantised
    return config, {name: Tensor.from_float32(name, tensor.float32()) for name, tensor in tensors.items()}, prompts


def check(
    model: tuple[ModelConfig, dict[str, Tensor], list[list[int]]],
    which: list[int],
    n_tokens: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, tensors, all_prompts = model
    prompts = [all_prompts[i] for i in which]
    context = max(map(len, prompts)) + n_tokens
    n_blocks = len(prompts) * -(-context // KV_BLOCK)
    text: NDArray[np.int64] | None = None
    for kind in reversed(KINDS):
        executor = open_executor(kind, config, tensors, context=context, n_blocks=n_blocks, kv="f32")
        chosen, margins = decode(executor, prompts, n_tokens, follow=text)
        executor.close()
        text = chosen if text is None else text
        assert np.unique(text).size > n_tokens // 2  # a text, not one token again and again
        for prompt, place in np.argwhere(chosen != text):
            margin = margins[prompt, place]
            with capsys.disabled():
                print(f"\n{kind}: a tie of {margin:.1e} at token {place} after {PROMPTS[which[prompt]]!r}")
            assert margin <= TIE


def test_two_short_texts(
    model: tuple[ModelConfig, dict[str, Tensor], list[list[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """An English and a Korean one."""
    check(model, [1, 11], 24, capsys)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_texts_of_200_tokens(
    model: tuple[ModelConfig, dict[str, Tensor], list[list[int]]], capsys: pytest.CaptureFixture[str]
) -> None:
    check(model, list(range(len(PROMPTS))), 200, capsys)


@pytest.mark.parametrize(
    ("which", "n_tokens"),
    [
        ([1, 11], 16),
        pytest.param(
            list(range(len(PROMPTS))), 200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="twenty-texts"
        ),
    ],
)
def test_quantised_weights(
    quantised: tuple[ModelConfig, dict[str, Tensor], list[list[int]]],
    which: list[int],
    n_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, tensors, all_prompts = quantised
    prompts = [all_prompts[i] for i in which]
    context = max(map(len, prompts)) + n_tokens
    n_blocks = len(prompts) * -(-context // KV_BLOCK)

    def run(kind: ExecutorKind, follow: NDArray[np.int64] | None, **options: Any) -> tuple[Any, Any]:
        executor = open_executor(kind, config, tensors, context=context, n_blocks=n_blocks, kv="f32", **options)
        result = decode(executor, prompts, n_tokens, follow=follow)
        executor.close()
        return result

    text, margins = run("native", None)
    for isa in native.isas():
        if isa == "generic" and n_tokens > 16:
            continue  # plain C++ is a hundred times slower; the two short texts are its share
        monkeypatch.setenv("DAPJI_ISA", isa)
        same, same_margins = run("native", text)
        np.testing.assert_array_equal(same, text)
        np.testing.assert_array_equal(same_margins, margins)
    chosen, chosen_margins = run("reference", text, activations="q8")
    assert np.mean(chosen == text) > 0.85  # of 32 tokens, ties decide some
    assert chosen_margins[chosen != text].max(initial=0) < ROUNDED_TIE
