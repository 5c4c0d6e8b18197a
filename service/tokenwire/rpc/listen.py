"""Taking a port, with a cause where that fails."""

from __future__ import annotations

import errno
import socket

import grpc


class CannotBindError(Exception):
    """An address cannot be listened on. `str()` is one line for a person."""


def bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
    """Makes the server listen; returns the port, which differs from `port` if that is 0.

    Args:
        credentials: for TLS; None is plain text.

    Raises:
        CannotBindError: the address is in use, or not this machine's.
    """
    shown = shown_address(host, port)
    try:
        _require_free(host.strip("[]"), port)
        if credentials is not None:
            return int(server.add_secure_port(shown, credentials))
        return int(server.add_insecure_port(shown))
    except OSError as error:
        raise CannotBindError(f"cannot listen on {shown}: {error.strerror}") from error
    except RuntimeError as error:
        raise CannotBindError(f"cannot listen on {shown}") from error


def shown_address(host: str, port: int) -> str:
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`, at one port: for a server that is not gRPC's.

    Raises:
        CannotBindError: an address is in use, or none is this machine's.
    """
    sockets: list[socket.socket] = []
    try:
        sockets = _bind_all(host.strip("[]"), port)
        for each in sockets:
            each.listen()
    except OSError as error:  # also of listen: another process may have bound the port at the same moment
        for each in sockets:
            each.close()
        raise CannotBindError(f"cannot listen on {shown_address(host, port)}: {error.strerror}") from error
    return sockets


def _require_free(host: str, port: int) -> None:
    """Binds and lets go: gRPC's own failure to bind has no cause and prints lines that are not ours.

    Raises:
        OSError: an address is in use, or none of `host` can be bound.
    """
    for each in _bind_all(host, port):
        each.close()


def _bind_all(host: str, port: int) -> list[socket.socket]:
    """A socket bound to each address of `host`, all at the same port, which is a free one if `port` is 0."""
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    # Names that /etc/hosts gives the same address in two lines have it twice.
    found = dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    for family, kind, protocol, _, address in found:
        try:
            sockets.append(_bind_one(family, kind, protocol, (address[0], port, *address[2:])))
        except OSError as error:
            failure = error  # such as an address of a family that this machine has switched off
            if error.errno == errno.EADDRINUSE:
                break
        else:
            port = sockets[-1].getsockname()[1]
    if failure is not None and (failure.errno == errno.EADDRINUSE or not sockets):
        for each in sockets:
            each.close()
        raise failure
    return sockets


def _bind_one(family: int, kind: int, protocol: int, address: tuple[str | int, ...]) -> socket.socket:
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address[0] == "::":  # every address, of both kinds, whatever this machine's default is
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
