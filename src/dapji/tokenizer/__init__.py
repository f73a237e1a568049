"""Text to token ids and back, from a tokenizer.json or from GGUF metadata alone. Knows neither models nor chats."""

from dapji.tokenizer.tokenizer import Detokenizer, Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
