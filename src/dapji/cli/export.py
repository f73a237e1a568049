"""`dapji export`: an adapter in the other format."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="What the adapter is for [default: what its adapter_config.json says].")
@click.option("--force", is_flag=True, help="Replace OUT if it is a file that exists.")
def command(adapter: Path, out: Path, base: str | None, force: bool) -> None:
    """Write ADAPTER as llama.cpp loads it, or as PEFT does.

    ADAPTER is PEFT's folder, as `dapji tune` writes it, or a GGUF file. OUT is a GGUF file if its
    name ends in .gguf, else a new folder for PEFT, transformers and vLLM. Values stay as they are;
    rows go where the other layout has them. A whole tuned model is exported by `dapji quantize`.

    \b
    Examples:
      dapji export ./support support.gguf
      llama-server -m base.gguf --lora support.gguf
      dapji export support.gguf ./support --base smollm2-135m

    Exit codes: 0 written, 1 not written, 2 wrong usage, 130 interrupted.
    """
    from dapji.cli.conversion import check_target, record
    from dapji.cli.pull import TerminalProgress
    from dapji.errors import UsageError
    from dapji.files import open_files
    from dapji.proof.lineage import Lineage, parent, versions
    from dapji.weights.adapter_file import base_of, write_adapter, write_gguf_adapter
    from dapji.weights.files import new_folder

    check_target(out, force=force)
    name = base if base is not None else base_of(adapter)
    if name is None:
        raise UsageError(f"{adapter} does not say which model it is for", hint="name it with --base")
    files = open_files(name)
    opened = files.adapter(adapter)
    bars = TerminalProgress()
    made_of = parent("source", str(adapter), bars), parent("base", name, bars)  # now: OUT may take the first's place
    if out.suffix == ".gguf":
        write_gguf_adapter(out, files.config, opened, name=adapter.resolve().stem)
    else:
        with new_folder(out) as folder:
            write_adapter(folder, files.config, opened, base=name)
    record(out, Lineage(kind="convert", parents=made_of, versions=versions()))
    click.echo(out)
