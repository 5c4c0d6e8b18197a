"""The certificates of the ports: read and checked together, replaced on reload while connections go on.

The checks are a handshake in memory, so that what passes here is what TLS itself accepts: the key belongs to the
certificate, and the certificate is valid today.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

MAX_PEM_BYTES = 2**20


class TlsError(Exception):
    """The files are not usable. `problems` has a line for each thing that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class _EncryptedKeyError(Exception):
    """The private key needs a password."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the PEM files are.

    Attributes:
        cert: the server's certificate, then those between it and its root.
        key: its private key, not encrypted.
        client_ca: roots that client certificates must lead to; None: clients need none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Certificates:
    """The files' contents at one time, checked."""

    cert: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the server's certificate, for logs."""
        der = ssl.PEM_cert_to_DER_cert(_first_certificate(self.cert))
        return hashlib.sha256(der).hexdigest()


def read_certificates(files: TlsFiles) -> Certificates:
    """
    Raises:
        TlsError: with every problem.
    """
    problems: list[str] = []
    cert = _read(files.cert, "tls_cert_file", problems)
    key = _read(files.key, "tls_key_file", problems)
    client_ca = _read(files.client_ca, "tls_client_ca_file", problems) if files.client_ca is not None else None
    if client_ca is not None:
        try:
            _load_roots(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), client_ca)
        except (ssl.SSLError, ValueError):
            problems.append(f"tls_client_ca_file ({files.client_ca}): holds no usable PEM certificate")
    if cert is not None and key is not None:
        certificates = Certificates(cert, key, client_ca)
        problems += _check_pair(files, certificates)
        if not problems:
            return certificates
    raise TlsError(problems)


class CertificateSource:
    """The certificates in force, and their replacement.

    Args:
        files: read now, and at every `reload`.

    Raises:
        TlsError: the files are not usable.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._current = read_certificates(files)
        self._listeners: list[Callable[[Certificates], None]] = []

    @property
    def current(self) -> Certificates:
        return self._current

    def on_change(self, listener: Callable[[Certificates], None]) -> None:
        """Calls `listener` after every reload that read something new."""
        self._listeners.append(listener)

    def reload(self) -> bool:
        """Reads the files anew; whether they changed. New connections get what is read, open ones go on.

        Raises:
            TlsError: the old certificates stay in force.
        """
        certificates = read_certificates(self.files)
        if certificates == self._current:
            return False
        self._current = certificates
        for listener in self._listeners:
            listener(certificates)
        return True


def server_context(source: CertificateSource) -> ssl.SSLContext:
    """A context for Python's own servers, whose every new handshake uses the certificates then in force."""
    current = _context(source.current)

    def renew(certificates: Certificates) -> None:
        nonlocal current
        current = _context(certificates)

    def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = current

    source.on_change(renew)
    outer = _context(source.current)
    outer.sni_callback = choose  # called for every handshake, with or without a name
    return outer


def _context(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, certificates)
    if certificates.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_roots(context, certificates.client_ca)
    return context


def _load_roots(context: ssl.SSLContext, pem: bytes) -> None:
    # Between certificates stands text for people, in any encoding.
    context.load_verify_locations(cadata=pem.decode("ascii", "ignore"))


def _load_pair(context: ssl.SSLContext, certificates: Certificates) -> None:
    # OpenSSL takes a pair from files only. These are in memory: what was checked is what is loaded, also if the real
    # files change meanwhile, and no key is written to a disk.
    with _memory_file(certificates.cert) as cert, _memory_file(certificates.key) as key:
        context.load_cert_chain(f"/proc/self/fd/{cert.fileno()}", f"/proc/self/fd/{key.fileno()}", _no_password)


def _memory_file(data: bytes) -> BinaryIO:
    file = os.fdopen(os.memfd_create("tokenwire"), "r+b")
    file.write(data)
    file.flush()
    return file


def _no_password() -> str:
    raise _EncryptedKeyError


def _read(path: Path, setting: str, problems: list[str]) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        problems.append(f"{setting} ({path}): cannot be read: {error.strerror}")
        return None
    if len(data) > MAX_PEM_BYTES:
        problems.append(f"{setting} ({path}): is larger than {MAX_PEM_BYTES} bytes")
        return None
    return data


def _check_pair(files: TlsFiles, certificates: Certificates) -> list[str]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        _load_pair(server, certificates)
    except _EncryptedKeyError:
        return [f"tls_key_file ({files.key}): is encrypted, and a worker has nobody to ask for a password"]
    except ssl.SSLError as error:
        if "MISMATCH" in str(error.reason):
            return [f"tls_key_file ({files.key}): is not the key of the certificate in {files.cert}"]
        return [f"tls_cert_file ({files.cert}) and tls_key_file ({files.key}): no usable PEM certificate and key"]
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    # The certificate itself is the root: what fails now is its dates, or what it is for.
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=_first_certificate(certificates.cert))
    try:
        _handshake(server, client)
    except ssl.SSLCertVerificationError as error:
        return [f"tls_cert_file ({files.cert}): {error.verify_message}"]
    except ssl.SSLError as error:
        return [f"tls_cert_file ({files.cert}): a handshake with it fails: {error.reason}"]
    return []


def _first_certificate(pem: bytes) -> str:
    text = pem.decode("ascii", "ignore")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    start = text.find(begin)
    return text[start : text.find(end, start) + len(end)] + "\n"


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_side=False),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(20):
        waiting = []
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting.append(end)
        if not waiting:
            return
    raise ssl.SSLError("the handshake does not end")
