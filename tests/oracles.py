"""llama.cpp's own test files: vocabularies with their vectors, and chat templates of published models.

They come out of the source archive of llama-cpp-python, pinned by hash, and are never part of this project.
`python tests/oracles.py` fetches them once; the tests themselves need no network. Everything lies under build/oracles,
or where DAPJI_ORACLES says.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
COMMAND = "python tests/oracles.py"
_FOLDER = f"{PACKAGE.replace('-', '_')}-{VERSION}/vendor/llama.cpp/models/"


def _cache() -> Path:
    return Path(os.environ.get("DAPJI_ORACLES", Path(__file__).parent.parent / "build" / "oracles"))


def llama_cpp_models() -> Path:
    """llama.cpp's folder `models`: ggml-vocab-*.gguf with .inp and .out, templates/*.jinja.

    Raises FileNotFoundError, which names the command that fetches it.
    """
    folder = _cache() / f"{PACKAGE}-{VERSION}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; fetch it once with `{COMMAND}`")
    return folder


def fetch() -> Path:
    """Download the archive unless it has been fetched before; gives the folder. Whole or not at all."""
    folder = _cache() / f"{PACKAGE}-{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        temporary = Path(name)
        archive = download(temporary)
        extracted = temporary / "models"
        with tarfile.open(archive) as tar:
            for member in tar:
                path = member.name.removeprefix(_FOLDER)
                if member.isfile() and path != member.name:
                    source = tar.extractfile(member)
                    assert source is not None
                    target = extracted / path
                    assert target.resolve().is_relative_to(extracted.resolve())
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with source, target.open("wb") as file:
                        shutil.copyfileobj(source, file)
        extracted.rename(folder)
    return folder


def download(folder: Path) -> Path:
    """Put the archive into `folder`, checked.

    pip honours the user's index and certificates; the hash makes any index good enough.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--no-deps", "--no-build-isolation", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive.name} has sha256 {found}, expected {SHA256}")
    return archive


if __name__ == "__main__":
    print(fetch())
