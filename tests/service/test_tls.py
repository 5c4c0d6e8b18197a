"""TLS at the gRPC port with real handshakes: who connects, who a certificate stands for, and reload under streams."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from certificates import Authority, Pair
from tokenwire.client import AsyncClient, TokenwireRpcError, channel_credentials
from tokenwire.rpc.credentials import server_credentials
from tokenwire.security.guard import Guard
from tokenwire.security.key_file import write_keys
from tokenwire.security.keys import CertificateRecord, KeyRing, create_key
from tokenwire.security.principal import Quota, Scope
from tokenwire.security.tls import CertificateSource, TlsError, TlsFiles
from tokenwire.v1 import inference_pb2 as pb

Request = Callable[..., pb.ExecuteRequest]

ALICE = (x509.UniformResourceIdentifier("spiffe://example.org/alice"), x509.DNSName("alice.example.org"))
BOB = (x509.DNSName("bob.example.org"),)


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Secured:
    """A worker's port with TLS, and clients of it."""

    def __init__(self, worker: Any, ca: Authority, source: CertificateSource, port: int) -> None:
        self.worker = worker
        self.ca = ca
        self.source = source
        self.port = port
        self.clients: list[AsyncClient] = []

    def client(self, pair: Pair | None = None, ca: Path | None = None, **options: Any) -> AsyncClient:
        credentials = channel_credentials(ca or self.ca.cert, pair.cert if pair else None, pair.key if pair else None)
        client = AsyncClient(
            f"localhost:{self.port}",
            credentials=credentials,
            timeout_s=20,
            options=(("grpc.use_local_subchannel_pool", 1),),
            **options,
        )
        self.clients.append(client)
        return client


Secure = Callable[..., Any]


@pytest.fixture
async def secure(start_worker: Any, ca: Authority) -> Any:
    made: list[Secured] = []

    async def start(guard: Guard | None = None, *, client_ca: Path | None = None) -> Secured:
        pair = ca.issue("server")
        source = CertificateSource(TlsFiles(pair.cert, pair.key, client_ca))
        ports = []

        def listen(server: grpc.aio.Server) -> int:
            ports.append(server.add_secure_port("127.0.0.1:0", server_credentials(source)))
            return int(ports[0])

        worker = await start_worker(guard=guard, listen=listen)
        worker.fake.eager = True
        made.append(Secured(worker, ca, source, ports[0]))
        return made[-1]

    yield start
    for secured in made:
        for client in secured.clients:
            await client.close()


async def refusal(client: AsyncClient, **params: Any) -> TokenwireRpcError:
    with pytest.raises(TokenwireRpcError) as caught:
        await client.generate("Hello", **params)
    return caught.value


async def test_a_client_that_trusts_the_root_gets_its_stream(secure: Secure) -> None:
    secured = await secure()
    assert (await secured.client().generate("Hello")).text == "Hello world!"


async def test_a_client_that_trusts_another_root_does_not_talk(secure: Secure, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    secured = await secure()
    error = await refusal(secured.client(ca=Authority(folder, "other").cert))
    assert error.status is grpc.StatusCode.UNAVAILABLE
    assert secured.worker.fake.jobs == []


async def test_plain_text_is_not_understood(secure: Secure) -> None:
    secured = await secure()
    async with AsyncClient(f"127.0.0.1:{secured.port}", timeout_s=20) as client:
        assert (await refusal(client)).status is grpc.StatusCode.UNAVAILABLE


async def test_without_a_client_certificate_there_is_no_connection(secure: Secure, ca: Authority) -> None:
    secured = await secure(Guard(client_certificates=True), client_ca=ca.cert)
    assert (await refusal(secured.client())).status is grpc.StatusCode.UNAVAILABLE
    health = secured.client()
    with pytest.raises(TokenwireRpcError):
        await health.health()


async def test_a_certificate_of_another_root_is_refused(secure: Secure, ca: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    secured = await secure(Guard(client_certificates=True), client_ca=ca.cert)
    assert (await refusal(secured.client(Authority(folder, "other").issue("eve", ALICE)))).status is (
        grpc.StatusCode.UNAVAILABLE
    )
    expired = ca.issue("late", ALICE, valid_days=(-2, -1))
    assert (await refusal(secured.client(expired))).status is grpc.StatusCode.UNAVAILABLE


async def test_certificates_are_principals_with_jobs_and_prompts_of_their_own(secure: Secure, ca: Authority) -> None:
    secured = await secure(Guard(client_certificates=True), client_ca=ca.cert)
    secured.worker.fake.eager = False
    alice, bob = secured.client(ca.issue("alice", ALICE)), secured.client(ca.issue("bob", BOB))
    hers, his = alice.execute("Hello", job_id="same"), bob.execute("Hello", job_id="same")
    for stream in (hers, his):
        await stream.__anext__()
    assert (await alice.cancel("same")).outcome == "cancelled"
    secured.worker.fake.step(3)
    assert [type(event).__name__ async for event in his][-1] == "End"
    with pytest.raises(TokenwireRpcError, match="CANCELLED"):
        [event async for event in hers]
    salts = {job.spec["cache_salt"] for job in secured.worker.fake.jobs}
    assert len(salts) == 2
    assert b"" not in salts
    # A renewed certificate of the same name is the same principal.
    secured.worker.fake.eager = True
    await secured.client(ca.issue("alice", ALICE, file="alice-2")).generate("Hello")
    assert secured.worker.fake.jobs[-1].spec["cache_salt"] in salts


async def test_certificates_may_cancel_but_not_administrate_and_each_has_its_rate(
    secure: Secure, ca: Authority
) -> None:
    guard = Guard(client_certificates=True, each=Quota(requests_per_minute=1))
    secured = await secure(guard, client_ca=ca.cert)
    alice, bob = secured.client(ca.issue("alice", ALICE)), secured.client(ca.issue("bob", BOB))
    await alice.generate("Hello")
    error = await refusal(alice)
    assert (error.code, error.metadata["quota"]) == ("OVERLOADED", "requests_per_minute")
    assert error.retry_after_s is not None
    await bob.generate("Hello")
    assert (await alice.cancel("x")).outcome == "not_found"


async def test_a_list_of_certificates_admits_no_others_and_its_scopes_hold(
    secure: Secure, ca: Authority, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    listed = CertificateRecord(identity="uri:spiffe://example.org/alice", scopes=(Scope.CANCEL,), tenant="acme")
    new = create_key("k", [Scope.EXECUTE], tenant="acme")
    write_keys(path, KeyRing([new.record], [listed]))
    guard = Guard(path, client_certificates=True)
    secured = await secure(guard, client_ca=ca.cert)
    alice, bob = ca.issue("alice", ALICE), ca.issue("bob", BOB)
    assert (await refusal(secured.client(alice))).code == "PERMISSION_DENIED"
    assert (await refusal(secured.client(bob))).code == "UNAUTHENTICATED"
    # A key speaks for itself, whatever the certificate; a wrong one is refused in spite of a good certificate.
    await secured.client(bob, api_key=new.text).generate("Hello")
    wrong = secured.client(alice, api_key=create_key("x").text)
    assert (await refusal(wrong)).code == "UNAUTHENTICATED"
    # Taken off the list, it is refused from the reload on.
    write_keys(path, KeyRing([new.record], [listed.model_copy(update={"identity": "dns:bob.example.org"})]))
    guard.reload()
    assert (await refusal(secured.client(alice))).code == "UNAUTHENTICATED"


async def test_a_certificate_without_a_usable_name_is_nobody(secure: Secure, ca: Authority) -> None:
    secured = await secure(Guard(client_certificates=True), client_ca=ca.cert)
    nameless = ca.issue("nameless", (), common_name="Two Words")
    assert (await refusal(secured.client(nameless))).code == "UNAUTHENTICATED"
    named = ca.issue("named", (), common_name="one-word")
    await secured.client(named).generate("Hello")


async def test_a_reload_changes_new_handshakes_and_drops_no_stream(
    secure: Secure, ca: Authority, tmp_path: Path
) -> None:
    """SIGHUP's work at the port: the certificate and the client roots are both replaced while a stream runs."""
    folder = tmp_path / "other"
    folder.mkdir()
    other = Authority(folder, "other")
    roots = tmp_path / "roots.pem"
    shutil.copy(ca.cert, roots)
    secured = await secure(Guard(client_certificates=True), client_ca=roots)
    secured.worker.fake.eager = False
    alice = ca.issue("alice", ALICE)
    client = secured.client(alice)
    stream = client.execute("Hello")
    await stream.__anext__()

    new = other.issue("new")
    shutil.copy(new.cert, secured.source.files.cert)
    shutil.copy(new.key, secured.source.files.key)
    shutil.copy(other.cert, roots)
    assert secured.source.reload()
    secured.worker.fake.step(3)
    assert [type(event).__name__ async for event in stream][-1] == "End"

    secured.worker.fake.eager = True
    await client.generate("Hello")  # on the connection that is open
    bob = other.issue("bob", BOB)
    await secured.client(bob, ca=other.cert).generate("Hello")
    for late in (secured.client(bob), secured.client(alice, ca=other.cert)):
        assert (await refusal(late)).status is grpc.StatusCode.UNAVAILABLE

    # A bad file changes nothing.
    secured.source.files.key.write_bytes(b"")
    with pytest.raises(TlsError):
        secured.source.reload()
    await secured.client(bob, ca=other.cert).generate("Hello")


async def test_slow_handshakes_hold_nobody_up(secure: Secure) -> None:
    secured = await secure()
    idle = [await asyncio.open_connection("127.0.0.1", secured.port) for _ in range(50)]
    assert (await asyncio.wait_for(secured.client().generate("Hello"), 20)).text == "Hello world!"
    for _, writer in idle:
        writer.close()
