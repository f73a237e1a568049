"""The documents against the project: commands parse, paths exist, examples are word for word what the code says."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import dapji
from dapji.cli.main import cli
from tiny import ANSWER, SCRIPT, write_tiny

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w./-])(?:src|docs|tests|benchmarks|runs)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(path: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(path.read_text(encoding="utf-8")) if found == language]


def shell_lines(path: Path) -> list[str]:
    """Lines of shell blocks and code spans that begin with one of our commands, without comments; pipes are cut."""
    text = path.read_text(encoding="utf-8")
    spans = re.findall(r"`((?:dapji|make) [^`]+)`", text)
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
    parts = [part.strip() for line in [*lines, *spans] for part in re.split(r"\s\|\s|(?:^|\s)#\s", line)]
    return [part for part in parts if part.startswith(("dapji ", "make "))]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_commands_of_the_readme_exist(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ROOT.iterdir():
        (tmp_path / each.name).symlink_to(each)
    (tmp_path / "support").mkdir()  # which `dapji tune` makes
    monkeypatch.chdir(tmp_path)
    targets = set(re.findall(r"^([a-z-]+):.*?## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = shell_lines(path)
    assert len(lines) > 15
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "make":
            assert arguments[0] in targets, line
            continue
        if arguments[0] in ("COMMAND", "명령"):
            continue
        with cli.make_context("dapji", arguments[:1], resilient_parsing=True) as group:
            name, command, _ = cli.resolve_command(group, arguments)  # raises for one that does not exist
            assert command is not None
            if not arguments[1:]:  # just its name, in a sentence
                continue
            command.make_context(name, [a for a in arguments[1:] if a != "--help"], parent=group).close()


def test_both_readmes_show_the_same_commands() -> None:
    english, korean = ([re.sub(r"\s+# .*", "", block) for block in blocks(path, "sh")] for path in READMES)
    assert english == korean


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_python_of_the_readme_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, but with a tiny model under the name."""
    model = write_tiny(tmp_path / "tiny.gguf", SCRIPT)
    load = dapji.load
    monkeypatch.setattr(dapji, "load", lambda name: load(model), raising=False)
    (code,) = blocks(path, "python")
    exec(compile(code, str(path), "exec"), {})
    assert capsys.readouterr().out.startswith(ANSWER + "\n")


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    missing = {found for found in PATH.findall(text) if not (ROOT / found).exists()}
    modules = re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text)  # as ARCHITECTURE.md names those of the package
    missing |= {found for found in modules if not (ROOT / found).exists() and not (ROOT / "src/dapji" / found).exists()}
    missing |= {link for link in LINK.findall(text) if not (path.parent / link).exists()}
    assert not missing


def test_layers_of_the_architecture_are_those_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    checked = project["tool"]["importlinter"]["contracts"][0]["layers"]
    layers = [layer for layer in checked if layer != "__main__"]  # which only starts the command line
    picture = blocks(ROOT / "ARCHITECTURE.md", "")[0]
    assert [re.split(r"\s{2,}", line)[0] for line in picture.splitlines()] == layers
    folders = {part for layer in layers for part in layer.split(" | ")}
    package = ROOT / "src" / "dapji"
    inside = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert folders == inside - {"__init__", "__main__"}


def test_ways_to_install_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for path in READMES:
        text = "".join(blocks(path, "sh"))
        assert set(re.findall(r"pip install \"\.\[(\w+)\]\"", text)) == set(project["optional-dependencies"])
        (switch,) = re.findall(r"-C cmake\.define\.(\w+)=OFF", text)
        assert f"option({switch} " in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")


EXAMPLES = [
    example
    for page in ("CONTRIBUTING.md", "docs/adding-a-family.md")
    for example in re.findall(
        r"^`([\w./-]+)`\n\n```\w+\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]


@pytest.mark.parametrize(("path", "example"), EXAMPLES, ids=[path for path, _ in EXAMPLES])
def test_examples_are_word_for_word(path: str, example: str) -> None:
    assert example in (ROOT / path).read_text(encoding="utf-8")


def test_every_convention_of_code_has_an_example() -> None:
    assert len(EXAMPLES) >= 13


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert project["version"] == dapji.__version__ == newest[1]
