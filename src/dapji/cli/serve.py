"""`dapji serve`: answer other programs over HTTP."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import click

from dapji.cli.options import DEFAULT_MODEL, context_option, executor_options, kv_memory_option, speculate_option
from dapji.cli.vllm import check_engine_options, engine_options, model_on_vllm
from dapji.errors import DapjiError, ModelNotFound, UnavailableError, UsageError

if TYPE_CHECKING:
    from dapji.model import Model

PORT = 8410
SELF_SIGNED = "--tls-self-signed makes a certificate that those trust whom you let"
_EXTRA = (
    "uvicorn",
    "starlette",
    "prometheus_client",
    "python_multipart",
    "cryptography",
    "markdown_it",
    "pygments",
)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; others than this machine's need a key.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[MODEL:]NAME=PATH",
    help="A LoRA adapter that clients choose as MODEL:NAME: PEFT's folder or a GGUF file; may be repeated.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free one.")
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A further name that clients may address; may be repeated.",
)
@click.option(
    "--allow-origin", "origins", multiple=True, metavar="URL", help="A web page's origin that may ask; may be repeated."
)
@click.option("--tls-cert", type=FILE, help="Certificate in PEM, its chain behind it: HTTPS.")
@click.option("--tls-key", type=FILE, help="Its private key in PEM.")
@click.option("--tls-self-signed", is_flag=True, help="HTTPS with a certificate of this machine's own authority.")
@click.option("--memory", type=click.FloatRange(0, min_open=True), metavar="GB", help="For open models together.")
@kv_memory_option
@click.option("--max-running", type=click.IntRange(1, 512), default=64, show_default=True, help="Requests at once.")
@click.option("--max-waiting", type=click.IntRange(0), default=256, show_default=True, help="Requests that wait.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Longest that a request may take [default: any time].",
)
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="For answers under way when stopped.",
)
@click.option(
    "--log",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="A line per request on stderr, never its text.",
)
@context_option
@executor_options
@speculate_option
@engine_options
@click.pass_context
def command(
    call: click.Context,
    /,
    models: tuple[str, ...],
    adapters: tuple[str, ...],
    host: str,
    port: int,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_self_signed: bool,
    memory: float | None,
    kv_memory: float,
    max_running: int,
    max_waiting: int,
    timeout: float | None,
    grace: float,
    log: Literal["text", "json"],
    engine: Literal["dapji", "vllm"],
    vllm_command: str,
    vllm_url: str | None,
    context: int | None,
    **values: Any,
) -> None:
    """Answer over HTTP, in the protocols of OpenAI, Anthropic and Ollama, with these models.

    MODEL is a name of `dapji list`, or a path; the first is the default. Without any: all that are
    installed. A model is opened when it is first asked for; --memory bounds what is open at once.

    Only this machine may ask, unless --host is given. Clients need a key as soon as there is one
    (`dapji key`). GET /metrics is for Prometheus.

    With --engine vllm a vLLM server computes the tokens of one model, a folder of safetensors: one that
    is started, and ends with this one, or one that runs already.

    \b
    Examples:
      dapji serve smollm2-135m
      dapji serve qwen2.5-coder-0.5b ./model.gguf --memory 4
      curl localhost:8410/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'
      dapji serve smollm2-135m --adapter support=./support --adapter legal=./legal.gguf
      dapji key add me && dapji serve --host 0.0.0.0 --allow-host llm.example.org \\
        --tls-cert cert.pem --tls-key key.pem
      dapji key add me && dapji serve --host 192.168.1.5 --tls-self-signed
      dapji serve --log json --timeout 600 2>> requests.jsonl
      dapji serve ./model --engine vllm --vllm-command "vllm serve --tensor-parallel-size 4"

    \b
    Stop with Ctrl-C or SIGTERM: answers under way are finished, a second one ends them.
    Exit codes: 0 stopped, 1 failed, 2 wrong usage.
    """
    check_engine_options(call)
    with extra_installed():
        from dapji.server.app import create_app
        from dapji.server.listener import Listener, bind

        if tls_self_signed:
            from dapji.server.authority import Authority
    from dapji.files import open_files
    from dapji.model import load
    from dapji.server import keys
    from dapji.server.log import configure
    from dapji.server.registry import Registry
    from dapji.server.settings import Settings
    from dapji.weights import store

    names = models or [record.name for record in store.installed()]
    if not names:
        raise UsageError("no model is installed", hint=f"dapji pull {DEFAULT_MODEL}")
    if tls_self_signed and (tls_cert or tls_key):
        raise UsageError("--tls-self-signed makes the certificate that --tls-cert would be: give one of them")
    tls = _tls(tls_cert, tls_key)
    known = keys.Keys(keys.path())
    if not _is_loopback(host):
        if all(key.revoked for key in known.all()):
            raise UsageError(
                f"--host {host} is reachable from other machines, and there is no key that they would need",
                hint="dapji key add NAME, then give the key that it prints to your clients",
            )
        if tls is None and not tls_self_signed:
            click.echo(
                "without HTTPS (--tls-cert, --tls-self-signed), keys and texts cross the network unencrypted", err=True
            )
    settings = Settings(
        max_running=max_running,
        max_waiting=max_waiting,
        timeout=timeout,
        grace=grace,
        hosts=(*Settings.hosts, *_own_name(host), *map(_host, hosts)),
        origins=tuple(map(_origin, origins)),
    )
    kv_bytes = round(kv_memory * 1e9)
    opened: Callable[[Path], Model] = partial(
        load, context=context, kv_memory=kv_bytes, max_running=max_running, **values
    )
    renew = None
    if tls_self_signed:
        authority = Authority(settings.folder / "tls", settings.hosts)
        authority.renew()
        tls, renew = (authority.certificate, authority.certificate), authority.renew
    with ExitStack() as held:
        process = None
        if engine == "vllm":
            bind(host, port).close()  # what is wrong with it shows before vLLM takes its minutes
            model, process = held.enter_context(model_on_vllm(names, vllm_command, vllm_url, context=context))
            opened, kv_bytes = lambda path: model, 0
        registry = Registry(
            names,
            load=opened,
            memory=None if memory is None else round(memory * 1e9),
            kv_memory=kv_bytes,
            context=context,
            adapters=[_adapter(text, names) for text in adapters],
            stays=engine == "vllm",
        )
        for served in registry.models.values():  # now, and not when the first client asks
            if served.parent is not None:
                open_files(served.parent.path).adapter(served.path)
        listening = bind(host, port)
        configure(log)
        click.echo(f"models: {', '.join(registry.models)}", err=True)
        if tls_self_signed:
            click.echo(
                f"clients trust the authority {authority.path}: curl --cacert FILE, SSL_CERT_FILE=FILE for Python, "
                "NODE_EXTRA_CA_CERTS=FILE for Node",
                err=True,
            )
        address = f"[{host}]" if ":" in host else host
        url = f"{'https' if tls else 'http'}://{address}:{listening.getsockname()[1]}"
        click.echo(f"to chat, open {url}/ in a browser", err=True)
        click.echo(f"listening on {url}", err=True)
        listener = Listener(create_app(registry, settings, keys=known), tls=tls, renew=renew)
        failures: list[DapjiError] = []

        def fail(error: DapjiError) -> None:
            failures.append(error)
            listener.stop()

        if process is not None:
            process.watch(fail)
        listener.run([listening])
    if failures:
        raise failures[0]


def _adapter(text: str, models: Sequence[str]) -> tuple[str, str, Path]:
    """Name of its model, its own and its path."""
    from dapji.server.registry import name_of

    match = re.fullmatch(r"(?:([^=]+):)?([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", text)
    if match is None:
        raise UsageError(f"--adapter {text!r} is not [MODEL:]NAME=PATH", hint="--adapter support=./my-adapter")
    model, name, path = match.groups()
    if model is None and len(models) > 1:
        raise UsageError(
            f"--adapter {text!r} does not say for which model", hint=f"--adapter {name_of(models[0])}:{name}={path}"
        )
    if not Path(path).expanduser().exists():
        raise ModelNotFound(f"{path}: no such file or folder")
    return model or name_of(models[0]), name, Path(path).expanduser()


@contextmanager
def extra_installed() -> Iterator[None]:
    """Around imports that need the extra `serve`. Raises UnavailableError where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise UnavailableError(f"{error.name} is not installed", hint="pip install 'dapji[serve]'") from error


def _tls(cert: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    """Raises UsageError where they do not belong together."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise UsageError("--tls-cert and --tls-key are given together", hint=SELF_SIGNED)
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UsageError(f"{cert} and {key} are no certificate and its key: {reason}", hint=SELF_SIGNED) from error
    return cert, key


def _no_password() -> str:
    raise ValueError("the key is encrypted, and there is nobody to ask for its password")


def _host(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]", name):
        raise UsageError(
            f"--allow-host {name!r} is no name or address", hint="llm.example.org, 192.168.1.5 or [fd00::5]"
        )
    return name.lower()


def _own_name(host: str) -> list[str]:
    """What a client that uses the address itself calls us; none for an address that stands for all."""
    if host in ("0.0.0.0", "::"):
        return []
    return [f"[{host}]" if ":" in host else host.lower()]


def _origin(url: str) -> str:
    """As browsers write it (RFC 6454)."""
    try:
        parts = urlsplit(url)
        plain = url == f"{parts.scheme}://{parts.netloc}" and not re.search(r"[*@\s]", url) and parts.port != 0
        right = plain and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        right = False
    if not right:
        raise UsageError(
            f"--allow-origin {url!r} is no origin", hint="https://chat.example.org, or with a port, without a path"
        )
    return url.lower()


def _is_loopback(host: str) -> bool:
    from ipaddress import ip_address

    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
