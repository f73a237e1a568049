"""Conversations to token ids, by the model's own chat template, in a sandbox with limits; and what answers consist of.

Knows no models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dapji.chat.template import ChatTemplate

__all__ = ["ChatTemplate"]


def __getattr__(name: str) -> Any:
    if name == "ChatTemplate":  # takes 30 ms with jinja2, which completing a text can do without
        from dapji.chat.template import ChatTemplate

        return ChatTemplate
    raise AttributeError(f"module 'dapji.chat' has no attribute {name!r}")
