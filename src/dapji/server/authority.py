"""`Authority`: a certificate authority of this machine's own, which signs for the names of one server and no other.

Its certificate has name constraints (RFC 5280, 4.2.1.10): whoever steals its key can pose as this server only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dapji.weights.store_lock import locked

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 397
"""No longer, as some clients believe in none that lasts longer."""
RENEWED = timedelta(days=30)
"""Before a certificate's end."""
_MARGIN = timedelta(hours=1)
"""For clients whose clocks are late."""


class Authority:
    """Files in a folder that its owner alone can enter. Several processes may use it."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """names: of the server, as hosts in URLs."""
        self.path = folder / "authority.pem"
        """What clients trust."""
        self.certificate = folder / "server.pem"
        """The server's, and its key."""
        self._folder = folder
        self._key = folder / "authority-key.pem"
        plain = sorted({name.strip("[]") for name in names})
        self._names: list[x509.GeneralName] = [_general(name) for name in plain]

    def renew(self) -> bool:
        """Makes what is missing, near its end, or for other names; whether the server's certificate is new."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self._folder / "lock", lambda: None):
            authority = self._authority()
            if authority is None:
                authority = self._make_authority()
            return self._sign(*authority)

    def _authority(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None:
        """None: there is none that can sign for these names."""
        try:
            made = x509.load_pem_x509_certificate(self.path.read_bytes())
            key = serialization.load_pem_private_key(self._key.read_bytes(), None)
            permitted = made.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees or []
        except (FileNotFoundError, ValueError, x509.ExtensionNotFound):
            return None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or made.public_key() != key.public_key():
            return None
        return (made, key) if _lasts(made) and all(_subtree(name) in permitted for name in self._names) else None

    def _make_authority(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Dapji, an authority of this machine")])
        made = (
            _begun(name, name, key, AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.NameConstraints([_subtree(name) for name in self._names], None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        self._write(self._key, _private(key))
        self._write(self.path, made.public_bytes(serialization.Encoding.PEM))
        return made, key

    def _sign(self, authority: x509.Certificate, signing: ec.EllipticCurvePrivateKey) -> bool:
        if self._is_good(authority):
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Dapji")])
        made = (
            _begun(name, authority.subject, key, CERTIFICATE_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(self._names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),  # type: ignore[arg-type]
                critical=False,
            )
            .sign(signing, hashes.SHA256())
        )
        self._write(self.certificate, made.public_bytes(serialization.Encoding.PEM) + _private(key))
        return True

    def _is_good(self, authority: x509.Certificate) -> bool:
        try:
            found = x509.load_pem_x509_certificate(self.certificate.read_bytes())
            found.verify_directly_issued_by(authority)
            named = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (FileNotFoundError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return False
        return _lasts(found) and list(named) == self._names

    def _write(self, path: Path, data: bytes) -> None:
        """Whole or not at all, for its owner alone."""
        fd, made = tempfile.mkstemp(dir=self._folder)  # which gives mode 0600
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        Path(made).replace(path)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _subtree(name: x509.GeneralName) -> x509.GeneralName:
    """What a constraint calls it: an address is a network of one."""
    return x509.IPAddress(ip_network(name.value)) if isinstance(name, x509.IPAddress) else name


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _MARGIN)
        .not_valid_after(now + timedelta(days=days) - _MARGIN)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _lasts(certificate: x509.Certificate) -> bool:
    return certificate.not_valid_after_utc - datetime.now(UTC) > RENEWED
