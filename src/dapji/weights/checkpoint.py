"""`open_checkpoint`: a model on disk, whichever way it lies there, before anybody has interpreted it.

A GGUF file, or a folder in the Hugging Face layout. Gives the foreign configuration and the foreign tensor names as
they are; `models.families` translates both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dapji.errors import FormatError, ModelNotFound
from dapji.weights.files import StoredTensors, map_file
from dapji.weights.gguf import MAGIC, read_gguf
from dapji.weights.safetensors import INDEX_NAME, SINGLE_NAME, decode_json, read_safetensors
from dapji.weights.sources_base import PICKLES

_CONVERT_HINT = "pickled weights can run code and are never loaded; convert them to safetensors with transformers"


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    path: Path
    """The GGUF file or the folder."""
    kind: Literal["gguf", "huggingface"]
    metadata: Mapping[str, Any]
    """The GGUF file's key-value pairs, or config.json."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json, where the folder has one."""
    tensors: StoredTensors
    """By foreign name."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(len(tensor.data) for tensor in self.tensors.stored.values())

    @property
    def formats(self) -> Mapping[str, int]:
        """Bytes of tensors of each type, largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.stored.values():
            sizes[tensor.type] += len(tensor.data)
        return dict(sizes.most_common())


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file (of a split one the first) or a folder with config.json and safetensors.

    Maps the weights, reads nothing of them. Raises ModelNotFound or FormatError.
    """
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder")
    return _open_folder(path) if path.is_dir() else _open_file(path)


def _open_file(path: Path) -> Checkpoint:
    if path.suffix in PICKLES:
        raise FormatError(f"{path}: a pickle", hint=_CONVERT_HINT)
    if path.suffix == ".safetensors":
        raise FormatError(
            f"{path}: one file of weights, config.json and the tokenizer are wanted too", hint=f"give {path.parent}"
        )
    if path.suffix != ".gguf" and map_file(path)[:4] != MAGIC:
        raise FormatError(f"{path}: not a GGUF file", hint="a model is a .gguf file or a folder with config.json")
    file = read_gguf(path)
    return Checkpoint(path=path, kind="gguf", metadata=file.metadata, tensors=file.tensors)


def _open_folder(path: Path) -> Checkpoint:
    if not (path / SINGLE_NAME).exists() and not (path / INDEX_NAME).exists():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        if pickles := [name for name in files if Path(name).suffix in PICKLES]:
            raise FormatError(f"{path}: no {SINGLE_NAME}, but {pickles[0]}", hint=_CONVERT_HINT)
        if ggufs := [name for name in files if name.endswith(".gguf")]:
            raise FormatError(f"{path}: a folder with {len(ggufs)} GGUF files", hint=f"give one, as {path / ggufs[0]}")
        raise FormatError(f"{path}: neither {SINGLE_NAME} nor {INDEX_NAME}")
    generation_path = path / "generation_config.json"
    return Checkpoint(
        path=path,
        kind="huggingface",
        metadata=read_json(path / "config.json"),
        generation=read_json(generation_path) if generation_path.exists() else {},
        tensors=read_safetensors(path),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises ModelNotFound or FormatError."""
    return decode_json(map_file(path), dict[str, Any], str(path))
