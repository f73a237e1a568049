"""`hf:OWNER/NAME[:FILE]`: a repository of the Hugging Face hub, or one GGUF file of it.

huggingface_hub (extra `hub`, imported on use) gives the listing, the endpoint (HF_ENDPOINT), the token and the HTTP
session. The bytes are streamed here, because its own downloads do not survive the death of the process: a partial
file and its ETag stay, and the next try asks for the rest with Range and If-Range.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapji.errors import DapjiError, DownloadError, IntegrityError, UnavailableError
from dapji.weights.sources_base import (
    STORAGE_ERRNOS,
    DeliveredFile,
    Delivery,
    Progress,
    Want,
    gguf_shards,
    local_name,
    model_files,
    record_name,
    require_space,
)

LISTING_TIMEOUT = 5.0
"""Seconds; one try. A machine without a network must reach the next source soon."""
STREAM_TIMEOUT = 20.0
"""Seconds without a byte before a stream counts as broken."""
MAX_STALLS = 5
"""Broken streams in a row, none of which brought a byte, before we give up."""


@dataclass(frozen=True, kw_only=True)
class HubSource:
    repository: str
    """owner/name"""
    file: str | None = None

    @property
    def spec(self) -> str:
        return f"hf:{self.repository}:{self.file}" if self.file else f"hf:{self.repository}"

    @property
    def name(self) -> str:
        return Path(self.file).stem if self.file else self.repository.split("/")[1]

    def fetch(self, folder: Path, want: Want, progress: Progress) -> Delivery:
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise UnavailableError(
                "huggingface_hub is not installed", hint="pip install 'dapji[hub]', or use another source"
            ) from None
        try:
            return self._fetch(folder, want, progress)
        except DapjiError:
            raise
        except Exception as error:
            # The hub's client lets the errors of its HTTP library through, and that library has changed over time.
            if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
                raise
            raise DownloadError(_reason(error)) from error

    def _fetch(self, folder: Path, want: Want, progress: Progress) -> Delivery:
        from huggingface_hub import HfApi, hf_hub_url

        api = HfApi(endpoint=_endpoint())
        info = api.model_info(self.repository, files_metadata=True, timeout=LISTING_TIMEOUT)
        offered = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        names = gguf_shards(self.file) if self.file else model_files(offered, self.spec, separator=":")
        if self.file and want.file is None and record_name(self.file) in offered:
            names.append(record_name(self.file))
        missing = [n for n in names if n not in offered]
        if missing:
            raise DownloadError(f"the repository {self.repository} has no file {', '.join(missing)}")

        promised = {n: lfs.sha256 if (lfs := offered[n].lfs) else None for n in names}
        if want.sha256 and len(names) == 1 and promised[names[0]] not in (None, want.sha256):
            raise IntegrityError(f"the hub's file has sha256 {promised[names[0]]}, pinned is {want.sha256}")

        sizes = {n: int(offered[n].size or 0) for n in names}
        paths = {n: folder / local_name(n) for n in names}
        done = sum(p.stat().st_size for n in names for p in (paths[n], _partial(paths[n])) if p.exists())
        require_space(folder, sum(sizes.values()) - done)
        with progress.bar(f"downloading {self.repository}", sum(sizes.values()), done) as advance:
            for n in names:
                # The commit, not a branch: a push while we download must not mix two versions.
                url = hf_hub_url(self.repository, n, revision=info.sha, endpoint=api.endpoint)
                paths[n].parent.mkdir(exist_ok=True)
                _download(url, paths[n], sizes[n], advance)
        single = want.file if len(names) == 1 else None
        return Delivery(
            files=tuple(
                DeliveredFile(name=single or local_name(n), path=paths[n], promised=promised[n]) for n in names
            ),
            licence=_licence(info),
            revision=info.sha,
        )


def _endpoint() -> str:
    from huggingface_hub import constants

    # The environment is read on each use, since the library reads it only once, when it is imported.
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _download(url: str, path: Path, size: int, advance: Callable[[int], object]) -> None:
    """GET `url` into `path`, continuing a partial file of an earlier try if the server still has the same content."""
    partial = _partial(path)
    if path.exists():
        return
    partial.touch()
    stalls = 0
    while (before := partial.stat().st_size) < size:
        try:
            _stream(url, partial, size, advance)
        except DapjiError:
            raise
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            refused = status is not None and 400 <= status < 500 and status not in (408, 429)
            stalls = 0 if partial.stat().st_size > before else stalls + 1
            if refused or stalls > MAX_STALLS or (isinstance(error, OSError) and error.errno in STORAGE_ERRNOS):
                raise
            time.sleep(min(stalls, 3))
    if partial.stat().st_size > size:
        raise IntegrityError(f"{path.name} has {partial.stat().st_size} bytes, the listing says {size}")
    partial.replace(path)


def _stream(url: str, partial: Path, size: int, advance: Callable[[int], object]) -> None:
    """One request for the bytes that `partial` lacks."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined,unused-ignore]

    etag_file = partial.with_name(partial.name + ".etag")
    have = partial.stat().st_size
    # A weak ETag does not identify bytes, so it cannot guard a range (RFC 9110, 13.1.5).
    etag = etag_file.read_text() if etag_file.exists() else ""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have and etag and not etag.startswith("W/"):
        headers |= {"Range": f"bytes={have}-", "If-Range": etag}
    with get_session().stream("GET", url, headers=headers, timeout=STREAM_TIMEOUT) as response:
        hf_raise_for_status(response)
        start = have if response.headers.get("Content-Range", "").startswith(f"bytes {have}-") else 0
        if response.status_code == 206 and start != have:
            raise DownloadError(f"the server answered {response.headers.get('Content-Range')!r} to bytes={have}-")
        etag_file.write_text(response.headers.get("ETag", ""))
        advance(start - have)
        with partial.open("r+b") as file:
            file.truncate(start)
            file.seek(start)
            for chunk in response.iter_bytes():  # as they arrive: a chunk size would hold bytes back, and lose them
                file.write(chunk)
                advance(len(chunk))
                if file.tell() > size:
                    raise IntegrityError(f"{partial.stem}: more than the {size} bytes that the listing says")


def _licence(info: Any) -> str | None:
    licence = info.card_data.get("license") if info.card_data else None
    return str(licence) if licence else None


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "gated: accept the licence on the model's page, then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one (set HF_TOKEN)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return reason if _endpoint() in reason else f"{_endpoint()}: {reason}"
