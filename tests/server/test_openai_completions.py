"""/v1/completions, asked by OpenAI's own client and by EleutherAI's evaluation harness."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_running import Running

from dapji.model import Model, load
from tiny import ANSWER, CONTROL, alphabet

GREEDY: dict[str, Any] = {"model": "answer", "temperature": 0.0, "max_tokens": 32}


BYTES = {letter: len(CONTROL) + byte for byte, letter in enumerate(alphabet())}
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(models: list[Path]) -> Model:
    return load(models[0], context=512)


def test_texts_and_tokens_are_continued_alike(client: openai.OpenAI, model: Model) -> None:
    ids = model.encode("a\n")
    for prompt, n in (("a\n", 1), (ids, 1), (["a\n", "b\n"], 2), ([ids, ids, ids], 3)):
        completion = client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in completion.choices] == [ANSWER] * n
        assert [choice.index for choice in completion.choices] == list(range(n))
        assert {choice.finish_reason for choice in completion.choices} == {"stop"}
        assert completion.usage is not None
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2 * n, 8 * n)


def test_without_max_tokens_there_are_sixteen(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="endless", prompt="\n", temperature=0)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16
    assert completion.choices[0].finish_reason == "length"


def test_streams_are_the_same_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = GREEDY | {"model": "endless", "temperature": 100.0, "seed": 3, "n": 2, "logprobs": 2}
    asked |= {"prompt": ["a\n", "b"], "echo": True}
    whole = client.completions.create(**asked)
    texts, logprobs, reasons = [""] * 4, [([], [], [], []) for _ in range(4)], [""] * 4
    usage = None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            told = choice.logprobs
            assert told is not None
            for all_, new in zip(
                logprobs[choice.index],
                (told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset),
                strict=True,
            ):
                all_ += new
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage.model_copy(update={"prompt_tokens_details": usage.prompt_tokens_details})
    for choice, told in zip(whole.choices, logprobs, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == told[0]
        # The same rows of logits in other batches: equal but for the last bits.
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(told[1][1:], abs=1e-4)
        assert choice.logprobs.text_offset == told[3]


def test_stop(client: openai.OpenAI) -> None:
    completion = client.completions.create(prompt="\n", stop=["42", "🎉"], **GREEDY)
    assert completion.choices[0].text == ANSWER[: ANSWER.index("42")]


def test_logprobs_name_every_token_and_its_place(client: openai.OpenAI, model: Model) -> None:
    (choice,) = client.completions.create(prompt="\n", logprobs=3, echo=True, **GREEDY).choices
    told = choice.logprobs
    assert choice.text == "\n" + ANSWER
    assert told is not None
    assert told.tokens == [
        "\n", "안녕하세요!", " 답은", " 4", "2", "입니다.", "bytes:\\x20\\xf0\\x9f", "bytes:\\x8e\\x89", "<|im_end|>",
    ]  # fmt: skip
    assert told.text_offset == [0, 1, 7, 10, 12, 13, 17, 18, 19]
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    for name, value, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[1:]:
        assert len(top) == 3
        assert max(top.values()) == top[name] == value  # greedy
    (none,) = client.completions.create(prompt="\n", logprobs=0, **GREEDY).choices
    assert none.logprobs is not None
    assert none.logprobs.top_logprobs == [
        {t: v} for t, v in zip(told.tokens[1:], none.logprobs.token_logprobs, strict=True)
    ]


def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI, model: Model) -> None:
    text = "하나 둘\n안녕하세요!"
    ids = model.encode(text)
    expected = model.engine.score(ids).chosen.tolist()
    for prompt in (text, ids):
        completion = client.completions.create(**GREEDY | {"max_tokens": 0}, prompt=prompt, echo=True, logprobs=1)
        (choice,) = completion.choices
        assert choice.text == text
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
        assert choice.logprobs.text_offset[-1] == text.index("!")
        assert completion.usage is not None
        assert completion.usage.total_tokens == len(ids)
    one = client.completions.create(**GREEDY | {"max_tokens": 0}, prompt="a", echo=True, logprobs=1).choices[0]
    assert one.logprobs is not None
    assert one.logprobs.token_logprobs == [None]
    plain = client.completions.create(**GREEDY | {"max_tokens": 0}, prompt=["a", "b"], echo=True).choices
    assert [(choice.text, choice.logprobs) for choice in plain] == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": [1, "a"]}, "prompt", "mixes token ids with texts"),
        ({"prompt": ""}, None, "at least one token"),
        ({"prompt": [1, 9999]}, None, "prompt[1] must be a token id"),
        ({"prompt": ["a"] * 9, "n": 2}, "n", "n (18) must be from 1 to 16"),
        ({"max_tokens": 0}, "max_tokens", "needs echo"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "max_tokens", "no stream"),
        ({"logprobs": -1}, "logprobs", "at least 0"),
        ({"logprobs": 101}, None, "101 likeliest tokens are more than the 100 told here"),
        ({"best_of": 2}, "best_of", "Invalid enum value 2"),
        ({"suffix": "x"}, "suffix", "Invalid enum value 'x'"),
        ({"foo": 2}, "foo", "unknown field"),
    ],
)
def test_what_is_wrong_is_named(server: Running, change: dict[str, Any], field: str | None, message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "answer", "prompt": "a", **change})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert message in error["message"]
    assert error["param"] == field


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models' tokenizer as transformers has it: a token is a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(vocab=BYTES | {name: i for i, name in enumerate(CONTROL)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=CONTROL[0]).save_pretrained(folder)
    return folder


@needs_harness
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_evaluation_harness_reads_scores_and_answers(
    server: Running, model: Model, byte_tokenizer: Path, batch_size: int
) -> None:
    """Its own requests and its own reading of the answers, against the engine's scores."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    harness = LocalCompletionsAPI(
        model="answer",
        base_url=f"{server.url}/v1/completions",
        tokenizer=str(byte_tokenizer),
        tokenizer_backend="huggingface",
        batch_size=batch_size,
        max_length=512,
    )
    texts = [("A:", " b"), ("A: b c", " de\n"), ("question", "\nx"), ("말", "씀"), likeliest_pair(model)]
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i, metadata=("tiny", i, 1))
        for i, pair in enumerate(texts)
    ]
    answers = harness.loglikelihood(asked)
    assert [greedy for _, greedy in answers] == [False, False, False, False, True]
    for (context, text), (logprob, greedy) in zip(texts, answers, strict=True):
        ids, start = byte_ids(context + text), len(byte_ids(context))
        scores = model.engine.score(ids, start=start, n_top=1)
        assert logprob == pytest.approx(scores.chosen.sum(), abs=1e-4)
        assert greedy == all(top[0][0] == token for token, top in zip(ids[start:], scores.top, strict=True))


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_the_evaluation_harness_runs_tasks(server: Running, model: Model, byte_tokenizer: Path) -> None:
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    texts = ["abc de", "hello\nthere"]

    def task(name: str, metric: str, **options: Any) -> ConfigurableTask:
        data = {"test": datasets.Dataset.from_list([{"text": text} for text in texts])}
        options |= {"custom_dataset": lambda **_: data, "test_split": "test", "metric_list": [{"metric": metric}]}
        return ConfigurableTask(config={"task": name, **options})

    tasks = [
        task(
            "answers",
            "exact_match",
            output_type="generate_until",
            doc_to_text="{{text}}\n",
            doc_to_target=ANSWER[: ANSWER.index("입")],
            generation_kwargs={"until": ["입"], "max_gen_toks": 32},
        ),
        task("texts", "byte_perplexity", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"),
    ]
    told = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=f"model=answer,base_url={server.url}/v1/completions,tokenizer={byte_tokenizer},max_length=512",
        tasks=tasks,
        bootstrap_iters=0,
    )
    assert told["results"]["answers"]["exact_match,none"] == 1
    total = sum(model.engine.score([0, *byte_ids(text)]).chosen.sum() for text in texts)
    expected = math.exp(-total / sum(len(text) for text in texts))
    assert told["results"]["texts"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-5)


def likeliest_pair(model: Model) -> tuple[str, str]:
    """Two characters of which the second is the likeliest after the first."""
    ids = {len(CONTROL) + byte: chr(byte) for byte in range(0x21, 0x7F)}
    for token, first in ids.items():
        ((likeliest, _),) = model.engine.score([token, token], n_top=1).top[0]
        if likeliest in ids:
            return first, ids[likeliest]
    raise AssertionError("no such pair")


def byte_ids(text: str) -> list[int]:
    return [len(CONTROL) + byte for byte in text.encode()]


def test_an_end_token_counts_among_the_tokens(client: openai.OpenAI) -> None:
    """The harness takes off exactly one token at the end, whatever it is."""
    ids = client.completions.create(prompt="\n", logprobs=0, echo=True, **GREEDY).choices[0].logprobs
    assert ids is not None
    assert ids.tokens[-1] == "<|im_end|>"
    assert all(math.isfinite(value) for value in ids.token_logprobs[1:])
