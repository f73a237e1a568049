"""Formats of answers: what of a model's text is content, what is reasoning, and which tools it calls.

A file for each format; `choose` tells by a chat template which one it is, `Parser` reads an answer as it arrives. Knows
neither tokens nor models: control tokens come as spellings.
"""

from dapji.chat.formats.choose import AnswerFormat
from dapji.chat.formats.events import Content, Event, Markup, Reasoning, ToolCall
from dapji.chat.formats.parser import Parser
from dapji.chat.formats.rules import ANY_TOOL, ToolChoice

__all__ = ["ANY_TOOL", "AnswerFormat", "Content", "Event", "Markup", "Parser", "Reasoning", "ToolCall", "ToolChoice"]
