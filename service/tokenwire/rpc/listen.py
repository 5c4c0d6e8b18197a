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


def _require_free(host: str, port: int) -> None:
    """Binds and lets go: gRPC's own failure to bind has no cause and prints lines that are not ours.

    Raises:
        OSError: no address of `host` can be bound.
    """
    failure: OSError | None = None
    bound = False
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                bound = True
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
                failure = error  # such as an address of a family that this machine has switched off
    if failure is not None and not bound:
        raise failure
