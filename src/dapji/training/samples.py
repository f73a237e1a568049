"""Samples of a run: what the model answers while it is being trained, so that people see what it learns.

The same questions at each evaluation, answered by the likeliest tokens on the engine that chats and serves: an adapter
beside the base as its file has it. Nothing is learned from them, and training is bit for bit the same without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, TypeVar

import numpy as np

from dapji.chat import ChatTemplate
from dapji.chat.turn import text_of
from dapji.errors import ContextError
from dapji.files import Files
from dapji.models.config import ModelConfig
from dapji.ops.tensor import Tensor
from dapji.tokenizer import Tokenizer
from dapji.training.actor import Actor
from dapji.training.data.encoding import Sequence as Encoded
from dapji.training.data.examples import Text
from dapji.training.data.prompts import Prompt, asked, prompt_ids
from dapji.training.data.reading import Entry
from dapji.training.settings import Recipe, SamplesSettings
from dapji.training.sharding import is_first

T = TypeVar("T")

_ON_CPU = 4
"""Held-out examples that are answered on a CPU, where nobody says how many."""
_BEGINNING = 32
"""Tokens of a text without a prompt that the model goes on from, at most; and at most half of it."""


@dataclass(frozen=True, kw_only=True)
class Question:
    ids: Sequence[int]
    """What the model is given."""
    text: str
    """What that asks, for people."""
    expected: str | None = None
    """The answer of the example, where it has one."""


class Reservoir(Generic[T]):
    """A few of many that pass by, each as likely as any other (Vitter 1985, algorithm R)."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._random = Random(seed)
        self._kept: list[tuple[int, T]] = []
        self._seen = 0

    def add(self, each: T) -> None:
        place = self._seen if self._seen < self._count else self._random.randrange(self._seen + 1)
        if place < self._count:
            self._kept[place : place + 1] = [(self._seen, each)]
        self._seen += 1

    def __iter__(self) -> Iterator[T]:
        """In the order in which they came."""
        return (each for _, each in sorted(self._kept, key=lambda kept: kept[0]))


def held_out_count(recipe: Recipe) -> int:
    """Held-out examples that are answered."""
    count = recipe.samples.count
    if count is None:
        return _ON_CPU if recipe.run.device == "cpu" else 0
    return count


def question_of(entry: Entry, tokenizer: Tokenizer) -> Question:
    """The last answer of an example; of a preference, that of the chosen side."""
    sample, example = entry.samples[0], entry.example
    assert example is not None
    sequence: Encoded = sample.sequences[0]
    end = int(np.flatnonzero(sequence.learned)[-1]) + 1
    others = np.flatnonzero(~sequence.learned[:end])
    first = int(others[-1]) + 1
    ids = sequence.ids[:end].tolist()
    text = example.asked
    if isinstance(example, Text) and not example.prompt:  # all of it is learned
        first = max(1, min(_BEGINNING, end // 2))
        text = tokenizer.decode(ids[:first])
    expected = tokenizer.decode(ids[first:], continuation=True)
    return Question(ids=ids[:first], text=text, expected=None if sample.good is False else expected)


def question_of_prompt(prompt: Prompt) -> Question:
    question = asked(prompt.row)
    return Question(ids=prompt.ids, text=question if isinstance(question, str) else text_of(question[0][-1]))


def has_room(question: Question, settings: SamplesSettings, config: ModelConfig) -> bool:
    """For an answer, in the model's context."""
    return len(question.ids) + settings.max_tokens <= config.max_context


def own_questions(settings: SamplesSettings, tokenizer: Tokenizer, config: ModelConfig) -> list[Question]:
    """Those of the recipe. Raises ContextError where one leaves no room for an answer."""
    template = ChatTemplate.of(tokenizer)
    questions = []
    for number, text in enumerate(settings.prompts):
        row = {"messages": [{"role": "user", "content": text}]} if template.names else {"prompt": text}
        question = Question(ids=prompt_ids(row, tokenizer, template), text=text)
        if not has_room(question, settings, config):
            raise ContextError(
                f"samples.prompts[{number}] has {len(question.ids)} tokens, its answer up to {settings.max_tokens}, "
                f"but the model's context is {config.max_context}",
                hint="a smaller samples.max_tokens, or a shorter prompt",
            )
        questions.append(question)
    return questions


class Sampler:
    """Asks the questions of a run. All ranks make one."""

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        recipe: Recipe,
        files: Files,
        tokenizer: Tokenizer,
        device: str,
        weights: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """weights: what is trained, as it is now; all ranks call it together."""
        self._questions = questions
        self._recipe = recipe
        self._files = files
        self._device = device
        self._weights = weights
        self._tokenizer = tokenizer

    def answers(self) -> list[dict[str, Any]]:
        """Of all questions, by the first rank; none from the others."""
        if not self._questions:
            return []
        weights = self._weights()
        if not is_first():
            return []
        # Opened anew each time: between evaluations its memory is training's.
        with closing(self._actor()) as actor:
            actor.load(weights)
            answers = actor.write(
                [question.ids for question in self._questions],
                max_tokens=self._recipe.samples.max_tokens,
                seeds=None,
            )
        return [
            {
                "sample": number,
                "prompt": question.text,
                "expected": question.expected,
                "answer": answer.text(self._tokenizer, continuation=True),
                "ended": answer.ended,
            }
            for number, (question, answer) in enumerate(zip(self._questions, answers, strict=True))
        ]

    def _actor(self) -> Actor:
        return Actor(
            self._files.config,
            self._files.tensors,
            self._tokenizer,
            lora=self._recipe.lora,
            context=max(len(question.ids) for question in self._questions) + self._recipe.samples.max_tokens,
            device=self._device,
            dtype="bfloat16" if self._recipe.run.dtype == "bfloat16" else "float32",
            parallel=len(self._questions),
        )
