"""The group: help, lazy imports, and every way in which a command can end."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pexpect
import pytest
from in_process import Dapji

from dapji.cli.main import COMMANDS, main
from dapji.errors import UsageError
from tiny import ANSWER

HEAVY = {
    "numpy",
    "tokenizers",
    "jinja2",
    "safetensors",
    "prompt_toolkit",
    "tqdm",
    "msgspec",
    "torch",
    "huggingface_hub",
}


def loaded_modules(*arguments: str) -> set[str]:
    """Top-level modules that a command has imported when it ends."""
    code = "\n".join(
        (
            "import sys",
            "from dapji.cli.main import main",
            f"try: main({list(arguments)})",
            "except SystemExit: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)",
        )
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["chat", "--help"], ["bench", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not loaded_modules(*arguments) & HEAVY


def test_list_imports_neither_tokenizer_nor_model(home: Path) -> None:
    assert not loaded_modules("list") & (HEAVY - {"msgspec", "numpy"})


@pytest.mark.parametrize("arguments", [["chat", "-m"], ["run"]])
def test_answering_imports_no_more_than_it_needs(
    arguments: list[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these takes milliseconds, some of them hundreds, before the first token. Weights come from the cache."""
    monkeypatch.setenv("DAPJI_CACHE", str(tmp_path))
    needed = {"numpy", "tokenizers", "msgspec"} | ({"jinja2"} if "chat" in arguments else set())
    for first in (True, False):
        loaded = loaded_modules(*arguments, str(tiny), "hello\n")
        assert loaded & HEAVY == needed
        if not first:
            assert not loaded & {"concurrent", "logging", "subprocess", "zipfile", "tomllib", "asyncio"}


def test_group_help_names_every_command(dapji: Dapji) -> None:
    shown = dapji()
    assert shown == dapji("--help")
    assert shown.code == 0
    for name, line in COMMANDS.items():
        assert name in shown.out
        assert line.split()[0] in shown.out


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_is_complete(name: str, dapji: Dapji) -> None:
    """Examples, exit codes, and a text for every option."""
    shown = dapji(name, "--help")
    assert shown.code == 0
    assert f"  dapji {name}" in shown.out
    assert "Exit codes:" in shown.out
    command: click.Command = importlib.import_module(f"dapji.cli.{name}").command
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name
            assert all(spelling in shown.out for spelling in option.opts)


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["chta"], "No such command 'chta'", "dapji --help"),
        (["run"], "Missing argument 'MODEL'", "dapji run --help"),
        (["chat", "--temprature", "1"], "--temperature", "dapji chat --help"),
        (["chat", "--kv", "q3"], "'q3' is not one of 'f32', 'f16', 'q8'", "dapji chat --help"),
        (["bench", "--prompt", "0"], "0 is not in the range x>=1", "dapji bench --help"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, hint: str, dapji: Dapji) -> None:
    code, out, err = dapji(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.endswith(f"\nhint: {hint}\n")


def test_unknown_model_is_an_error_with_a_hint(dapji: Dapji) -> None:
    code, out, err = dapji("run", "smollm2-135mm", "hello")
    assert (code, out) == (1, "")
    message, hint = err.splitlines()
    assert message.startswith(
        "error: no model 'smollm2-135mm' is installed or known, and no such file exists; did you mean smollm2-135m or "
    )
    assert hint == "hint: dapji pull smollm2-135m"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("wrong", hint="right"), 1, "error: wrong\nhint: right\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied\n"),
        (BlockingIOError(11, "Resource temporarily unavailable"), 1, "error: Resource temporarily unavailable\n"),
        (OSError("what a library made up"), 1, "error: what a library made up\n"),
        (MemoryError(), 1, "error: not enough memory\nhint: "),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
    ],
)
def test_how_exceptions_end(
    error: BaseException, code: int, said: str, dapji: Dapji, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("dapji.weights.store.installed", fail)
    result = dapji("list")
    assert result.code == code
    assert said in result.err


def test_a_defect_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dapji.weights.store.installed", fail)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def process(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "dapji", *map(str, arguments)], stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_goes_away(endless: Path, unbuffered: str) -> None:
    """As in `dapji run … | head`."""
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with process("run", endless, "hello\n", stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        assert child.stdout.read(9) == "하나 ".encode() + "둘".encode()[:2]
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == b""
        assert child.wait() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_disk(tiny: Path, unbuffered: str) -> None:
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full, process("run", tiny, "hello\n", stdout=full, env=env) as child:
        assert child.stderr is not None
        assert child.stderr.read() == b"error: No space left on device\n"
        assert child.wait() == 1


@pytest.mark.parametrize(
    ("closed", "code", "said"),
    [
        ("<&-", 1, b"error: the prompt is empty\nhint: give text as an argument or on stdin\n"),
        ("hello >&-", 0, b""),
        ("hello 2>&-", 0, b""),
    ],
)
def test_streams_that_whoever_started_us_closed(tiny: Path, closed: str, code: int, said: bytes) -> None:
    shell = f'"$1" -m dapji run "$2" {closed}'
    done = subprocess.run(["sh", "-c", shell, "sh", sys.executable, tiny], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)


def test_pipes_carry_utf8_whatever_the_locale(tiny: Path) -> None:
    env = os.environ | {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
    with process("chat", "-m", tiny, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as child:
        out, err = child.communicate("오늘 날씨 어때?".encode())
    assert (out.decode("utf-8"), err) == (ANSWER + "\n", b"")


@pytest.mark.parametrize("no_color", [False, True])
def test_colour_on_a_terminal_unless_no_color(no_color: bool) -> None:
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    if no_color:
        env["NO_COLOR"] = "1"
    child = pexpect.spawn(sys.executable, ["-m", "dapji", "run", "nothing", "x"], env=env, encoding="utf-8", timeout=30)
    child.expect(pexpect.EOF)
    child.close()
    assert "error: " in child.before
    assert ("\x1b[" in child.before) is not no_color
    assert child.exitstatus == 1
