"""What the endpoints of OpenAI's API share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from dapji.model import AsyncReply
from dapji.server.answering import JsonObject
from dapji.server.problem import Kind, Problem
from dapji.server.wire import Strict


class Drawn(Strict):
    """How an answer is drawn, in every endpoint that draws one; top_k and those after it are not OpenAI's."""

    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


Effort = Literal["none", "low", "medium", "high"]
"""Of reasoning, as far as templates know it. `none` turns it off; where there is no more than a switch, `medium` turns
it on."""

Texts = str | list[str | int | list[int]]
"""A text, texts, the ids of one text, or those of several."""


def texts_of(name: str, value: Texts) -> list[str | list[int]]:
    """Each text, or its ids. Raises Problem for a field `name` that is empty or mixes them."""
    if isinstance(value, str):
        return [value]
    ids = [token for token in value if isinstance(token, int)]
    if ids and len(ids) == len(value):
        return [ids]
    if ids or not value:
        told = "mixes token ids with texts or lists" if ids else "is empty"
        raise Problem("invalid_request", f"{name} {told}: give a text, texts, ids, or lists of ids", name)
    return [each for each in value if not isinstance(each, int)]


_NEGATIVE_SEEDS = 1 << 64
"""OpenAI's seeds are signed; -1 is the last of ours."""

_TYPES: dict[Kind, str] = {
    "invalid_request": "invalid_request_error",
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "invalid_request_error",
    "slow": "invalid_request_error",
    "too_large": "invalid_request_error",
    "busy": "rate_limit_error",
    "unavailable": "server_error",
    "out_of_time": "server_error",
    "internal": "server_error",
}


def problem_body(problem: Problem) -> dict[str, Any]:
    return {
        "error": {
            "message": problem.message,
            "type": _TYPES[problem.kind],
            "param": problem.field,
            "code": problem.code,
        }
    }


def usage_of(replies: Sequence[AsyncReply], *, n: int | None = None) -> dict[str, Any]:
    """Of answers that have ended, n to each prompt; None: all to one."""
    usages = [reply.finish.usage for reply in replies if reply.finish is not None]
    prompts = usages[:: n or len(usages)]
    prompt, generated = sum(usage.prompt for usage in prompts), sum(usage.generated for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached for usage in prompts)},
    }


def thinking_of(effort: Effort | None) -> JsonObject:
    """The option of `Model.chat`, if there was an effort."""
    return {} if effort is None else {"thinking": False if effort == "none" else effort}


def sampling_of(asked: Drawn) -> dict[str, Any]:
    """Options of `Model.chat`, those that were given. Raises Problem."""
    options = {name: value for name in Drawn.__struct_fields__ if (value := getattr(asked, name)) is not None}
    if "seed" in options and options["seed"] < 0:
        options["seed"] += _NEGATIVE_SEEDS
    if "logit_bias" in options:
        try:
            options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
        except ValueError:
            raise Problem("invalid_request", "logit_bias: keys must be token ids", "logit_bias") from None
    return options
