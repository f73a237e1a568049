"""`dapji batch`: answer the requests of a file, without a server."""

from __future__ import annotations

import asyncio
import filecmp
import heapq
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dapji.cli.options import (
    DEFAULT_MODEL,
    check_new_file,
    context_option,
    executor_options,
    kv_memory_option,
    speculate_option,
)
from dapji.cli.serve import extra_installed
from dapji.errors import DapjiError, RequestError, UsageError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from dapji.model import Model
    from dapji.server.batches.store import Batch

_ANY_TIME = 100 * 365 * 24 * 3600


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Where answers go."
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--max-running", type=click.IntRange(1, 512), default=32, show_default=True, help="Requests at once.")
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object.")
@kv_memory_option
@context_option
@executor_options
@speculate_option
def command(
    file: Path,
    models: tuple[str, ...],
    output: Path,
    force: bool,
    max_running: int,
    as_json: bool,
    kv_memory: float,
    **values: Any,
) -> None:
    """Answer the requests in FILE, which has one a line, as files for OpenAI's /v1/batches have.

    MODEL is a name of `dapji list`, or a path; without any, requests may name all that are installed.
    The output has a line for each request, in the same order: an answer, or what was wrong with the
    request. It appears when it is whole. After Ctrl-C, or a power cut, the same command goes on with
    what is not answered yet; until then that lies in a folder beside the output, OUTPUT.partial.

    \b
    Examples:
      echo '{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model":
        "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}]}}' | tr -d '\\n' > in.jsonl
      dapji batch in.jsonl -o out.jsonl
      dapji batch in.jsonl ./model.gguf -o out.jsonl --max-running 8 --json

    Exit codes: 0 all are answered, 1 some are not, or failed, 2 wrong usage, 130 interrupted.
    """
    with extra_installed():
        from dapji.server.app import create_app
    from dapji.model import load
    from dapji.server.registry import Registry
    from dapji.server.settings import Settings
    from dapji.weights import store

    file.stat()  # raises where there is none
    check_new_file(output, force=force)
    names = models or [record.name for record in store.installed()]
    if not names:
        raise UsageError("no model is installed", hint=f"dapji pull {DEFAULT_MODEL}")
    broken: list[DapjiError] = []

    def opened(path: Path) -> Model:
        try:
            return load(path, kv_memory=round(kv_memory * 1e9), max_running=max_running, **values)
        except DapjiError as error:
            broken.append(error)
            raise

    started = time.monotonic()
    folder = output.with_name(f"{output.name}.partial")
    # Batches take half of a server's places.
    settings = Settings(folder=folder, max_running=2 * max_running, max_batch=1 << 40, max_file=1 << 60)
    app = create_app(Registry(names, load=opened, memory=None), settings)
    try:
        batch = asyncio.run(_run(app, file, folder, broken))
    except KeyboardInterrupt:
        click.echo(f"what is answered is kept in {folder}; the same command goes on from there", err=True)
        raise
    if batch.status == "failed":
        shutil.rmtree(folder)
        told = "".join(f"\n  line {error.line}: {error.message}" for error in batch.errors)
        raise RequestError(f"{file} is no file of requests:{told}")
    _write(batch, file, folder, output)
    shutil.rmtree(folder)
    seconds = time.monotonic() - started
    if as_json:
        about = {"output": str(output), "total": batch.total, "completed": batch.completed, "failed": batch.failed}
        click.echo(json.dumps(about | {"seconds": round(seconds, 3)}, indent=2))
    else:
        click.echo(
            f"{output}: {batch.completed} of {batch.total} requests answered in {seconds:.1f} s, "
            f"{batch.failed} with an error",
            err=True,
        )
    raise click.exceptions.Exit(1 if batch.failed else 0)


async def _run(app: Starlette, file: Path, folder: Path, broken: list[DapjiError]) -> Batch:
    """The batch when it has ended, begun or gone on with. broken: models that could not be opened."""
    from tqdm import tqdm

    from dapji.server.batches.store import ACTIVE, BatchStore
    from dapji.server.openai.batches import ENDPOINTS

    store: BatchStore = app.state.batches
    async with app.router.lifespan_context(app):
        found = await store.batches("", ENDPOINTS, limit=1)
        if found and not filecmp.cmp(file, store.body(found[0].input_file_id), shallow=False):
            raise UsageError(f"{folder} is of another FILE", hint="delete it, or write to another --output")
        batch = found[0] if found else await _begin(store, file)
        app.state.runner.look()
        with tqdm(desc="answering", unit="request", disable=None, delay=1, leave=False) as bar:
            while batch.status in ACTIVE:
                await asyncio.sleep(0.1)
                if broken:
                    raise broken[0]
                batch = await store.batch("", batch.id, ENDPOINTS)
                bar.total = batch.total
                bar.update(batch.completed + batch.failed - bar.n)
    return batch


async def _begin(store: Any, file: Path) -> Batch:
    from dapji.server.answering import identifier
    from dapji.server.batches.lines import parse, read_lines
    from dapji.server.batches.store import Batch
    from dapji.server.openai.batches import ENDPOINTS
    from dapji.server.problem import Problem

    try:
        endpoint = next((parse(line).url for _, line in read_lines(file, 1 << 30)), ENDPOINTS[0])
    except Problem as problem:
        raise RequestError(f"{file}: the first line is no request: {problem}") from None
    if endpoint not in ENDPOINTS:
        raise RequestError(f"{file}: requests to {endpoint!r} take no batches; those are {', '.join(ENDPOINTS)}")
    async with store.writing() as (name, body):
        with file.open("rb") as source:
            await asyncio.to_thread(shutil.copyfileobj, source, body)
    await store.add("", name, "batch", file.name, None)
    batch = Batch(
        id=identifier("batch", "_"),
        key="",
        endpoint=endpoint,
        input_file_id=name,
        created_at=int(time.time()),
        window=_ANY_TIME,
    )
    await store.create(batch, "batch")
    return batch


def _write(batch: Batch, file: Path, folder: Path, output: Path) -> None:
    """Answers and errors together, in the order of the input."""
    with file.open("rb") as lines:
        order = {name: i for i, name in enumerate(map(_name, filter(bytes.strip, lines)))}
    names = [name for name in (batch.output_file_id, batch.error_file_id) if name is not None]
    parts = [(folder / "files" / name).open("rb") for name in names]
    made = folder / "output"
    merged: Iterator[bytes] = heapq.merge(*parts, key=lambda line: order[_name(line)])
    with made.open("wb") as whole:
        whole.writelines(merged)
    for part in parts:
        part.close()
    made.replace(output)


def _name(line: bytes) -> str:
    name: str = json.loads(line)["custom_id"]
    return name
