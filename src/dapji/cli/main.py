"""`dapji`: the group of commands, and the one place where exceptions become messages and exit codes."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import Any

import click

from dapji import __version__
from dapji.cli.console import prepare_streams, print_error, wants_colour
from dapji.errors import DapjiError

COMMANDS = {
    "chat": "Talk with a model in the terminal.",
    "run": "Complete one prompt and exit.",
    "serve": "Answer other programs over HTTP.",
    "batch": "Answer the requests of a file.",
    "key": "Make, list and revoke keys of `dapji serve`.",
    "pull": "Fetch a model into the store.",
    "list": "List installed and known models.",
    "show": "Print what a model is: architecture, size, quantisation, template, licence.",
    "remove": "Delete a model from the store.",
    "cache": "Show or clear what is kept for quicker starts.",
    "quantize": "Write a smaller copy of a model.",
    "merge": "Put an adapter into a model's own weights.",
    "export": "Write an adapter for llama.cpp, or for PEFT.",
    "new": "Write a model that has learned nothing yet, to train from scratch.",
    "tune": "Adapt a model to your own examples.",
    "report": "Write the page of a run, or of several to compare.",
    "distill": "Write a teacher's answers as examples.",
    "verify": "Check that a model is what its certificate says.",
    "data": "Check examples before a model learns from them.",
    "eval": "Examine a model with your own questions.",
    "perplexity": "Measure how well a model predicts a text.",
    "bench": "Measure speed beside what this machine could do.",
    "doctor": "Tell what this machine offers, and what is wrong.",
}
"""Name -> line in the list of commands; `dapji.cli.NAME` holds a click command called `command`."""


class LazyGroup(click.Group):
    """Imports a command's module when that command is used; the list of commands needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"dapji.cli.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader of our output went away (`dapji ... | head`): say nothing. The code is a shell's for SIGPIPE;
            # click itself would make it 1.
            _flush_or_drop()
            raise click.exceptions.Exit(141) from None
        return result

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="dapji %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run open language models on hardware that you control, with no network.

    \b
    Examples:
      dapji chat                            talk with the default model (fetched once)
      dapji chat --small "Hello!"           one answer from a 98 MB model
      dapji run smollm2-135m "Once upon"    plain completion
      dapji show ./model.gguf               what is in a file
      dapji COMMAND --help                  options and examples of a command

    \b
    stdout carries data, stderr everything else. Colour only on a terminal, and not with NO_COLOR.
    Exit codes: 0 done, 1 failed (`error:` and often `hint:` on stderr), 2 wrong usage,
    130 interrupted, 141 the reader of the output went away.
    """
    ctx.color = wants_colour()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _flush_or_drop() -> None:
    """Drop what stdout cannot take: Python would try again at exit, and complain in its own words."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> None:
    """Entry point; `cli` documents the exit codes."""
    gc.set_threshold(100_000)  # a vocabulary is as many objects that stay: to look through them every 700 takes 20 ms
    prepare_streams()
    try:
        result: Any = cli.main(args=argv, prog_name="dapji", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.UsageError as error:
        print_error(error.format_message(), hint=f"{error.ctx.command_path if error.ctx else 'dapji'} --help")
        sys.exit(error.exit_code)
    except click.ClickException as error:
        print_error(error.format_message())
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except DapjiError as error:
        print_error(error.message, error.hint)
        sys.exit(1)
    except OSError as error:  # the disk is full, a file may not be read: the machine's failures, not ours
        _flush_or_drop()
        where = "" if error.filename is None else f"{error.filename}: "
        print_error(f"{where}{error.strerror or error}")
        sys.exit(1)
    except MemoryError:
        print_error("not enough memory", hint="a smaller model, or a smaller --context; `dapji doctor` tells what fits")
        sys.exit(1)
