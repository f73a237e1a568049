"""Tasks of EleutherAI's lm-evaluation-harness on our engine, in this process; the extra `eval`.

The harness makes requests of texts and scores the answers. Its own rules say how a pair of texts becomes tokens, what
is cut where a text is too long, and where long ones are divided, so that scores compare with those of its other models.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from itertools import count
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dapji.errors import UsageError
from dapji.evaluation.answering import together
from dapji.model import AsyncReply, Model

T = TypeVar("T")

MAX_TOKENS = 256
"""Of an answer to a task that does not say, as for the harness's own models."""
_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"})


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model as the harness asks it. Requests run side by side, so that a context that several share is read once."""

    def __init__(
        self, model: Model, progress: Callable[[str, int, int], object] = lambda what, done, total: None
    ) -> None:
        """progress: called with a kind of requests, how many are done, and of how many."""
        super().__init__()
        self.cut = 0
        """Requests whose context lost its beginning, as it was too long."""
        self._model = model
        self._progress = progress

    @property
    def max_length(self) -> int:
        return self._model.engine.context

    @property
    def eot_token_id(self) -> int:
        return min(self._model.engine.end_tokens)

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text without a context."""
        bos = self._model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._model.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """For the harness's record."""
        name = chat_template if isinstance(chat_template, str) else "default"
        return self._model.tokenizer.chat_templates.get(name) if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Without a generation prompt the last message is the beginning of an answer, to be continued."""
        text = str.__str__(self._model.template.render(chat_history, add_generation_prompt=add_generation_prompt))
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Control tokens count where they are spelled, as the harness hands on chat templates as text."""
        tokenizer = self._model.tokenizer
        parts = tokenizer.split_control(string)
        wanted = tokenizer.add_bos if add_special_tokens is None else add_special_tokens
        if wanted and tokenizer.bos_id is not None and parts[:1] != [tokenizer.bos_id]:
            parts.insert(0, tokenizer.bos_id)
        return tokenizer.encode_parts(parts)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in rolling]
            windows += [(("", ""), *pair) for pair in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        number = self._model.adapter_number(None)

        async def score(context: list[int], continuation: list[int]) -> tuple[float, bool]:
            ids = (context + continuation)[-(self.max_length + 1) :]
            start = len(ids) - len(continuation)
            if start < 1:
                raise UsageError(
                    f"a text to score has {len(continuation)} tokens, more than the context's {self.max_length}",
                    hint="a larger --context",
                )
            self.cut += len(ids) < len(context) + len(continuation)
            scores = await self._model.engine.ascore(ids, start=start, n_top=1, adapter=number)
            likeliest = [top[0][0] for top in scores.top]
            return float(scores.chosen.sum()), likeliest == continuation

        return self._together("scoring", [score(context, continuation) for _, context, continuation in requests])

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        async def answer(context: str, given: Mapping[str, Any]) -> str:
            options = dict(normalize_gen_kwargs(dict(given), MAX_TOKENS))
            max_tokens, stop = options.pop("max_gen_toks"), [text for text in options.pop("until") if text]
            if not options.pop("do_sample"):
                options["temperature"] = 0.0
            if unknown := options.keys() - _SAMPLING:
                raise UsageError(
                    f"the task's generation_kwargs have {min(unknown)!r}, which the engine does not know",
                    hint=f"known: until, max_gen_toks, do_sample, {', '.join(sorted(_SAMPLING))}",
                )
            ids, room = self.tok_encode(context), self.max_length - max_tokens
            if room < 1:
                raise UsageError(
                    f"the task's answers have up to {max_tokens} tokens, the context only {self.max_length}",
                    hint="a larger --context",
                )
            self.cut += len(ids) > room
            ready = self._model.prepare_completion(ids[-room:], max_tokens=max_tokens, stop=stop, **options)
            return (await AsyncReply(self._model.engine, ready).whole()).text

        return self._together("answering", [answer(*request.args) for request in requests])

    def _together(self, what: str, work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """The results in order. Raises the first error."""
        done = count(1)
        return together(work, lambda: self._progress(what, next(done), len(work)))
