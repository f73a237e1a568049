"""`dapji chat`: talk with a model in the terminal, or answer once where there is no terminal or a message is given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapji.cli.console import read_prompt, write
from dapji.cli.options import (
    DEFAULT_MODEL,
    SMALL_MODEL,
    adapter_option,
    context_option,
    executor_options,
    given_sampling,
    sampling_options,
    speculate_option,
)

if TYPE_CHECKING:
    from dapji.cli.conversation import Conversation
    from dapji.model import Model


@click.command()
@click.argument("message", nargs=-1)
@click.option("--model", "-m", help=f"A name of `dapji list`, or a path [default: {DEFAULT_MODEL}].")
@click.option("--small", is_flag=True, help=f"The same as --model {SMALL_MODEL}: 98 MB, for tiny devices.")
@click.option("--system", metavar="TEXT", help="The system prompt.")
@click.option("--load", "session", metavar="FILE", help="Go on with a conversation saved by /save.")
@click.option("--stats", is_flag=True, help="Tokens per second after each answer, on stderr.")
@sampling_options
@adapter_option
@context_option
@executor_options
@speculate_option
def command(
    message: tuple[str, ...], model: str | None, small: bool, system: str | None, session: str | None, stats: bool,
    **values: Any,
) -> None:  # fmt: skip
    """Talk with a model. A model of the catalogue is fetched once; afterwards no network is needed.

    With a MESSAGE, or with text on stdin, answers it on stdout and exits. A last word - stands
    for stdin. One newline at the end of stdin is dropped.

    In the chat, Enter sends, Alt-Enter (or a line that ends in \\) begins a new line, Ctrl-C stops
    an answer, Ctrl-D ends the chat, /help lists the commands.

    \b
    Examples:
      dapji chat
      dapji chat --small "What is the capital of Korea?"
      git diff | dapji chat "Write a commit message for this diff:" -
      dapji chat -m ./model.gguf --temperature 0 --context 4096

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    from dapji.cli.conversation import Conversation
    from dapji.model import load

    if small and model is not None:
        raise click.UsageError("--small and --model exclude each other")
    prompt = read_prompt(message)
    if prompt is None and not sys.stdout.isatty():
        raise click.UsageError("the output is not a terminal: give a message as an argument or on stdin")
    conversation = Conversation.load(session) if session else Conversation()
    conversation.system = conversation.system if system is None else system
    conversation.options |= given_sampling(values)
    with load(_fetched(SMALL_MODEL if small else model or DEFAULT_MODEL), **values) as opened:
        opened.options(**conversation.options)  # a value out of range is told now, not after the first question
        if prompt is not None:
            _answer(opened, conversation, prompt, stats=stats)
        else:
            from dapji.cli.terminal_chat import TerminalChat

            TerminalChat(opened, conversation, stats=stats).run()


def _fetched(name: str) -> Path:
    """The model's path; what the catalogue knows and the store lacks is fetched first."""
    from dapji.errors import ModelNotFound
    from dapji.weights import catalogue, store

    try:
        return store.resolve(name)
    except ModelNotFound:
        if catalogue.find(name) is None:
            raise
        from dapji.cli.pull import TerminalProgress

        return store.pull(name, progress=TerminalProgress())


def _answer(model: Model, conversation: Conversation, prompt: str, *, stats: bool) -> None:
    """One answer on stdout."""
    from dapji.cli.conversation import Message, show, speed_line

    conversation.messages.append(Message("user", prompt))
    reply = model.chat(conversation.for_template(), **conversation.options)
    show(reply)
    write("\n")
    if reply.finish is not None and reply.finish.reason == "length":
        click.echo("the answer was cut off at the limit of tokens", err=True)
    if stats:
        click.echo(speed_line(reply), err=True)
