"""The model store: a folder per user in which a model is there as a whole or not at all (docs/store.md).

    <home>/models/NAME/    the model's files and dapji.json, whose "store" part says where they came from
    <home>/partial/NAME/   downloads that are not finished; a next try continues them
    <home>/locks/          one lock per name, so that processes do not fetch the same model twice

A model becomes visible by one rename of a finished folder. Knows of formats only whether `checkpoint` can open them,
and of the outside world only what `sources` and the catalogue tell.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from dapji.errors import (
    DapjiError,
    DownloadError,
    FormatError,
    IntegrityError,
    ModelNotFound,
    UnavailableError,
    UsageError,
)
from dapji.weights import catalogue
from dapji.weights.sources_base import (
    FULL_ERRNOS,
    RECORD,
    STORAGE_ERRNOS,
    DeliveredFile,
    Delivery,
    Progress,
    Silent,
    Source,
    Want,
    gguf_shards,
    human_size,
    sha256_file,
)
from dapji.weights.store_lock import locked


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    size: int
    sha256: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the store wrote down of a model when it arrived."""

    name: str
    source: str
    revision: str | None
    licence: str | None
    date: str
    """UTC, ISO 8601."""
    files: dict[str, StoredFile]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


def home() -> Path:
    """$DAPJI_HOME, or the platform's folder for a user's data."""
    if chosen := os.environ.get("DAPJI_HOME"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "dapji"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "dapji"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dapji"


def resolve(name_or_path: str | Path) -> Path:
    """The model to open: an existing path as it is, else the installed model of that name or alias.

    An installed model is its GGUF file (the first shard of a split one) or its folder. Raises ModelNotFound.
    """
    name = str(name_or_path)
    if name and Path(name).expanduser().exists():
        return Path(name).expanduser()
    record = read_record(name) or read_record(_canonical(name))  # the catalogue takes 4 ms to read
    if record is not None:
        return model_path(record)
    if (entry := catalogue.find(name)) is not None:
        raise ModelNotFound(f"{name} is not installed ({human_size(entry.size)})", hint=f"dapji pull {name}")
    raise _not_found(f"no model {name!r} is installed or known, and no such file exists", name)


def installed() -> list[Record]:
    """The models of the store, by name."""
    folder = home() / "models"
    if not folder.is_dir():
        return []
    records = (read_record(path.name) for path in sorted(folder.iterdir()))
    return [record for record in records if record is not None]


def partial_size(name: str) -> int:
    """Bytes of a download of that name which is not finished; 0 where there is none."""
    return sum(path.stat().st_size for path in (home() / "partial" / name).rglob("*") if path.is_file())


def read_record(name: str) -> Record | None:
    """What is known of the installed model `name`; None: not installed. Raises FormatError: its record is broken."""
    path = home() / "models" / name / RECORD
    if not _is_name(name) or not path.is_file():
        return None
    try:
        return msgspec.convert(json.loads(path.read_bytes())["store"], Record)
    except (ValueError, KeyError, TypeError, msgspec.ValidationError) as error:
        raise FormatError(
            f"{path} cannot be read: {error}", hint=f"dapji remove {name}, then dapji pull {name}"
        ) from error


def record_of(path: Path) -> Record | None:
    """What is known of the installed model whose file or folder `path` is; None: it is not in the store."""
    models = home() / "models"
    folder = path if path.parent == models else path.parent
    return read_record(folder.name) if folder.parent == models else None


def pull(spec: str, *, name: str | None = None, progress: Progress | None = None) -> Path:
    """Install a model of the catalogue, or one from a source (`sources.parse`); returns what `resolve` returns.

    `name` is what the model is called in the store; by default its name in the catalogue, else what the source
    suggests. Where that name is in the catalogue, the catalogue's sha256 must be met. Does nothing where the model is
    there already. Raises ModelNotFound, UsageError, DownloadError (IntegrityError).
    """
    from dapji.weights import sources  # takes 9 ms with what they bring along, which only fetching needs

    progress = progress or Silent()
    entry = catalogue.find(spec)
    if entry is not None:
        candidates = [sources.parse(s) for s in entry.sources]
        name = name or entry.name
    elif ":" in spec:
        candidates = [sources.parse(spec)]
        if name is None:
            name = re.sub(r"[^a-z0-9._-]+", "-", candidates[0].name.lower()).strip("-._")
            if catalogue.find(name) is not None:
                raise UsageError(
                    f"the name {name} belongs to a model of the catalogue",
                    hint=f"--name {name} if this is that very file, else --name OTHER",
                )
    else:
        raise _not_found(f"no model {spec!r} is in the catalogue", spec)
    if (pinned := catalogue.find(name)) is not None:
        entry, name = pinned, pinned.name
    if not _is_name(name):
        raise UsageError(f"{name!r} cannot be a model's name", hint="--name with letters a-z, digits, '.', '_', '-'")
    want = entry.want if entry else Want()

    with _held(name, progress):
        present = read_record(name)
        if present is None:
            if (home() / "models" / name).exists():
                raise UsageError(f"{home() / 'models' / name} exists, but is no model of the store; move it away")
            present = _install(name, candidates, want, entry.licence if entry else None, progress)
        elif not _is_same(present, candidates, want):
            raise UsageError(
                f"the name {name} is taken by a model from {present.source}",
                hint=f"dapji pull {spec} --name OTHER, or dapji remove {name} first",
            )
        else:
            progress.say(f"{name} is installed already")
        shutil.rmtree(home() / "partial" / name, ignore_errors=True)
    return model_path(present)


def stored_size(name: str) -> int:
    """Bytes that a model, by name or alias, and an unfinished download of it take. Raises ModelNotFound."""
    name = _canonical(name)
    model = home() / "models" / name
    size = partial_size(name) if _is_name(name) else 0
    if _is_name(name) and (model / RECORD).is_file():
        return size + sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    if not size:
        raise ModelNotFound(f"{name} is not in the store", hint="dapji list shows what is")
    return size


def remove(name: str) -> int:
    """Delete an installed model, and what is left of an unfinished download of it; returns the bytes freed.

    Raises ModelNotFound where the store has neither.
    """
    name = _canonical(name)
    size = stored_size(name)
    with _held(name, Silent()):
        model, partial = home() / "models" / name, home() / "partial" / name
        if (model / RECORD).is_file():
            # By a rename first: what is cut off in the middle of deleting must not look like a model.
            partial.mkdir(exist_ok=True)
            model.rename(Path(tempfile.mkdtemp(dir=partial)) / "removed")
        shutil.rmtree(partial)
    return size


def _install(name: str, candidates: list[Source], want: Want, licence: str | None, progress: Progress) -> Record:
    """Fetch from the first candidate that yields what is wanted, and make it visible."""
    failures: list[tuple[str, DapjiError]] = []
    for source in candidates:
        progress.say(f"fetching {name} from {source.spec}")
        try:
            delivery = _fetch(source, home() / "partial" / name, want, progress)
        except (DownloadError, UnavailableError) as error:
            failures.append((source.spec, error))
            progress.say(f"  {error.message}")
            continue
        record = Record(
            name=name,
            source=source.spec,
            revision=delivery.revision,
            licence=licence or delivery.licence,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            files={
                f.name: StoredFile(size=f.path.stat().st_size, sha256=f.sha256 or "")
                for f in delivery.files
                if f.name != RECORD
            },
        )
        _publish(record, delivery)
        return record
    kind = IntegrityError if any(isinstance(error, IntegrityError) for _, error in failures) else DownloadError
    lines = "".join(f"\n  {spec}: {error.message}" for spec, error in failures)
    own_hint = failures[0][1].hint if len(failures) == 1 else None
    elsewhere = any(not spec.startswith("file:") for spec, _ in failures)
    raise kind(
        f"no source delivered {name}:{lines}",
        hint=own_hint or (f"with a copy of the file: dapji pull file:PATH --name {name}" if elsewhere else None),
    )


def _fetch(source: Source, partial: Path, want: Want, progress: Progress) -> Delivery:
    """One source, verified: every file of the delivery has its sha256. What is left of an earlier try is used; if the
    result is wrong then, the leftovers were, and the source gets a second, fresh try."""
    folder = partial / hashlib.sha256(source.spec.encode()).hexdigest()[:16]
    resumed = folder.exists()
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return _verified(source.fetch(folder, want, progress), want, progress)
        except IntegrityError as error:
            shutil.rmtree(folder)
            if not resumed:
                raise
            resumed = False
            progress.say(f"  the unfinished download was damaged ({error.message}); starting again")


def _verified(delivery: Delivery, want: Want, progress: Progress) -> Delivery:
    if want.sha256 is not None and len(delivery.files) != 1:
        raise DownloadError(f"the pinned model is one file, this source has {len(delivery.files)}")
    files: list[DeliveredFile] = []
    for file in delivery.files:
        actual = file.sha256 or sha256_file(file.path, progress)
        for expected, by in ((want.sha256, "pinned"), (file.promised, "announced")):
            if expected is not None and actual != expected:
                raise IntegrityError(f"{file.name} has sha256 {actual}, {by} is {expected}")
        files.append(DeliveredFile(name=file.name, path=file.path, promised=file.promised, sha256=actual))
    if want.sha256 is None:  # nothing else says that this is a model, and a whole one
        _check_opens(delivery)
    return Delivery(files=tuple(files), licence=delivery.licence, revision=delivery.revision)


def _check_opens(delivery: Delivery) -> None:
    """Reads the headers, against the sizes of the files. Raises IntegrityError."""
    from dapji.weights.checkpoint import open_checkpoint  # takes 0.2 s with numpy, which a list can do without

    paths = {file.path.name: file.path for file in delivery.files}
    folder = next(iter(paths.values())).parent
    ggufs = sorted(name for name in paths if name.endswith(".gguf"))
    try:
        open_checkpoint(folder / ggufs[0] if ggufs else folder)
    except (FormatError, ModelNotFound) as error:
        reason = error.message.replace(f"{folder}{os.sep}", "")
        raise IntegrityError(f"the model cannot be opened: {reason}") from error


def _publish(record: Record, delivery: Delivery) -> None:
    """Gather the files in one folder, safe on the disk, and make it the model by a rename."""
    ready = Path(tempfile.mkdtemp(dir=home() / "partial" / record.name, prefix="ready-"))
    ready.chmod(0o755)
    about: dict[str, Any] = {}
    for file in delivery.files:
        if file.name == RECORD:
            # A model that Dapji made carries its lineage there; the store's part stands beside it.
            about = _read_object(file.path)
        else:
            (ready / file.name).parent.mkdir(exist_ok=True)
            file.path.replace(ready / file.name)
    about["store"] = msgspec.to_builtins(record)
    (ready / RECORD).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in (*ready.rglob("*"), ready):
        _sync(path)
    models = home() / "models"
    models.mkdir(exist_ok=True)
    ready.rename(models / record.name)
    _sync(models)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path.name} of the model is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path.name} of the model is not a JSON object")
    return content


def _sync(path: Path) -> None:
    if sys.platform == "win32":  # has no way to sync a folder, nor a file that is open for reading
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _held(name: str, progress: Progress) -> Iterator[None]:
    """The lock of `name`, and the disk's failures in our words."""
    root = home()
    try:
        for folder in ("models", "partial", "locks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        with locked(
            root / "locks" / f"{name}.lock", lambda: progress.say(f"another process works on {name}; waiting for it")
        ):
            yield
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            raise
        where = error.filename or root
        if error.errno in FULL_ERRNOS:
            raise DownloadError(
                f"no space left for {where}: {error.strerror}",
                hint="free some space, or set DAPJI_HOME to a folder on another disk; the download continues then",
            ) from error
        raise DownloadError(
            f"no access to {where}: {error.strerror}", hint="set DAPJI_HOME to a folder that you may write to"
        ) from error


def model_path(record: Record) -> Path:
    """What to open of an installed model: its GGUF file (the first shard of a split one) or its folder."""
    folder = home() / "models" / record.name
    ggufs = sorted(name for name in record.files if name.endswith(".gguf"))
    return folder / gguf_shards(ggufs[0])[0] if ggufs else folder


def _is_same(present: Record, candidates: list[Source], want: Want) -> bool:
    hashes = {file.sha256 for file in present.files.values()}
    return want.sha256 in hashes or present.source in {source.spec for source in candidates}


def _canonical(name: str) -> str:
    entry = catalogue.find(name)
    return entry.name if entry else name


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,99}", name) is not None


def _not_found(message: str, name: str) -> ModelNotFound:
    import difflib  # takes 1 ms

    known = [record.name for record in installed()]
    known += [n for entry in catalogue.entries() for n in (entry.name, *entry.aliases)]
    near = difflib.get_close_matches(name.lower(), dict.fromkeys(known), n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    hint = "dapji list shows what there is; dapji pull --help how to add to it"
    if name.startswith(("file:", "hf:", "pypi:")):
        hint = f"dapji pull {name} installs it under a name"
    elif name and Path(name).expanduser().exists():
        hint = f"dapji pull file:{name} installs what is there"
    elif (entry := next((found for n in near if (found := catalogue.find(n))), None)) is not None:
        hint = f"dapji pull {entry.name}"
    return ModelNotFound(message + meant, hint=hint)
