"""A tiny model as a folder and an adapter on it, with lineage and certificate; and ways to change a file a little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

import tiny_training
from dapji.files import open_files
from dapji.models.adapter import Adapter, adaptable
from dapji.ops.low_rank import LowRank
from dapji.ops.tensor import Tensor
from dapji.proof.certificate import certify
from dapji.proof.lineage import Lineage, parent
from dapji.proof.record import write_parts
from dapji.weights.adapter_file import write_adapter
from dapji.weights.checkpoint import open_checkpoint
from dapji.weights.convert import write_folder

Change = Callable[[bytes], bytes]


def replaced(old: str, new: str) -> Change:
    def change(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode(), 1)

    return change


def flipped(byte: int, bit: int) -> Change:
    """byte: from the end where negative."""

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[byte] ^= 1 << bit
        return bytes(changed)

    return change


def write_model(folder: Path) -> Path:
    """In the Hugging Face layout, all weights in float32; made from a GGUF file beside it."""
    gguf = tiny_training.write_model(folder.with_name("source.gguf"))
    write_folder(open_checkpoint(gguf), folder, "F32")
    prove(folder, Lineage(kind="convert", parents=(parent("source", str(gguf)),)))
    return folder


def write_tuned(folder: Path, base: Path) -> Path:
    """An adapter of one layer's queries, on that base."""
    files = open_files(base)
    random = np.random.default_rng(7)
    name = "layers.1.attention.q"
    rows, cols = adaptable(files.config)[name]
    a, b = (random.standard_normal(shape, dtype=np.float32) for shape in ((2, cols), (rows, 2)))
    pair = LowRank(a=Tensor.from_float32("a", a), b=Tensor.from_float32("b", b), scale=1.0)
    folder.mkdir()
    write_adapter(folder, files.config, Adapter(pairs={name: pair}), base=str(base))
    prove(folder, Lineage(kind="tune", parents=(parent("base", str(base)),)), base=str(base))
    return folder


def prove(path: Path, lineage: Lineage, *, base: str | None = None) -> None:
    write_parts(path, certificate=certify(path, base=base), lineage=lineage)
