"""`Encoder`: examples to token ids, each with whether it is learned.

What is learned of a conversation are the assistant's own tokens, each answer through the token that ends it, after the
very prompt that the model gets when it answers (`dapji.chat.turn`). Masks are made where ids are, from what was
written, never by looking for ids: a pad token that is the end token too changes nothing. Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dapji.chat import ChatTemplate
from dapji.chat.turn import Turns
from dapji.errors import ContextError, FormatError
from dapji.tokenizer import Tokenizer
from dapji.training.data.examples import Conversation, Example, Preference, Rated, Text

Note = Literal["end added", "reasoning switched", "split by the template", "cut into pieces", "truncated"]
"""What was done for an example beyond writing it down."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequence:
    """Tokens that see each other."""

    ids: NDArray[np.int32]
    """[T]"""
    learned: NDArray[np.bool_]
    """[T] whether the model learns to write this token; at least one is. The first has nothing before it: never."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What training draws at once."""

    sequences: tuple[Sequence, ...]
    """One; of a preference two: the chosen and the rejected."""
    good: bool | None = None
    """Of a rated answer."""

    def __len__(self) -> int:
        """Tokens of all sequences."""
        return sum(len(sequence.ids) for sequence in self.sequences)


class Encoded(NamedTuple):
    samples: list[Sample]
    notes: frozenset[Note]


class Encoder:
    """Examples as one model sees them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """max_length: of a sequence, in tokens. truncate: cut longer ones at their end, and count them, where otherwise
        they are refused. variables: of the chat template, as in `ChatTemplate.render`."""
        self._tokenizer = tokenizer
        self._turns = Turns(ChatTemplate.of(tokenizer), variables)
        self._max_length = max_length
        self._truncate = truncate

    def encode(self, example: Example) -> Encoded:
        """One sample; several of a conversation in which the template rewrites earlier answers, and of a long text.

        Raises FormatError with the reason where there is nothing to learn, TemplateError as `Turns.turn`,
        TokenizerError, and ContextError where a sequence is too long.
        """
        notes: set[Note] = set()
        if isinstance(example, Preference):
            pair = [self._single(side, name, notes) for name, side in vars(example).items()]
            if np.array_equal(pair[0].ids, pair[1].ids):
                raise FormatError("chosen and rejected are the same", hint="there is nothing to prefer")
            samples = [Sample(sequences=tuple(pair))]
        elif isinstance(example, Rated):
            samples = [Sample(sequences=(self._single(example.answer, "answer", notes),), good=example.good)]
        else:
            samples = [Sample(sequences=(sequence,)) for sequence in self._sequences(example, notes)]
        return Encoded(samples, frozenset(notes))

    def _single(self, answer: Conversation | Text, name: str, notes: set[Note]) -> Sequence:
        sequences = self._sequences(answer, notes)
        if len(sequences) > 1:
            raise FormatError(
                f"the {name} has answers that the chat template rewrites later, or is longer than the context",
                hint="let it end with one answer",
            )
        return sequences[0]

    def _sequences(self, example: Conversation | Text, notes: set[Note]) -> list[Sequence]:
        made = self._text(example, notes) if isinstance(example, Text) else self._conversation(example, notes)
        return [self._checked(ids, learned, notes) for ids, learned in made]

    def _conversation(self, example: Conversation, notes: set[Note]) -> list[tuple[list[int], list[bool]]]:
        """Answers share a sequence as long as each prompt goes on from the answer before, token for token."""
        made: list[tuple[list[int], list[bool]]] = []
        for index in sorted(example.trained):
            turn = self._turns.turn(example.messages, index, example.tools or None)
            if turn.end_added:
                notes.add("end added")
            if turn.variables:
                notes.add("reasoning switched")
            before = len(made[-1][0]) if made else 0
            learned = made.pop()[1] if made and turn.prompt[:before] == made[-1][0] else []
            learned += [False] * (len(turn.prompt) - len(learned)) + [True] * len(turn.answer)
            made.append((turn.prompt + turn.answer, learned))
        if len(made) > 1:
            notes.add("split by the template")
        return made

    def _text(self, example: Text, notes: set[Note]) -> list[tuple[list[int], list[bool]]]:
        """BOS where the model wants one, prompt, text, end token.

        A text that is too long and has no prompt is cut into pieces, each with BOS and the token before it.
        """
        tokenizer = self._tokenizer
        if tokenizer.eos_id is None:
            raise FormatError("the tokenizer has no end token, so no end of a text can be learned")
        bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        prompt = bos + tokenizer.encode(example.prompt)
        text = [*tokenizer.encode_after([example.prompt], [example.text]), tokenizer.eos_id]
        room = len(prompt) + len(text) if self._max_length is None else self._max_length
        if example.prompt or len(prompt) + len(text) <= room or room < len(bos) + 2:
            return [(prompt + text, [False] * len(prompt) + [True] * len(text))]
        notes.add("cut into pieces")
        room -= len(bos)
        pieces, at = [], 0
        while at < len(text):
            overlap = min(at, 1)  # the token before, so that the first one of the piece is learned too
            piece = text[at - overlap : at - overlap + room]
            at += len(piece) - overlap
            learned = [False] * (len(bos) + overlap) + [True] * (len(piece) - overlap)
            pieces.append((bos + piece, learned))
        return pieces

    def _checked(self, ids: list[int], learned: list[bool], notes: set[Note]) -> Sequence:
        if self._max_length is not None and len(ids) > self._max_length:
            if not self._truncate:
                raise ContextError(
                    f"{len(ids)} tokens, but the context has {self._max_length}",
                    hint="a longer context, or --truncate, which cuts off the end of what is too long",
                )
            notes.add("truncated")
            ids, learned = ids[: self._max_length], learned[: self._max_length]
        bos = self._tokenizer.bos_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise FormatError("it begins with BOS twice", hint="the chat template or the text writes one of its own")
        mask = np.array(learned, dtype=np.bool_)
        mask[0] = False
        if not mask.any():
            raise FormatError(f"none of its {len(ids)} tokens is learned", hint="is the prompt as long as the context?")
        return Sequence(ids=np.array(ids, dtype=np.int32), learned=mask)
