"""Certificates: what is refused before the worker starts, and a reload that every new handshake sees."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from certificates import Authority, Pair
from tokenwire.config_sources import ConfigError, load_settings
from tokenwire.security.guard import certificate_identity
from tokenwire.security.setup import file_problems
from tokenwire.security.tls import (
    Certificates,
    CertificateSource,
    TlsError,
    TlsFiles,
    read_certificates,
    server_context,
)


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def problems_of(files: TlsFiles) -> list[str]:
    with pytest.raises(TlsError) as caught:
        read_certificates(files)
    assert "PRIVATE KEY" not in str(caught.value)
    return list(caught.value.problems)


def test_a_good_pair_is_taken(ca: Authority) -> None:
    pair = ca.issue("server")
    certificates = read_certificates(TlsFiles(pair.cert, pair.key, ca.cert))
    certificate = x509.load_pem_x509_certificate(pair.cert.read_bytes())
    assert certificates.fingerprint == certificate.fingerprint(hashes.SHA256()).hex()
    assert "PRIVATE" not in repr(certificates)


def test_a_chain_is_taken_with_its_own_certificate_first(ca: Authority) -> None:
    pair = ca.issue("server")
    pair.cert.write_bytes(pair.cert.read_bytes() + ca.cert.read_bytes())
    assert read_certificates(TlsFiles(pair.cert, pair.key)).client_ca is None


@pytest.mark.parametrize(
    ("valid_days", "said"), [((-2, -1), "certificate has expired"), ((1, 2), "certificate is not yet valid")]
)
def test_c4_a_certificate_outside_its_days_is_refused(ca: Authority, valid_days: tuple[int, int], said: str) -> None:
    """C4."""
    pair = ca.issue("server", valid_days=valid_days)
    assert problems_of(TlsFiles(pair.cert, pair.key)) == [f"tls_cert_file ({pair.cert}): {said}"]


def test_c4_the_key_of_another_certificate_is_refused(ca: Authority) -> None:
    pair, other = ca.issue("server"), ca.issue("other")
    [problem] = problems_of(TlsFiles(pair.cert, other.key))
    assert problem.startswith(f"tls_key_file ({other.key}): is not the key")


def test_an_encrypted_key_is_refused_and_nobody_is_asked(ca: Authority) -> None:
    pair = ca.issue("server", password=b"secret")
    [problem] = problems_of(TlsFiles(pair.cert, pair.key))
    assert "is encrypted" in problem


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
@pytest.mark.parametrize("which", ["cert", "key", "client_ca"])
def test_what_is_no_pem_is_refused(ca: Authority, content: bytes, which: str) -> None:
    pair = ca.issue("server")
    path = {"cert": pair.cert, "key": pair.key, "client_ca": ca.cert}[which]
    path.write_bytes(content)
    [problem] = problems_of(TlsFiles(pair.cert, pair.key, ca.cert))
    assert str(path) in problem


def test_all_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    """C4, A-1: exit 78 lists what is wrong with each setting and each file together."""
    missing = {
        name: str(tmp_path / name) for name in ("tls_cert_file", "tls_key_file", "tls_client_ca_file", "api_keys_file")
    }
    with pytest.raises(ConfigError) as caught:
        load_settings({**missing, "port": 70000}, environ={}, check_files=file_problems)
    problems = list(caught.value.problems)
    assert len(problems) == 5
    for name, path in missing.items():
        assert any(f"{name} ({path})" in problem and "No such file" in problem for problem in problems)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tls_cert_file": "x"}, "tls_cert_file: needs tls_key_file"),
        ({"tls_key_file": "x"}, "tls_key_file: needs tls_cert_file"),
        ({"tls_client_ca_file": "x"}, "tls_client_ca_file: needs tls_cert_file"),
    ],
)
def test_tls_settings_that_need_each_other_say_so(flags: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_settings(flags, environ={})


@pytest.mark.parametrize(
    "flags",
    [{"api_keys_file": "x"}, {"tls_cert_file": "x", "tls_key_file": "x", "tls_client_ca_file": "x"}],
)
def test_keys_or_client_certificates_allow_remote(flags: dict[str, str]) -> None:
    assert load_settings({"host": "0.0.0.0", "allow_remote": True, **flags}, environ={}).host == "0.0.0.0"


def test_tls_without_client_certificates_does_not_allow_remote() -> None:
    with pytest.raises(ConfigError, match="allow_remote: needs API keys"):
        load_settings({"host": "0.0.0.0", "allow_remote": True, "tls_cert_file": "x", "tls_key_file": "x"}, environ={})


def install(pair: Pair, place: Pair) -> None:
    shutil.copy(pair.cert, place.cert)
    shutil.copy(pair.key, place.key)


def test_a_reload_that_fails_keeps_what_was(ca: Authority, tmp_path: Path) -> None:
    """P3."""
    place = ca.issue("server")
    source = CertificateSource(TlsFiles(place.cert, place.key))
    seen: list[Certificates] = []
    source.on_change(seen.append)
    before = source.current
    assert not source.reload()
    install(ca.issue("old", valid_days=(-2, -1)), place)
    with pytest.raises(TlsError):
        source.reload()
    assert source.current is before
    assert seen == []
    install(ca.issue("new"), place)
    assert source.reload()
    assert seen == [source.current]
    assert source.current != before


@contextlib.asynccontextmanager
async def echo_server(context: ssl.SSLContext) -> AsyncIterator[int]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(100):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def shake_hands(port: int, root: Authority, client: Pair | None = None) -> asyncio.StreamWriter:
    context = ssl.create_default_context(cafile=str(root.cert))
    if client is not None:
        context.load_cert_chain(client.cert, client.key)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
    writer.write(b"hello")
    assert await asyncio.wait_for(reader.read(5), 20) == b"hello"
    return writer


async def test_new_http_connections_see_a_reload_and_open_ones_go_on(ca: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    other = Authority(folder, "other")
    place = ca.issue("server")
    source = CertificateSource(TlsFiles(place.cert, place.key))
    async with echo_server(server_context(source)) as port:
        first = await shake_hands(port, ca)
        install(other.issue("new"), place)
        assert source.reload()
        with pytest.raises(ssl.SSLCertVerificationError):
            await shake_hands(port, ca)
        second = await shake_hands(port, other)
        first.write(b"still here")
        await first.drain()
        for writer in (first, second):
            writer.close()


async def test_http_client_certificates_are_required_and_their_roots_reload(ca: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    other = Authority(folder, "other")
    place, roots = ca.issue("server"), tmp_path / "roots.pem"
    shutil.copy(ca.cert, roots)
    mine, theirs = ca.issue("mine"), other.issue("theirs")
    source = CertificateSource(TlsFiles(place.cert, place.key, roots))

    async def admitted(client: Pair | None) -> bool:
        try:
            writer = await shake_hands(port, ca, client)
        except (ssl.SSLError, OSError, AssertionError):
            return False
        writer.close()
        return True

    async with echo_server(server_context(source)) as port:
        assert [await admitted(pair) for pair in (None, mine, theirs)] == [False, True, False]
        shutil.copy(other.cert, roots)
        assert source.reload()
        assert [await admitted(pair) for pair in (None, mine, theirs)] == [False, False, True]


async def test_old_tls_is_refused(ca: Authority) -> None:
    pair = ca.issue("server")
    async with echo_server(server_context(CertificateSource(TlsFiles(pair.cert, pair.key)))) as port:
        context = ssl.create_default_context(cafile=str(ca.cert))
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")


def test_reading_leaves_no_file_open(ca: Authority) -> None:
    pair = ca.issue("server")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        read_certificates(TlsFiles(pair.cert, pair.key, ca.cert))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("uris", "dns", "common", "identity"),
    [
        (["spiffe://a/b", "x:y"], ["d"], ["c"], "uri:spiffe://a/b"),
        ([], ["d.example", "e"], ["c"], "dns:d.example"),
        ([], [], ["c"], "cn:c"),
        ([], [], [], None),
        ([""], [], [""], None),
        ([], [], ["Alice Example"], None),
        ([], [], ["a\nb"], None),
        ([], ["é"], [], None),
        ([], ["x" * 257], ["c"], None),
    ],
)
def test_a_certificate_is_known_by_its_first_name(
    uris: list[str], dns: list[str], common: list[str], identity: str | None
) -> None:
    assert certificate_identity(uris, dns, common) == identity
