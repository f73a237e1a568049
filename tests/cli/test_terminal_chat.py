"""`dapji chat` in a real pseudo-terminal, as a user sees it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from dapji.chat.formats import Content, Event
from dapji.cli.conversation import Conversation, Message
from dapji.cli.terminal_chat import TerminalChat
from dapji.errors import DapjiError, ModelNotFound
from dapji.weights import store
from tiny import ANSWER, COUNTING, THINKING, THOUGHTFUL, write_tiny

ROUND = "".join(COUNTING)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A child on a pseudo-terminal of 100 columns."""

    def __init__(self, *arguments: str | Path, env: dict[str, str]) -> None:
        # The terminal that we are does not answer the request for the cursor's position.
        env = os.environ | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | env
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "dapji", "chat", *map(str, arguments)],
            env=env,
            encoding="utf-8",
            dimensions=(30, 100),
            timeout=60,
            # Whoever runs the tests in the background ignores the signal of Ctrl-C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.seen = io.StringIO()
        """Everything, with its escape sequences."""
        self.child.logfile_read = self.seen
        self.wait_for_prompt()

    def wait_for(self, text: str) -> str:
        """Reads up to `text`; what came before it, without escape sequences."""
        self.child.expect_exact(text)
        return ESCAPES.sub("", self.child.before).replace("\r\n", "\n")

    def wait_for_prompt(self) -> str:
        before = self.wait_for("\x1b[?2004h")  # the prompt takes over: bracketed paste is on
        self.wait_for(">>> ")
        return before

    def type(self, text: str) -> None:
        self.child.send(text)

    def enter(self, text: str) -> str:
        """Type a line and Enter; what was printed up to the next prompt."""
        self.type(text + "\r")
        self.wait_for("\x1b[?2004l")  # the prompt has let go
        return self.wait_for_prompt()

    def end(self) -> int | None:
        self.child.sendeof()
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def open_chat(home: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str | Path, **env: str) -> Terminal:
        opened.append(Terminal(*arguments, env={"DAPJI_HOME": str(home)} | env))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.child.close(force=True)


def test_a_conversation(tiny: Path, tmp_path: Path, home: Path, open_chat: Callable[..., Terminal]) -> None:
    """Korean in and out, several lines, commands, saving, loading in another process, the end by Ctrl-D."""
    chat = open_chat("-m", tiny, "--temperature", "0.5")
    assert chat.enter("안녕?") == ANSWER + "\n"
    assert chat.enter("첫 줄\\\r둘째 줄\x1b\r셋째 줄") == ANSWER + "\n"
    assert chat.enter("   ") == ""
    assert chat.enter("/system 짧게 답해.") == "system prompt: 짧게 답해.\n"
    assert "* temperature          0.5\n" in chat.enter("/set")
    assert "* seed                 7\n" in chat.enter("/set seed 7")
    assert chat.enter("/set top_p 3") == (
        "error: top_p must be > 0 and <= 1, got 3.0\nhint: leave it out for the default\n"
    )
    assert "  top_p                0.9\n" in chat.enter("/set"), "refused, so not kept"
    assert chat.enter("/nonsense").startswith("error: no command /nonsense\nhint: ")
    assert chat.enter(" /nonsense") == ANSWER + "\n", "a space before it makes it text"
    assert chat.enter("/undo") == "4 messages left\n"
    assert re.search(r"stats on\n\d+ prompt tokens .* 8 generated, .* tokens/s\n", chat.enter("/stats"))
    assert re.match(ANSWER + r"\n\d+ prompt tokens \(\d+ cached\)", chat.enter("/retry"))
    path = tmp_path / "talk.json"
    assert chat.enter(f"/save {path}") == f"saved 4 messages to {path}\n"
    assert chat.end() == 0
    expected = [
        {"role": "user", "content": "안녕?"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "첫 줄\n둘째 줄\n셋째 줄"},
        {"role": "assistant", "content": ANSWER},
    ]
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == {"system": "짧게 답해.", "options": {"temperature": 0.5, "seed": 7}, "messages": expected}
    assert (home / "chat_history").stat().st_mode & 0o777 == 0o600, "what one types is private"

    chat = open_chat("-m", tiny)
    shown = chat.enter(f"/load {path}")
    assert shown == f">>> 안녕?\n{ANSWER}\n>>> 첫 줄\n둘째 줄\n셋째 줄\n{ANSWER}\n"
    assert chat.enter("/system") == "system prompt: 짧게 답해.\n"
    assert chat.enter("/clear") == "begun anew\n"
    assert chat.enter("/undo") == "error: nothing has been asked yet\n"
    assert chat.enter("/save") == "error: /save wants a file name\nhint: /save talk.json\n"
    chat.type("/exit\r")
    chat.child.expect(pexpect.EOF)


def test_reasoning_is_dim_and_not_kept(tmp_path: Path, open_chat: Callable[..., Terminal]) -> None:
    model = write_tiny(tmp_path / "tiny.gguf", THOUGHTFUL, template=THINKING)
    chat = open_chat("-m", model, "--temperature", "0")
    assert chat.enter("?") == "음, 생각\n\n42입니다.\n"
    assert "\x1b[2m, 생각\x1b[0m" in chat.seen.getvalue()
    path = tmp_path / "talk.json"
    chat.enter(f"/save {path}")
    assert json.loads(path.read_text(encoding="utf-8"))["messages"][1]["content"] == "42입니다."


def test_ctrl_c_stops_an_answer_and_keeps_it(endless: Path, tmp_path: Path, open_chat: Callable[..., Terminal]) -> None:
    # Long enough that no machine is through before Ctrl-C comes, nor before the second answer.
    chat = open_chat("-m", endless, "--stats", "--context", "100000")
    for question in ("끝없이?", "again"):
        chat.type(question + "\r")
        chat.wait_for(ROUND * 2)
        chat.child.sendintr()
        assert re.search(r"\n\(stopped\)\nstopped after \d+ tokens\n$", chat.wait_for_prompt())
    chat.type("half a line")
    chat.child.sendintr()
    assert chat.wait_for_prompt().endswith("(Ctrl-D or /exit ends the chat)\n"), "Ctrl-C in a line gives a new one"
    path = tmp_path / "talk.json"
    assert chat.enter(f"/save {path}") == f"saved 4 messages to {path}\n"
    assert chat.enter("/set max_tokens 3").count("max_tokens           3") == 1
    assert chat.enter("three").startswith(f"{ROUND}\n(cut off at the limit of tokens)\n")
    assert chat.end() == 0
    first, answer, second, _ = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert (first["content"], second["content"]) == ("끝없이?", "again")
    assert answer["content"].startswith(ROUND * 2)


def test_a_full_context_ends_an_answer_not_the_chat(tmp_path: Path, open_chat: Callable[..., Terminal]) -> None:
    chat = open_chat("-m", write_tiny(tmp_path / "short.gguf", ["네 "], endless=True, max_context=64))
    assert chat.enter("hello").endswith("\n(cut off at the limit of tokens)\n")
    said = chat.enter("and now?")
    assert said.startswith("error: the prompt (")
    assert said.endswith("hint: /undo or /clear makes room, --context N more of it\n")
    assert chat.enter("/clear") == "begun anew\n"
    assert chat.enter("hello").endswith("\n(cut off at the limit of tokens)\n")


def test_an_answer_cannot_steer_the_terminal(tmp_path: Path, open_chat: Callable[..., Terminal]) -> None:
    """Escape sequences of a model (clear the screen, set the title, CSI in one byte) are shown, not obeyed."""
    model = write_tiny(tmp_path / "hostile.gguf", ["a\x1b[2J", "b\x1b]0;title\x07", "c\x9b2J", "d\re\tf\x7f"])
    chat = open_chat("-m", model)
    chat.type("go\r")
    chat.wait_for("a␛[2Jb␛]0;title␇c\ufffd2Jd␍e\tf␡")


def test_no_colour_and_an_unwritable_store(tiny: Path, open_chat: Callable[..., Terminal]) -> None:
    chat = open_chat("-m", tiny, NO_COLOR="1", DAPJI_HOME="/dev/null/nowhere")
    chat.type("hello\r")
    chat.wait_for(ANSWER)
    chat.enter("/nonsense")
    assert re.findall(r"\x1b\[(?:\d+;)*(?:2|[349]\d)(?:;\d+)*m", chat.seen.getvalue()) == []


class Interrupted:
    """A reply during which Ctrl-C arrives."""

    finish = None
    tokens = (1, 2)
    reasoning = ""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = iter(pieces)
        self.text = ""
        self.closed = False

    def events(self) -> Iterator[Event]:
        for piece in self.pieces:
            self.text += piece
            yield Content(text=piece)
        raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [([], []), (["So", " far"], [Message("user", "question"), Message("assistant", "So far")])],
)
def test_what_an_interrupted_answer_leaves(
    pieces: list[str], kept: list[Message], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first word the question is forgotten: a template wants turns, not a question alone."""
    reply = Interrupted(pieces)

    class Model:
        def chat(self, messages: list[dict[str, str]], **options: Any) -> Interrupted:
            assert messages[-1] == {"role": "user", "content": "question"}
            return reply

    chat: Any = TerminalChat(Model(), Conversation(), stats=False)  # type: ignore[arg-type]
    chat._ask("question")
    assert chat.conversation.messages == kept
    assert reply.closed
    chat.conversation.messages[:] = [Message("user", "question"), Message("assistant", "old")]
    reply.pieces, reply.text = iter(pieces), ""
    chat._retry("")
    assert chat.conversation.messages == (kept or [Message("user", "question"), Message("assistant", "old")])


def test_an_error_leaves_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    class Model:
        def chat(self, messages: list[dict[str, str]], **options: Any) -> Interrupted:
            raise DapjiError("the template refuses")

    before = [Message("user", "a"), Message("assistant", "b")]
    chat: Any = TerminalChat(Model(), Conversation(messages=list(before)), stats=False)  # type: ignore[arg-type]
    for act in (lambda: chat._ask("c"), lambda: chat._retry("")):
        with pytest.raises(DapjiError, match="refuses"):
            act()
        assert chat.conversation.messages == before


@pytest.fixture
def smollm2() -> Path:
    """From the user's own store: to be asked for before `home` takes its place."""
    try:
        return store.resolve("smollm2-135m")
    except ModelNotFound:
        pytest.skip("smollm2-135m is not installed; `make test` pulls it")


def test_a_real_model(smollm2: Path, tmp_path: Path, open_chat: Callable[..., Terminal]) -> None:
    """A language model of 135M parameters answers, is stopped in the middle of an answer, and goes on."""
    chat = open_chat("-m", smollm2, "--temperature", "0", "--max-tokens", "300", "--context", "1024")
    assert "Tokyo" in chat.enter("What is the capital city of Japan?")
    chat.type("Tell me a very long story about a cat.\r")
    chat.wait_for("\x1b[?2004l")  # the prompt has let go
    chat.child.expect(r"\w+ \w+ \w+ ")
    chat.child.sendintr()
    chat.wait_for("(stopped)")
    chat.wait_for_prompt()
    assert chat.enter("Is a cat an animal?").strip()
    path = tmp_path / "talk.json"
    chat.enter(f"/save {path}")
    assert chat.end() == 0
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert [bool(message["content"]) for message in messages] == [True] * 6
