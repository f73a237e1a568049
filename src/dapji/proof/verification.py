"""`verify`: certificate and lineage against the files that are there, and the certificate replayed on an executor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dapji.errors import DapjiError, FormatError, RequestError, UsageError
from dapji.models.executor import ExecutorKind, default_kind
from dapji.proof.behaviour import differences
from dapji.proof.certificate import Certificate, Subject, open_subject, read_certificate
from dapji.proof.lineage import DataFile, Lineage, Parent, ancestors, model_paths, read_lineage
from dapji.proof.record import record_path
from dapji.proof.replay import Runner
from dapji.weights import store
from dapji.weights.sources_base import Progress, Silent, sha256_file


@dataclass(frozen=True, kw_only=True)
class Check:
    part: str
    """record, files, lineage, behaviour or numbers."""
    name: str
    passed: bool | None
    """None: it could not be checked, which is no failure."""
    detail: str = ""


def verify(
    path: Path, *, executor: ExecutorKind | None = None, base: str | None = None, progress: Progress | None = None
) -> Iterator[Check]:
    """Each check as it is made; all of them, however many fail.

    path: a model's file or folder, or an adapter's. executor: by default native where it was built. base: of an
    adapter, where it lies elsewhere than when it was certified. Raises UsageError where there is no certificate,
    UnavailableError where this installation lacks the executor.
    """
    try:
        certificate, lineage = read_certificate(path), read_lineage(path)
    except FormatError as error:
        yield Check(part="record", name=record_path(path).name, passed=False, detail=error.message)
        return
    if certificate is None:
        raise UsageError(f"{path} has no certificate", hint=f"dapji verify {path} --certify writes one")
    yield Check(part="record", name=record_path(path).name, passed=True)
    digests = _Digests(progress)
    yield from _compared(path, certificate.files, "files", "", digests)
    if lineage is not None:
        yield from _lineage(lineage, base, digests)
    try:
        subject = open_subject(path, base, lineage)
    except DapjiError as error:
        detail = error.message if error.hint is None else f"{error.message} ({error.hint})"
        yield Check(part="behaviour", name="the model can be opened", passed=False, detail=detail)
        return
    for name, found in differences(certificate.behaviour, subject.files, subject.tokenizer):
        yield Check(part="behaviour", name=name, passed=found is None, detail=found or "")
    yield from _numbers(certificate, subject, executor or default_kind(), progress or Silent())


class _Digests:
    """sha256 of files, each read once."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._known: dict[Path, str] = {}

    def __getitem__(self, path: Path) -> str:
        path = path.resolve()
        if path not in self._known:
            self._known[path] = sha256_file(path, self._progress)
        return self._known[path]


def _compared(path: Path, files: Mapping[str, str], part: str, whose: str, digests: _Digests) -> Iterator[Check]:
    """Each file of a model: that it is there, and what it was; and that no other is there which would count."""
    folder = path if path.is_dir() else path.parent
    for name, digest in files.items():
        if not (folder / name).is_file():
            yield Check(part=part, name=whose + name, passed=False, detail="is not there")
        else:
            yield _hashed(part, whose + name, folder / name, digest, digests)
    try:
        others = model_paths(path).keys() - files.keys()
    except DapjiError:  # what is missing has been told
        return
    for name in sorted(others):
        yield Check(part=part, name=whose + name, passed=False, detail="was not there")


def _hashed(part: str, name: str, path: Path, digest: str, digests: _Digests) -> Check:
    found = digests[path]
    detail = "" if found == digest else f"sha256 was {digest}, is {found}"
    return Check(part=part, name=name, passed=not detail, detail=detail)


def _lineage(lineage: Lineage, base: str | None, digests: _Digests) -> Iterator[Check]:
    """What is at hand of all that it names; each model and file once."""
    seen: set[tuple[str, str]] = set()
    for each in ancestors(lineage):
        key = ("data", each.file) if isinstance(each, DataFile) else (each.role, each.model)
        if key in seen:
            continue
        seen.add(key)
        if isinstance(each, DataFile):
            yield _data_file(each, digests)
        else:
            yield from _parent(each, base if each in lineage.parents and each.role == "base" else None, digests)


def _data_file(file: DataFile, digests: _Digests) -> Check:
    name, path = f"{file.use}: {file.file}", Path(file.file)
    if not path.is_file():
        return Check(part="lineage", name=name, passed=None, detail="not at hand")
    return _hashed("lineage", name, path, file.sha256, digests)


def _parent(parent: Parent, elsewhere: str | None, digests: _Digests) -> Iterator[Check]:
    name = f"{parent.role} {elsewhere or parent.model}"
    try:
        path = store.resolve(elsewhere or parent.model)
    except DapjiError:
        yield Check(part="lineage", name=name, passed=None, detail="not at hand")
        return
    yield from _compared(path, parent.files, "lineage", f"{name}: ", digests)


def _numbers(certificate: Certificate, subject: Subject, kind: ExecutorKind, progress: Progress) -> Iterator[Check]:
    tolerance = certificate.tolerances.get(kind)
    if not certificate.passages:  # a model that predicts no tokens
        return
    context = max(len(passage.tokens) for passage in certificate.passages)
    nbytes = subject.files.checkpoint.nbytes
    with (
        progress.bar(f"replaying on {kind}", len(certificate.passages) * nbytes) as advance,
        Runner(kind, subject.files, subject.adapter, context=context) as runner,
    ):
        for passage in certificate.passages:
            try:
                divergence, others = runner.divergence(passage)
            except RequestError as error:  # another base, with another vocabulary
                yield Check(part="numbers", name=f"{passage.name} on {kind}", passed=False, detail=error.message)
                continue
            advance(nbytes)
            detail = f"divergence {divergence:.2g} nats"
            if tolerance is None:
                passed, detail = None, f"{detail}; no tolerance was measured for {kind}"
            else:
                passed = bool(divergence <= tolerance.allowed)  # and not where it is no number
                detail += f", {'allowed' if passed else 'allowed are'} {tolerance.allowed:.2g}"
            if others:
                detail += f"; another likeliest token in {others} of {len(passage.tokens)} places"
            yield Check(part="numbers", name=f"{passage.name} on {kind}", passed=passed, detail=detail)
