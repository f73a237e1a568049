"""What every command does to the terminal: encodings, colour, errors, text that nobody has checked."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import click

from dapji.errors import UsageError

_VISIBLE = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control characters but tab and newline -> their picture in Unicode's block Control Pictures."""


def prepare_streams() -> None:
    """Pipes and files carry UTF-8 whatever the locale; a terminal shows `?` for what its own encoding lacks.

    A stream that was closed before we started (`dapji … <&-`) is None in Python; it becomes the null device.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 open till the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if stream.isatty():
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8")


def wants_colour() -> bool | None:
    """False where NO_COLOR (no-color.org) is set; None: wherever the stream is a terminal."""
    return False if os.environ.get("NO_COLOR") else None


def print_error(message: str, hint: str | None = None) -> None:
    """`error: …` and `hint: …` on stderr."""
    click.echo(click.style("error: ", fg="red", bold=True) + message, err=True, color=wants_colour())
    if hint:
        click.echo(click.style("hint: ", fg="cyan", bold=True) + hint, err=True, color=wants_colour())


def visible(text: str) -> str:
    """Text that nobody has checked, without what could steer a terminal."""
    return text.translate(_VISIBLE)


def write(text: str) -> None:
    """A model's text to stdout, at once: as it is into a pipe or file; on a terminal without what could steer it."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_aside(text: str) -> None:
    """A model's text that is no answer, dim on stderr and only where that is a terminal."""
    if sys.stderr.isatty():
        click.echo(click.style(visible(text), dim=True), err=True, nl=False, color=wants_colour())


def read_stdin() -> str:
    """All of stdin as UTF-8, without one newline at its end (what `echo` adds). Raises UsageError."""
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8: {error.reason} at byte {error.start}") from error
    return text.removesuffix("\n")


def read_prompt(words: tuple[str, ...]) -> str | None:
    """The prompt that a command line gives; None where there is none and stdin is a terminal.

    The words, or without words stdin. A last word `-` stands for stdin, after an empty line. Raises UsageError where
    the prompt is empty.
    """
    if not words:
        if sys.stdin.isatty():
            return None
        prompt = read_stdin()
    elif words[-1] == "-":
        prompt = "\n\n".join(filter(None, (" ".join(words[:-1]), read_stdin())))
    else:
        prompt = " ".join(words)
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint="give text as an argument or on stdin")
    return prompt
