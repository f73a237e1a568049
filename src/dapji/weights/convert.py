"""Converting a whole model: to a GGUF file in another scheme, or to a folder in the Hugging Face layout.

Tensors are read, converted and written one after the other, in pieces, so that memory does not depend on the model's
size. What is written appears at its place when it is whole. Sits above the formats and `models.families`, which
translate names, rows and configurations.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dapji.errors import FormatError, UsageError
from dapji.models import families
from dapji.ops.formats import FORMATS, Bytes, Format
from dapji.ops.tensor import Tensor
from dapji.weights import embedding, vocabulary
from dapji.weights.checkpoint import Checkpoint
from dapji.weights.files import TensorToWrite, new_folder
from dapji.weights.gguf import Encoded, Metadata, Value, write_gguf
from dapji.weights.quantize import quantize
from dapji.weights.safetensors import INDEX_NAME, write_shards
from dapji.weights.schemes import SCHEMES, choose_formats
from dapji.weights.sources_base import RECORD, model_files
from dapji.weights.summary import folder_licence

FLOATS = ("F32", "F16", "BF16")
"""Formats that lose nothing when they are quantised, and those that a Hugging Face folder holds."""

_CHUNK_VALUES = 1 << 16
"""Values converted at a time by one thread: its scratch arrays stay in the second-level cache."""
MAX_SHARD_BYTES = 5_000_000_000
"""What transformers' save_pretrained used for long; tools expect files of about this size."""

Floats64 = NDArray[np.float64]
Advance = Callable[[int], object]
"""Called with the number of bytes of the source that are done since the last call."""


@dataclass(frozen=True, kw_only=True)
class ConvertedTensor:
    name: str
    source: Format
    target: Format
    values: int
    error: float | None
    """Root mean square of the differences over the root mean square of the values; None: not measured."""


@dataclass(kw_only=True)
class Report:
    """What a conversion did, tensor by tensor."""

    source_bytes: int
    """Of all tensors, as they were stored."""
    tensors: list[ConvertedTensor] = field(default_factory=list)

    @property
    def values(self) -> int:
        return sum(tensor.values for tensor in self.tensors)

    @property
    def target_bytes(self) -> int:
        return sum(_nbytes(tensor.values, tensor.target) for tensor in self.tensors)

    @property
    def formats(self) -> dict[str, int]:
        """Bytes of each format in the result, largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.target.name] += _nbytes(tensor.values, tensor.target)
        return dict(sizes.most_common())


def _nbytes(values: int, format: Format) -> int:
    return values // format.block * format.block_bytes


def write_quantized(
    source: Checkpoint,
    target: Path,
    scheme: str,
    *,
    allow_requantize: bool = False,
    measure: bool = False,
    threads: int | None = None,
    advance: Advance = lambda n_bytes: None,
    weights: Mapping[str, Tensor] | None = None,
) -> Report:
    """Write `source` as a GGUF file in a scheme (a name of SCHEMES); an existing file is replaced when all is done.

    weights: by canonical name, instead of its own.

    The metadata of a GGUF file is kept; for a folder it is made from config.json and the tokenizer's files. Tensors
    that have their format already are copied; others that are quantised already lose accuracy twice, which is refused
    unless `allow_requantize`. `measure`: also compute each tensor's error.
    Raises UsageError, FormatError, ConfigError, TokenizerError.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"unknown type {scheme!r}", hint=f"one of {', '.join(SCHEMES)}")
    metadata, tensors = gguf_contents(source, weights)
    formats = choose_formats(tensors, SCHEMES[scheme])
    if not allow_requantize:
        _refuse_requantizing(tensors, formats)
    written = {**metadata, "general.file_type": SCHEMES[scheme].file_type, "general.quantization_version": 2}
    report = Report(source_bytes=source.nbytes)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        write_gguf(target, written, _to_write(tensors, formats, pool, report, measure, advance))
    return report


def gguf_contents(
    source: Checkpoint, weights: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Value | Encoded], Mapping[str, Tensor]]:
    """Metadata and tensors as a GGUF file holds them. weights: by canonical name, instead of its own.

    Raises ConfigError, TokenizerError, FormatError.
    """
    if isinstance(source.metadata, Metadata):
        metadata = source.metadata
        tensors = families.changed_gguf(metadata, source.tensors, weights) if weights else source.tensors
        return {key: metadata.encoded(key) for key in metadata if not key.startswith("split.")}, tensors
    config, own = families.from_hf(source.metadata, source.tensors)
    architecture, named = families.to_gguf(config, {**own, **(weights or {})})
    general = {"general.type": "model", "general.name": source.path.resolve().name}
    if licence := folder_licence(source.path):
        general["general.license"] = licence
    tokenizer = vocabulary.gguf_metadata(source.path, n_tokens=config.vocab_size)
    pooling = embedding.gguf_metadata(source, cast(str, architecture["general.architecture"]))
    return cast("dict[str, Value | Encoded]", architecture | general | tokenizer | pooling), named


def write_folder(
    source: Checkpoint,
    target: Path,
    dtype: str,
    *,
    measure: bool = False,
    threads: int | None = None,
    advance: Advance = lambda n_bytes: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    weights: Mapping[str, Tensor] | None = None,
) -> Report:
    """Write `source` as a folder in the Hugging Face layout with all weights in `dtype`, one of FLOATS.

    weights: by canonical name, instead of its own.

    Tokenizer, chat templates, README and licence are copied, or made from a GGUF file's metadata as far as that has
    them. `target` must not exist, or be an empty folder. Raises UsageError, FormatError, ConfigError, TokenizerError.
    """
    if dtype not in FLOATS:
        raise UsageError(f"a folder holds weights as {', '.join(FLOATS)}, not {dtype!r}", hint="give a file, as m.gguf")
    translate = families.from_gguf if source.kind == "gguf" else families.from_hf
    config, own = translate(source.metadata, source.tensors)
    config_json, tensors = families.to_hf(config, {**own, **(weights or {})})
    formats = dict.fromkeys(tensors, FORMATS[dtype])
    report = Report(source_bytes=source.nbytes)
    with new_folder(target) as folder, ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        write_shards(folder, _to_write(tensors, formats, pool, report, measure, advance), max_bytes=max_shard_bytes)
        made: dict[str, object] = {}
        if source.kind == "huggingface":
            _copy_companions(source.path, folder)
            # where the text is a part of the model, the part says them
            part = cast("Mapping[str, object]", source.metadata.get("text_config") or {})
            token_ids: Mapping[str, object] = {**part, **source.metadata}
        else:
            if vocabulary.MODEL_KEY in source.metadata:
                made = vocabulary.huggingface_files(source.metadata)
            token_ids = cast("Mapping[str, object]", made.get("generation_config.json", {}))
            _write_readme(folder, source.metadata)
            made |= embedding.folder_files(source, dim=cast(int, config_json["hidden_size"]))
        config_json |= {key: value for key, value in token_ids.items() if key in _TOKEN_IDS}
        config_json |= {key: source.metadata[key] for key in embedding.MATRYOSHKA if key in source.metadata}
        made["config.json"] = {**config_json, "dtype": _DTYPES[dtype]}
        for name, content in made.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text + "\n", encoding="utf-8")
    return report


_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What config.json repeats of the tokenizer; without them, transformers assumes those of its first model."""
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _copy_companions(source: Path, target: Path) -> None:
    """What a folder holds beside configuration and weights, but for dapji.json, which tells of these very weights."""
    names = [path.relative_to(source).as_posix() for path in source.rglob("*")]
    for name in {*model_files(names, str(source)), *({"README.md"} & set(names))}:
        if name not in ("config.json", RECORD) and not name.endswith((".safetensors", INDEX_NAME)):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _write_readme(folder: Path, metadata: Mapping[str, Any]) -> None:
    """A README.md that keeps the licence, where the GGUF file says it: the form in which the hub states it."""
    licence, name = metadata.get("general.license"), metadata.get("general.name")
    if isinstance(licence, str):
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n\n# {name or 'Model'}\n", encoding="utf-8")


def _refuse_requantizing(tensors: Mapping[str, Tensor], formats: Mapping[str, Format]) -> None:
    for name, format in formats.items():
        if (present := tensors[name].format) is not format and present.name not in FLOATS and format.name not in FLOATS:
            raise UsageError(
                f"tensor {name!r} is {present.name} already; quantising it to {format.name} loses accuracy twice",
                hint="start from F16, BF16 or F32 weights, or allow it with --allow-requantize",
            )


def _to_write(
    tensors: Mapping[str, Tensor],
    formats: Mapping[str, Format],
    pool: ThreadPoolExecutor,
    report: Report,
    measure: bool,
    advance: Advance,
) -> list[TensorToWrite]:
    # what is stored in fewer bytes than it has here, as 8-bit floats are, counts by those
    share = report.source_bytes / sum(tensor.nbytes for tensor in tensors.values())

    def chunks(name: str) -> Iterator[Bytes]:
        tensor, format = tensors[name], formats[name]
        squares = np.zeros(2)
        for piece in tensor.pieces():
            for n_rows, data, chunk_squares in _convert(piece, format, pool, measure):
                squares += chunk_squares
                yield data
                advance(round(n_rows * tensor.format.row_bytes(tensor.cols) * share))
        error = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
        report.tensors.append(
            ConvertedTensor(
                name=name,
                source=tensor.format,
                target=format,
                values=tensor.rows * tensor.cols,
                error=error if measure else None,
            )
        )

    return [
        TensorToWrite(name=name, format=formats[name], shape=tensor.shape, chunks=partial(chunks, name))
        for name, tensor in tensors.items()
    ]


def _convert(
    tensor: Tensor, format: Format, pool: ThreadPoolExecutor, measure: bool
) -> Iterator[tuple[int, Bytes, Floats64]]:
    """Number of rows, their bytes in `format`, and [sum of squared errors, sum of squared values] where measured."""
    if tensor.format is format:
        yield tensor.rows, tensor.data, np.zeros(2)
        return
    step = max(1, _CHUNK_VALUES // tensor.cols)
    rows = tensor.data

    def part(start: int) -> tuple[int, Bytes, Floats64]:
        values = tensor.format.dequantize(rows[start : start + step])
        if not np.isfinite(values).all():
            raise FormatError(f"tensor {tensor.name!r} has infinite or undefined values")
        data = quantize(values, format)
        if not measure:
            return len(values), data, np.zeros(2)
        squared_error = np.square(format.dequantize(data) - values, dtype=np.float64).sum()
        return len(values), data, np.array([squared_error, np.square(values, dtype=np.float64).sum()])

    yield from pool.map(part, range(0, tensor.rows, step))
