"""Certificates, judged by OpenSSL."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from server_running import Running

from dapji.server import authority as authority_module
from dapji.server import listener
from dapji.server.authority import Authority
from dapji.server.registry import Registry
from dapji.server.settings import Settings

NAMES = ("localhost", "127.0.0.1", "[::1]", "llm.example.org")


def verify(made: Authority, name: str, trusted: Path) -> None:
    """A handshake in memory, as a client that knows the server as `name`. Raises ssl.SSLError."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(trusted))
    server.load_cert_chain(made.certificate)
    there, here = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(here, there, server_hostname=name), server.wrap_bio(there, here, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_clients_that_trust_the_authority_believe_its_names_and_no_others(tmp_path: Path) -> None:
    made = Authority(tmp_path / "tls", NAMES)
    assert made.renew()
    for name in ("localhost", "127.0.0.1", "::1", "llm.example.org"):
        verify(made, name, made.path)
    for name in ("example.org", "127.0.0.2"):
        with pytest.raises(ssl.SSLError, match=r"mismatch|not valid for"):
            verify(made, name, made.path)
    other = Authority(tmp_path / "other", NAMES)
    other.renew()
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        verify(made, "localhost", other.path)
    for path in (tmp_path / "tls").iterdir():
        assert path.stat().st_mode & 0o077 == 0 or path.name == "lock"
    assert (tmp_path / "tls").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("stranger", ["bank.example", "10.0.0.1"])
def test_a_stolen_authority_can_pose_as_nobody_else(
    tmp_path: Path, stranger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Authority(tmp_path, NAMES).renew()
    thief = Authority(tmp_path, [stranger])
    found = (tmp_path / "authority.pem").read_bytes(), (tmp_path / "authority-key.pem").read_bytes()
    key = authority_module.serialization.load_pem_private_key(found[1], None)
    monkeypatch.setattr(thief, "_authority", lambda: (x509.load_pem_x509_certificate(found[0]), key))
    assert thief.renew()
    with pytest.raises(ssl.SSLError, match="permitted subtree violation"):
        verify(thief, stranger, thief.path)


def test_what_is_made_again_and_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(names: Iterable[str]) -> tuple[bool, bytes, bytes]:
        made = Authority(tmp_path, names)
        new = made.renew()
        return new, made.path.read_bytes(), made.certificate.read_bytes()

    _, authority, certificate = files(NAMES)
    assert files(NAMES) == (False, authority, certificate)
    new, same, _ = files(NAMES[:3])
    assert (new, same) == (True, authority), "what is permitted need not be used"
    assert files(NAMES)[:2] == (True, authority)
    new, other, _ = files((*NAMES, "new.example.org"))
    assert (new, other != authority) == (True, True)
    verify(Authority(tmp_path, ()), "new.example.org", tmp_path / "authority.pem")

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(days=370)

    monkeypatch.setattr(authority_module, "datetime", Later)
    new, same, _ = files((*NAMES, "new.example.org"))
    assert (new, same) == (True, other), "the certificate nears its end, the authority does not"
    (tmp_path / "server.pem").write_text("broken")
    assert files((*NAMES, "new.example.org"))[0]
    (tmp_path / "authority-key.pem").write_text("broken")
    assert files((*NAMES, "new.example.org"))[1] != other


def test_a_running_server_takes_a_certificate_that_was_renewed(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "TICKS", 1)
    made = Authority(tmp_path / "tls", NAMES)
    made.renew()
    registry = Registry(models, load=lambda path: pytest.fail("no model is asked"), memory=None)
    server = Running(registry, Settings(folder=tmp_path), None, tls=(made.certificate,) * 2, renew=made.renew)
    try:
        trusted = ssl.create_default_context(cafile=str(made.path))

        def serial() -> int:
            with httpx.Client(verify=trusted) as client, client.stream("GET", f"{server.url}/health") as answer:
                end = answer.extensions["network_stream"].get_extra_info("ssl_object")
                return x509.load_der_x509_certificate(end.getpeercert(True)).serial_number

        first = serial()
        assert serial() == first
        made.certificate.unlink()
        end = time.monotonic() + 10
        while serial() == first:
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        server.stop()
