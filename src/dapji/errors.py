"""The whole exception tree.

    DapjiError
    ├── FormatError            a file is not what it claims to be (truncated, hostile, unsupported)
    ├── ConfigError            a model's configuration is inconsistent or uses something unsupported
    ├── TokenizerError         a tokenizer description cannot be used, or ids are out of range
    ├── TemplateError          a chat template failed, refused, or exceeded its limits
    ├── RequestError           a request's parameters are wrong
    │   └── ContextError       a prompt (plus what is asked for) does not fit the context
    ├── DeadlineError          a request's time was over before its answer was whole
    ├── ModelNotFound          no such model in the store or the catalogue
    ├── DownloadError          no source delivered the model; names each source and why it failed
    │   └── IntegrityError     bytes arrived, but with another hash than the pinned one, or no whole model
    ├── CertificateError       a model does not behave as its certificate says
    ├── TrainingError          a run cannot go on: its loss is no number
    ├── UnavailableError       a part that this installation lacks (compiler, torch, huggingface_hub)
    └── UsageError             a command line or an API call that makes no sense

A user's mistake raises one of these, says both values ("n_heads (30) must be divisible by n_kv_heads (8)") and,
where there is a remedy, carries a hint. `assert` is for our own invariants. Bottom layer: imports nothing of dapji.
"""

from __future__ import annotations


class DapjiError(Exception):
    """Base of every error that a user can cause. `hint` is printed on its own line after the message."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class FormatError(DapjiError):
    """A file is not what it claims to be, or holds something that we do not read."""


class ConfigError(DapjiError):
    """A model's configuration is inconsistent, incomplete or uses an unsupported mechanism."""


class TokenizerError(DapjiError):
    """A tokenizer description cannot be used, or a token id is out of range."""


class TemplateError(DapjiError):
    """A chat template failed, refused the conversation, or exceeded its limits."""


class RequestError(DapjiError):
    """A generation request's parameters are wrong."""


class ContextError(RequestError):
    """A prompt, with the tokens asked for, does not fit the context."""


class DeadlineError(DapjiError):
    """A request's time was over before its answer was whole."""


class ModelNotFound(DapjiError):
    """No model of that name in the store or the catalogue, and no file at that path."""


class DownloadError(DapjiError):
    """No source delivered the model."""


class IntegrityError(DownloadError):
    """Bytes arrived, but their sha256 is not the pinned one, or they are no whole model."""


class CertificateError(DapjiError):
    """A model's files no longer give what its certificate says."""


class TrainingError(DapjiError):
    """A run of training cannot go on."""


class UnavailableError(DapjiError):
    """This installation lacks a part that the request needs."""


class UsageError(DapjiError):
    """A command line or an API call that makes no sense."""
