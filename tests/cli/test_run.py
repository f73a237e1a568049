"""`dapji run`: plain completion."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from in_process import Dapji

from dapji.files import open_files
from dapji.models.executor import ReferenceExecutor
from dapji.ops.batch import Batch
from tiny import ANSWER


def test_completes_without_a_template(tiny: Path, dapji: Dapji) -> None:
    """A newline makes the tiny model begin; the prompt is neither printed nor wrapped."""
    code, out, err = dapji("run", tiny, "Hello\n", "--stats")
    assert (code, out) == (0, ANSWER + "\n")
    assert err.startswith("6 prompt tokens (0 cached), first token after ")


@pytest.mark.parametrize(
    ("words", "stdin", "prompt"),
    [
        ([], "one\n\n", "one\n"),
        (["-"], "one\n", "one"),
        (["<|im_start|>", "x"], "", "<|im_start|> x"),
    ],
)
def test_the_prompt_is_taken_as_it_is(words: list[str], stdin: str, prompt: str, tiny: Path, dapji: Dapji) -> None:
    """One newline at the end of stdin goes, nothing else; a control token's spelling stays text: a token per byte."""
    shown = dapji("run", tiny, *words, "--max-tokens", "1", "--json", stdin=stdin)
    assert json.loads(shown.out)["usage"] == {
        "prompt": len(prompt),
        "cached": 0,
        "generated": 1,
        "proposed": 0,
        "accepted": 0,
    }


def test_json_is_the_whole_answer(tiny: Path, dapji: Dapji) -> None:
    """Token bytes join to the text, also where a token ends inside a character."""
    answer = json.loads(dapji("run", tiny, "Hello\n", "--json").out)
    assert answer["text"] == ANSWER
    assert answer["finish_reason"] == "stop"
    *tokens, end = answer["tokens"]
    assert b"".join(bytes.fromhex(token["bytes"]) for token in tokens).decode() == ANSWER
    assert end["text"] == "<|im_end|>"
    assert [token["text"] for token in tokens[-2:]] == [" \ufffd", "\ufffd\ufffd"], "halves of an emoji"
    assert "logprob" not in end
    assert answer["usage"]["generated"] == len(answer["tokens"]) == 8
    assert answer["seconds"]["first_token"] > 0


def test_an_answer_that_repeats_itself_is_the_same_with_and_without_speculation(endless: Path, dapji: Dapji) -> None:
    command = ["run", endless, "세", "--max-tokens", "60", "--temperature", "0", "--json", "--stats"]
    with_it, without = dapji(*command), dapji(*command, "--no-speculate")
    answer, plain = json.loads(with_it.out), json.loads(without.out)
    assert answer["tokens"] == plain["tokens"]
    assert answer["usage"]["proposed"] >= answer["usage"]["accepted"] > 30
    assert plain["usage"]["proposed"] == plain["usage"]["accepted"] == 0
    assert re.search(r", 60 generated, \d+ of \d+ proposed tokens accepted, ", with_it.err)
    assert "proposed" not in without.err


def test_logprobs_are_the_models_own(tiny: Path, dapji: Dapji) -> None:
    """Against a softmax in float64 over the reference's logits; sampling options do not change them."""
    command = ["run", tiny, "Hello", "--json", "--logprobs", "3", "--max-tokens", "2", "--seed", "1"]
    tokens = json.loads(dapji(*command, "--temperature", "2", "--top-k", "50").out)["tokens"]
    assert len(tokens) == 2
    files = open_files(tiny)
    executor = ReferenceExecutor(files.config, files.tensors, context=64, n_blocks=4, kv="f16")
    ids = files.tokenizer().encode("Hello")
    logits = executor.step(Batch.single([*ids, tokens[0]["id"]])).astype(np.float64)[-2:]
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for token, row in zip(tokens, expected, strict=True):
        assert token["logprob"] == pytest.approx(row[token["id"]], abs=1e-4)
        likeliest = np.argsort(-row)[:3]
        assert [other["id"] for other in token["top"]] == likeliest.tolist()
        assert [other["logprob"] for other in token["top"]] == pytest.approx(row[likeliest], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["hello", "--logprobs", "2"], 2, "--logprobs needs --json"),
        (["hello", "--json", "--logprobs", "999"], 1, "logprobs (999) must be at most the vocabulary's 2"),
        (
            ["--context", "3", "hello"],
            1,
            "the prompt (5 tokens) leaves no room for an answer in the context (3 tokens)",
        ),
        (["hello", "--seed", "-1"], 1, "seed must be an integer from 0 to"),
        ([], 1, "the prompt is empty"),
    ],
)
def test_mistakes(arguments: list[str], code: int, message: str, tiny: Path, dapji: Dapji) -> None:
    result = dapji("run", tiny, *arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_not_a_model(tmp_path: Path, dapji: Dapji) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model, but long enough to be one")
    result = dapji("run", tmp_path / "x.gguf", "hello")
    assert result.code == 1
    assert "a GGUF file with b'GGUF'" in result.err
