"""Windows of answers that the model has just written: rollouts, with what each was worth.

An answer follows from the weights, its prompt and its seed, and the seed from the run's and the answer's number. What
was written is kept in a file for each time that answers are written, so that a run that goes on learns from the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed as dist

from dapji.engine import BaseEngine, seed_of
from dapji.ops.tensor import Tensor
from dapji.tokenizer import Tokenizer
from dapji.training.actor import Actor, Answer
from dapji.training.data.permutation import Permutation
from dapji.training.data.prompts import Prompt
from dapji.training.data.stream import Window
from dapji.training.rewards import Reward
from dapji.training.settings import RolloutSettings
from dapji.training.sharding import is_first, together
from dapji.weights.files import replacing

_SMALL = 1e-4
"""Added to a group's standard deviation, as TRL has it: rewards that differ by less are alike."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts(Window):
    """Answers of the model."""

    log_probs: NDArray[np.float32]
    """[R] of each learned token, by the model that wrote it."""
    advantages: NDArray[np.float32]
    """[R] how much better than expected each token's answer was."""
    reference: NDArray[np.float32] | None
    """[R] as log_probs, by the model that training begins from, where that is wanted."""
    rewards: NDArray[np.float32]
    """[B]"""
    ended: NDArray[np.bool_]
    """[B] by itself, and not because it had become too long."""
    n_parts: int = 1
    """At most B."""

    def parts(self) -> Sequence[Rollouts]:
        """Of about as many answers each."""
        numbers, owners = np.arange(len(self.rewards)), self.segments[self.learned]  # [B], [R]
        found = []
        for part in np.array_split(numbers, self.n_parts):
            answers, rows = np.isin(numbers, part), np.isin(owners, part)  # [B], [R]
            found.append(
                Rollouts(
                    **vars(self.select(answers)),
                    log_probs=self.log_probs[rows],
                    advantages=self.advantages[rows],
                    reference=None if self.reference is None else self.reference[rows],
                    rewards=self.rewards[answers],
                    ended=self.ended[answers],
                )
            )
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """A prompt and its answers."""

    prompt: Prompt
    number: int
    """Of its prompt in the order of the run."""
    seeds: Sequence[int]
    answers: Sequence[Answer]
    texts: Sequence[str]
    rewards: NDArray[np.float32]
    advantages: Sequence[NDArray[np.float32]]
    references: Sequence[NDArray[np.float32]] | None

    @property
    def lengths(self) -> tuple[int, list[int]]:
        """Tokens of the prompt, and of each answer."""
        return len(self.prompt.ids), [len(answer.tokens) for answer in self.answers]

    def window(self, n_parts: int = 1) -> Rollouts:
        n_prompt = len(self.prompt.ids)
        lengths = [len(answer.tokens) for answer in self.answers]
        starts = np.cumsum([0, *(n_prompt + length for length in lengths)], dtype=np.int32)
        learned = [np.arange(n_prompt + length) >= n_prompt for length in lengths]
        return Rollouts(
            tokens=np.concatenate([[*self.prompt.ids, *answer.tokens] for answer in self.answers]).astype(np.int32),
            learned=np.concatenate(learned),
            starts=starts,
            samples=np.full(len(lengths), self.number, dtype=np.int64),
            good=np.full(len(lengths), -1, dtype=np.int8),
            log_probs=np.concatenate([answer.log_probs for answer in self.answers]),
            advantages=np.concatenate(self.advantages),
            reference=None if self.references is None else np.concatenate(self.references),
            rewards=self.rewards,
            ended=np.array([answer.ended for answer in self.answers]),
            n_parts=n_parts,
        )

    def lines(self) -> list[dict[str, Any]]:
        """A line of the file for each answer."""
        return [
            {
                "prompt": self.number,
                "row": self.prompt.row,
                "seed": self.seeds[i],
                "answer": self.texts[i],
                "reward": float(self.rewards[i]),
                "ended": answer.ended,
                "prompt_tokens": list(self.prompt.ids),
                "tokens": list(answer.tokens),
                "log_probs": answer.log_probs.tolist(),
                "advantages": self.advantages[i].tolist(),
                "reference_log_probs": None if self.references is None else self.references[i].tolist(),
            }
            for i, answer in enumerate(self.answers)
        ]

    @classmethod
    def of(cls, lines: Sequence[Mapping[str, Any]]) -> _Group:
        """What `lines` gave."""

        def floats(name: str) -> list[NDArray[np.float32]]:
            return [np.array(line[name], dtype=np.float32) for line in lines]

        return cls(
            prompt=Prompt(ids=lines[0]["prompt_tokens"], row=lines[0]["row"]),
            number=lines[0]["prompt"],
            seeds=[line["seed"] for line in lines],
            answers=[
                Answer(tokens=line["tokens"], log_probs=log_probs, ended=line["ended"])
                for line, log_probs in zip(lines, floats("log_probs"), strict=True)
            ],
            texts=[line["answer"] for line in lines],
            rewards=np.array([line["reward"] for line in lines], dtype=np.float32),
            advantages=floats("advantages"),
            references=None if lines[0]["reference_log_probs"] is None else floats("reference_log_probs"),
        )


Judge = Callable[[Prompt, Sequence[Answer], Sequence[str]], tuple[NDArray[np.float32], list[NDArray[np.float32]]]]
"""Of a prompt, its answers and their texts: a reward for each, [n], and for each the advantages of its tokens."""


def judge_by_reward(reward: Reward, *, scale: bool) -> Judge:
    """Every token of an answer is as much better as the answer's reward is above that of its group."""

    def judge(
        prompt: Prompt, answers: Sequence[Answer], texts: Sequence[str]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        rewards = np.array([reward(text, prompt.row) for text in texts], dtype=np.float32)
        above = advantages(rewards, scale and len(rewards) > 1)
        return rewards, [np.full(len(each.tokens), value) for each, value in zip(answers, above, strict=True)]

    return judge


def judge_by_teacher(teacher: BaseEngine) -> Judge:
    """Every token is as much better as the teacher finds it likelier than the model that wrote it. So its expectation
    is the gradient of KL(student || teacher) in each place (Lu et al. 2025). An answer's reward is the mean."""

    def judge(
        prompt: Prompt, answers: Sequence[Answer], texts: Sequence[str]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        above = [
            teacher.score([*prompt.ids, *each.tokens], start=len(prompt.ids)).chosen.astype(np.float32) - each.log_probs
            for each in answers
        ]
        return np.array([each.mean() for each in above], dtype=np.float32), above

    return judge


def advantages(rewards: NDArray[np.float32], scale: bool) -> NDArray[np.float32]:
    """[n] rewards of a group above its mean, in units of its standard deviation (of a sample) where `scale`."""
    above = rewards - rewards.mean()
    result: NDArray[np.float32] = above / (rewards.std(ddof=1) + _SMALL) if scale else above
    return result.astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Writing:
    """What writes answers, and judges them."""

    actor: Actor
    judge: Judge
    tokenizer: Tokenizer
    settings: RolloutSettings
    weights: Callable[[], Mapping[str, Tensor]]
    """As they are now; all ranks call it together."""

    def refresh(self) -> None:
        """From here on the answers are those of the weights as they are now."""
        self.actor.load(self.weights())

    def groups(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], seeds: Sequence[Sequence[int]], *, drawn: bool = True
    ) -> list[_Group]:
        """An answer to each prompt for each of its seeds; drawn False: the likeliest one, whatever the seed."""
        answers = self.actor.write(
            [prompt.ids for prompt, own in zip(prompts, seeds, strict=True) for _ in own],
            max_tokens=self.settings.max_tokens,
            seeds=[seed for own in seeds for seed in own] if drawn else None,
        )
        found, rest = [], iter(answers)
        for prompt, number, own in zip(prompts, numbers, seeds, strict=True):
            group = list(islice(rest, len(own)))
            texts = [answer.text(self.tokenizer) for answer in group]
            rewards, above = self.judge(prompt, group, texts)
            found.append(
                _Group(
                    prompt=prompt,
                    number=number,
                    seeds=own,
                    answers=group,
                    texts=texts,
                    rewards=rewards,
                    advantages=above,
                    references=self._references(prompt, group),
                )
            )
        return found

    def _references(self, prompt: Prompt, answers: Sequence[Answer]) -> list[NDArray[np.float32]] | None:
        """What the model that training begins from thinks of them, where that is wanted."""
        if not self.settings.kl:
            return None
        sequences = [[*prompt.ids, *answer.tokens] for answer in answers]
        return self.actor.score_by_base(sequences, [len(prompt.ids)] * len(answers))


class RolloutSource:
    """A window for each prompt: a group of answers. Every `batch` of them, so many steps as `reuse` says, are written
    together."""

    def __init__(
        self, prompts: Sequence[Prompt], writing: Writing, *, folder: Path, batch: int, capacity: int, seed: int
    ) -> None:
        """folder: where the answers are kept. capacity: tokens of a part of a window, unless one answer has more."""
        self._prompts = prompts
        self._writing = writing
        self._folder = folder
        self._batch = batch
        self._capacity = capacity
        self._seed = seed
        self._written: tuple[int, dict[int, _Group]] = (-1, {})

    def take(self, indices: Sequence[int]) -> Sequence[Rollouts]:
        turn = indices[0] // self._batch // self._writing.settings.reuse
        if self._written[0] != turn:
            self._written = (turn, self._turn(turn))
        groups = self._written[1]
        n_parts = _n_parts([group.lengths for group in groups.values()], self._capacity)
        return [groups[turn * self._batch + index % self._batch].window(n_parts) for index in indices]

    def _turn(self, turn: int) -> dict[int, _Group]:
        """The groups that are written together, by number: read where they were written before."""
        path = self._folder / f"step-{turn * self._writing.settings.reuse + 1:08}.jsonl"
        together()
        if not path.exists():
            self._writing.refresh()
            rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            numbers = range(turn * self._batch, (turn + 1) * self._batch)
            lines = [line for group in self._write(numbers[rank::ranks]) for line in group.lines()]
            everyone: list[Any] = [lines] * ranks
            if ranks > 1:
                dist.all_gather_object(everyone, lines)
            if is_first():
                self._folder.mkdir(exist_ok=True)
                with replacing(path) as file:
                    for line in (line for lines in everyone for line in lines):
                        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        together()
        found: dict[int, list[Mapping[str, Any]]] = {}
        with path.open(encoding="utf-8") as file:  # a line of it may hold what splitlines() would split at
            for line in map(json.loads, file):
                found.setdefault(line["prompt"], []).append(line)
        return {number: _Group.of(lines) for number, lines in found.items()}

    def _write(self, numbers: Sequence[int]) -> list[_Group]:
        n, size = len(self._prompts), self._writing.settings.group
        prompts = [
            self._prompts[int(Permutation(n, self._seed + (number // n << 32)).at(np.array([number % n]))[0])]
            for number in numbers
        ]
        seeds = [[seed_of(self._seed % (1 << 64), number, i) for i in range(size)] for number in numbers]
        return self._writing.groups(prompts, numbers, seeds)


class EvaluationSource:
    """A window for each prompt that is held out: the likeliest answer. Nothing is learned from it."""

    def __init__(self, prompts: Sequence[Prompt], writing: Writing) -> None:
        self._prompts = prompts
        self._writing = writing

    def take(self, indices: Sequence[int]) -> Sequence[Rollouts]:
        self._writing.refresh()
        prompts = [self._prompts[index] for index in indices]
        groups = self._writing.groups(prompts, indices, [[0]] * len(prompts), drawn=False)
        return [group.window() for group in groups]


def _n_parts(groups: Sequence[tuple[int, Sequence[int]]], capacity: int) -> int:
    """Into how many parts all groups are split, alike on every rank, so that none has more tokens; at most one for each
    answer. groups: the tokens of the prompt, which a part has once, and of each answer."""
    most = len(groups[0][1])

    def fits(n: int) -> bool:
        return all(prompt + sum(part) <= capacity for prompt, own in groups for part in np.array_split(own, n))

    return next((n for n in range(1, most) if fits(n)), most)
