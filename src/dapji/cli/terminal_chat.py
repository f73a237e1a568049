"""The interactive chat: editing lines, streaming answers, `/` commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from dapji.cli.console import print_error, write
from dapji.cli.conversation import Conversation, Message, show, speed_line
from dapji.cli.options import SAMPLING
from dapji.errors import ContextError, DapjiError, UsageError
from dapji.weights import store

if TYPE_CHECKING:
    from dapji.model import Model, Reply

PROMPT = ">>> "


class TerminalChat:
    """Owns nothing but the screen: the conversation and the model belong to the caller."""

    def __init__(self, model: Model, conversation: Conversation, *, stats: bool) -> None:
        self.model = model
        self.conversation = conversation
        self.stats = stats
        self.last: Reply | None = None
        self.running = True
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "this list", self._help),
            "/system": ("[TEXT]", "set the system prompt; alone: show it; `none` removes it", self._system),
            "/set": ("[NAME VALUE]", "set temperature, top_p, seed, max_tokens …; alone: show all", self._set),
            "/save": ("FILE", "save the conversation", self._save),
            "/load": ("FILE", "go on with a saved one", self._load),
            "/stats": ("", "tokens per second after each answer, on or off", self._stats),
            "/undo": ("", "take back the last question and its answer", self._undo),
            "/retry": ("", "answer the last question again", self._retry),
            "/clear": ("", "begin anew, keeping system prompt and options", self._clear),
            "/exit": ("", "end (as Ctrl-D does)", self._exit),
        }

    def run(self) -> None:
        """Reads and answers until the user ends it. Ctrl-C never does."""
        session: PromptSession[str] = PromptSession(
            HTML(f"<ansigreen><b>{PROMPT.replace('>', '&gt;')}</b></ansigreen>"),
            history=_history(),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="... ",
            completer=WordCompleter(list(self.commands), sentence=True),
            complete_while_typing=False,
            enable_open_in_editor=True,
        )
        _say(f"{self.model.name}: {self.model.summary}")
        _say("Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, /help lists commands, Ctrl-D ends.")
        self._show()
        while self.running:
            try:
                text = session.prompt()
                if text.startswith("/"):
                    self._command(text)
                elif text.strip():
                    self._ask(text.strip())
            except KeyboardInterrupt:
                _say("(Ctrl-D or /exit ends the chat)")
            except EOFError:
                break
            except DapjiError as error:
                print_error(error.message, error.hint)

    def _ask(self, question: str) -> None:
        """Ctrl-C keeps what was said so far; an error, or Ctrl-C before the first word, forgets the question."""
        asked = [*self.conversation.for_template(), {"role": "user", "content": question}]
        reply: Reply | None = None
        stopped = False
        try:
            reply = self.model.chat(asked, **self.conversation.options)
            show(reply)
        except KeyboardInterrupt:
            stopped = True
            if reply is not None:
                reply.close()
        except ContextError as error:
            raise ContextError(error.message, hint="/undo or /clear makes room, --context N more of it") from error
        finally:
            if reply is not None and (reply.text or reply.finish is not None):
                self.conversation.messages += [Message("user", question), Message("assistant", reply.text)]
                self.last = reply
            if reply is not None and (reply.text or reply.reasoning or reply.finish is not None):
                write("\n")
        if reply is not None and not reply.text:
            _say("(no answer)")
        if stopped:
            _say("(stopped)")
        elif reply is not None and reply.finish is not None and reply.finish.reason == "length":
            _say("(cut off at the limit of tokens)")
        if self.stats and reply is not None:
            _say(speed_line(reply))

    def _command(self, line: str) -> None:
        name, *argument = line.split(maxsplit=1)
        if name not in self.commands:
            raise UsageError(f"no command {name}", hint="/help lists the commands; a space before it sends it as text")
        self.commands[name][2](argument[0].strip() if argument else "")

    def _help(self, argument: str) -> None:
        for name, (arguments, text, _) in self.commands.items():
            _say(f"  {name + ' ' + arguments:<20} {text}")
        _say("  Tab completes a command, the arrows go through what you typed before.")

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.system = None if argument == "none" else argument
        _say(f"system prompt: {self.conversation.system or 'none of ours (the template may have its own)'}")

    def _set(self, argument: str) -> None:
        if argument:
            name, _, value = argument.partition(" ")
            changed = self.conversation.with_option(name, value.strip())
            self.model.options(**changed)  # raises for a value out of range
            self.conversation.options = changed
        options = self.model.options(**self.conversation.options)
        for name in SAMPLING:
            mark = "*" if name in self.conversation.options else " "
            _say(f"{mark} {name:<20} {options[name]}")
        _say("* set here; `/set NAME default` gives it back to the model")

    def _save(self, argument: str) -> None:
        if not argument:
            raise UsageError("/save wants a file name", hint="/save talk.json")
        self.conversation.save(argument)
        _say(f"saved {len(self.conversation.messages)} messages to {argument}")

    def _load(self, argument: str) -> None:
        if not argument:
            raise UsageError("/load wants a file name", hint="/load talk.json")
        loaded = Conversation.load(argument)
        self.model.options(**loaded.options)
        self.conversation = loaded
        self._show()

    def _show(self) -> None:
        """The conversation so far."""
        for message in self.conversation.messages:
            write(f"{PROMPT if message.role == 'user' else ''}{message.content}\n")

    def _stats(self, argument: str) -> None:
        self.stats = not self.stats
        _say(f"stats {'on' if self.stats else 'off'}")
        if self.stats and self.last is not None:
            _say(speed_line(self.last))

    def _undo(self, argument: str) -> None:
        self.conversation.take_back()
        _say(f"{len(self.conversation.messages)} messages left")

    def _retry(self, argument: str) -> None:
        messages = self.conversation.messages
        before = list(messages)
        try:
            self._ask(self.conversation.take_back())
        finally:
            if len(messages) < len(before):  # no new answer: the old one stands
                messages[:] = before

    def _clear(self, argument: str) -> None:
        self.conversation.messages.clear()
        _say("begun anew")

    def _exit(self, argument: str) -> None:
        self.running = False


def _say(text: str) -> None:
    click.echo(click.style(text, dim=True), err=True)


def _history() -> History:
    """What was typed in earlier chats; in memory alone where the store's folder cannot be written."""
    path = store.home() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    """Enter sends unless the line ends in a backslash; Alt-Enter begins a new line."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
