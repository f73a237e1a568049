"""Conversations to token ids, by the model's own chat template, in a sandbox with limits. Knows no models."""

from dapji.chat.template import ChatTemplate

__all__ = ["ChatTemplate"]
