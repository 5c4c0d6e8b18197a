"""What a client shows to a worker, and what it asks of it: API key, TLS, client certificate."""

from __future__ import annotations

import os
import re
from pathlib import Path

import grpc
from grpc import ChannelCredentials

__all__ = ["ChannelCredentials", "channel_credentials", "key_metadata"]

_HEADER_VALUE = re.compile(r"[!-~]{1,1024}")


def channel_credentials(
    ca: str | os.PathLike[str] | None = None,
    cert: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
) -> ChannelCredentials:
    """Credentials for TLS.

    Args:
        ca: PEM file of the roots that the worker's certificate must lead to; default: gRPC's own list.
        cert, key: PEM files of the client's certificate and its private key, for workers that ask for one.

    Raises:
        ValueError: one of `cert` and `key` without the other.
        OSError: a file cannot be read.
    """
    if (cert is None) != (key is None):
        raise ValueError("a client certificate needs both cert and key")

    def read(path: str | os.PathLike[str] | None) -> bytes | None:
        return None if path is None else Path(path).read_bytes()

    return grpc.ssl_channel_credentials(root_certificates=read(ca), private_key=read(key), certificate_chain=read(cert))


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that shows a key.

    Raises:
        ValueError: the text cannot be a key; it is not repeated.
    """
    if api_key is None:
        return ()
    if not _HEADER_VALUE.fullmatch(api_key):
        raise ValueError("the API key is empty or has characters that no key has")
    return (("authorization", f"Bearer {api_key}"),)
