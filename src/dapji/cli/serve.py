"""`dapji serve`: answer other programs over HTTP."""

from __future__ import annotations

from typing import Any

import click

from dapji.cli.options import DEFAULT_MODEL, context_option, executor_options, speculate_option
from dapji.errors import UnavailableError, UsageError

PORT = 8410


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free one.")
@click.option("--memory", type=click.FloatRange(0, min_open=True), metavar="GB", help="For open models together.")
@click.option("--max-running", type=click.IntRange(1, 512), default=64, show_default=True, help="Requests at once.")
@click.option("--max-waiting", type=click.IntRange(0), default=256, show_default=True, help="Requests that wait.")
@context_option
@executor_options
@speculate_option
def command(
    models: tuple[str, ...],
    host: str,
    port: int,
    memory: float | None,
    max_running: int,
    max_waiting: int,
    **values: Any,
) -> None:
    """Answer OpenAI's protocol over HTTP, with these models.

    MODEL is a name of `dapji list`, or a path; the first is the default. Without any: all that are
    installed. A model is opened when it is first asked for; --memory bounds what is open at once.

    \b
    Examples:
      dapji serve smollm2-135m
      dapji serve qwen2.5-coder-0.5b ./model.gguf --memory 4
      curl localhost:8410/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'

    \b
    Stop with Ctrl-C: answers under way are finished, a second Ctrl-C ends them.
    Exit codes: 0 stopped, 1 failed, 2 wrong usage.
    """
    try:
        import uvicorn

        from dapji.server.app import create_app
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        raise UnavailableError(f"{error.name} is not installed", hint="pip install 'dapji[serve]'") from error
    from dapji.model import load
    from dapji.server.registry import Registry
    from dapji.server.settings import Settings
    from dapji.weights import store

    names = models or [record.name for record in store.installed()]
    if not names:
        raise UsageError("no model is installed", hint=f"dapji pull {DEFAULT_MODEL}")
    if not _is_loopback(host):
        raise UsageError(
            f"--host {host} is reachable from other machines, and this server has no keys yet",
            hint="listen on 127.0.0.1 and let a proxy that asks for a key stand before it",
        )
    registry = Registry(
        names, load=lambda path: load(path, **values), memory=None if memory is None else round(memory * 1e9)
    )
    app = create_app(registry, Settings(max_running=max_running, max_waiting=max_waiting))
    click.echo(f"models: {', '.join(registry.models)}", err=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, lifespan="on")


def _is_loopback(host: str) -> bool:
    from ipaddress import ip_address

    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
