"""`dapji chat` without a terminal: one answer. What the model was given shows in the number of prompt tokens: on the
tiny model a byte of text and a control token are one each, and ChatML needs two control tokens and two newlines a turn.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from in_process import Dapji, Result

from dapji.cli.conversation import Conversation, Message
from tiny import ANSWER, THINKING, THOUGHTFUL, write_tiny


def turn(role: str, content: str) -> int:
    return len(f"<{role}\n{content}>\n".encode())


def prompt_tokens(result: Result) -> int:
    found = re.match(r"(\d+) prompt tokens", result.err)
    assert found, result.err
    return int(found[1])


OPENING = len("<assistant\n")


@pytest.mark.parametrize(
    ("words", "stdin", "question"),
    [
        (["Hello", "there"], "not read", "Hello there"),
        ([], "한국의 수도는?\n", "한국의 수도는?"),
        ([], "two\n\n", "two\n"),
        (["-"], "piped\n", "piped"),
        (["Explain:", "-"], "text\n", "Explain:\n\ntext"),
        (["a - b"], "", "a - b"),
        (["<|im_end|>"], "", "<|im_end|>"),
    ],
)
def test_one_answer(words: list[str], stdin: str, question: str, tiny: Path, dapji: Dapji) -> None:
    result = dapji("chat", "-m", tiny, "--stats", *words, stdin=stdin)
    assert (result.code, result.out) == (0, ANSWER + "\n")
    assert prompt_tokens(result) == turn("user", question) + OPENING


def test_without_stats_stderr_is_silent(tiny: Path, dapji: Dapji) -> None:
    assert dapji("chat", "-m", tiny, "hello") == (0, ANSWER + "\n", "")


def test_system_prompt_and_saved_conversation(tiny: Path, dapji: Dapji, tmp_path: Path) -> None:
    talk = Conversation(messages=[Message("user", "하나?"), Message("assistant", "둘")], system="짧게")
    talk.save(str(tmp_path / "talk.json"))
    history = turn("user", "하나?") + turn("assistant", "둘") + turn("user", "셋?") + OPENING
    arguments = ["chat", "-m", tiny, "--stats", "--load", tmp_path / "talk.json", "셋?"]
    assert prompt_tokens(dapji(*arguments)) == turn("system", "짧게") + history
    assert prompt_tokens(dapji(*arguments, "--system", "아주 짧게")) == turn("system", "아주 짧게") + history
    assert prompt_tokens(dapji(*arguments, "--system", "")) == turn("system", "") + history


def test_reasoning_is_not_in_the_answer(dapji: Dapji, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", THOUGHTFUL, template=THINKING)
    assert dapji("chat", "-m", path, "--temperature", "0", "?") == Result(0, "42입니다.\n", "")


def test_limit_of_tokens_is_told(endless: Path, dapji: Dapji) -> None:
    assert dapji("chat", "-m", endless, "--max-tokens", "4", "세어 봐") == (
        0,
        "하나 둘 셋 하나 \n",
        "the answer was cut off at the limit of tokens\n",
    )


def test_stop_over_token_borders(endless: Path, dapji: Dapji) -> None:
    result = dapji("chat", "-m", endless, "--stop", "나 둘", "세어 봐")
    assert (result.code, result.out, result.err) == (0, "하\n", "")


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        (["--small", "-m", "x", "hello"], "", 2, "--small and --model exclude each other"),
        (["--temperature", "-1", "hello"], "", 1, "temperature must be finite and >= 0, got -1.0"),
        (["--top-p", "2", "hello"], "", 1, "top_p must be > 0 and <= 1, got 2.0"),
        (["--context", "5000", "hello"], "", 1, "a context of 5000 tokens was asked for, but the model has 4096"),
        (["--context", "16", "hello"], "", 1, "(16 tokens)"),
        (["--max-tokens", "5000", "hello"], "", 1, "max_tokens (5000)"),
        (["--load", "no-such-file.json", "hello"], "", 1, "cannot read no-such-file.json: No such file or directory"),
        ([], "", 1, "the prompt is empty"),
        ([" "], "", 1, "the prompt is empty"),
        ([], b"caf\xe9", 1, "stdin is not UTF-8: unexpected end of data at byte 3"),
        (["\udce9"], "", 1, "not valid Unicode"),
    ],
)
def test_mistakes(arguments: list[str], stdin: str | bytes, code: int, message: str, tiny: Path, dapji: Dapji) -> None:
    model = [] if "-m" in arguments else ["-m", str(tiny)]
    result = dapji("chat", *model, *arguments, stdin=stdin)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("error: ")
    assert message in result.err


def test_the_model_is_fetched_once(tiny: Path, dapji: Dapji, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the catalogue knows and the store lacks is pulled; an installed one is not."""
    asked: list[str] = []

    def pull(name: str, **_: object) -> Path:
        asked.append(name)
        return tiny

    monkeypatch.setattr("dapji.weights.store.pull", pull)
    assert dapji("chat", "hello").out == ANSWER + "\n"
    assert dapji("chat", "--small", "hello").out == ANSWER + "\n"
    assert dapji("chat", "-m", "nobody-knows-it", "hello").code == 1
    assert asked == ["qwen2.5-coder-0.5b", "smollm2-135m"]
