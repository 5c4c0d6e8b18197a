"""The settings of HTTP, for `tokenwire.config`: those that worker and gateway share, and those of a gateway apart."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d{1,5})?/?|https?://\[[0-9A-Fa-f:.]+\](:\d{1,5})?/?")


class HttpSettings(BaseModel):
    """Settings of the HTTP gateway, inside the worker (`tokenwire serve`) or on its own (`tokenwire gateway`), and of
    who may call, which gRPC and HTTP share."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    api_keys_file: str = Field("", description="file of API keys, made by `tokenwire keys`; every call then needs one")
    tls_cert_file: str = Field("", description="PEM file with the certificate to serve TLS with, and its chain")
    tls_key_file: str = Field("", description="PEM file with that certificate's private key")
    tls_client_ca_file: str = Field(
        "", description="PEM file with the roots of client certificates; every connection then needs one"
    )

    http_port: int | None = Field(None, ge=0, le=65535, description="HTTP port; 0 takes a free one; default: no HTTP")
    http_allowed_hosts: str = Field(
        "",
        max_length=8192,
        description="host names that clients may use, beside addresses and localhost, with commas between",
    )
    http_allowed_origins: str = Field(
        "",
        max_length=8192,
        description="origins of web pages elsewhere that may call, such as https://app.example, with commas between",
    )
    http_max_body_bytes: int = Field(4 * 2**20, ge=1024, le=2**28, description="largest request body, bytes")
    http_max_header_bytes: int = Field(16384, ge=1024, le=2**20, description="largest request head, bytes")
    http_max_headers: int = Field(100, ge=8, le=10_000, description="most header fields in a request")
    http_max_connections: int = Field(512, ge=1, le=2**20, description="most open HTTP connections")
    http_header_timeout_ms: int = Field(
        10_000, ge=100, le=600_000, description="longest a request's head may take to arrive, milliseconds"
    )
    http_body_timeout_ms: int = Field(
        30_000, ge=100, le=600_000, description="longest a request's body may take to arrive, milliseconds"
    )
    http_keep_alive_ms: int = Field(
        30_000, ge=100, le=3_600_000, description="a connection without requests closes after this long, milliseconds"
    )
    http_heartbeat_ms: int = Field(
        10_000, ge=50, le=600_000, description="a silent stream sends a comment after this long, milliseconds"
    )
    http_stalled_reader_ms: int = Field(
        60_000, ge=100, le=86_400_000, description="a stream that is not read closes after this long, milliseconds"
    )

    def tls_problems(self) -> list[str]:
        """What is wrong with the settings of TLS together."""
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            given, missing = ("cert", "key") if self.tls_cert_file else ("key", "cert")
            return [f"tls_{given}_file: needs tls_{missing}_file beside it"]
        if self.tls_client_ca_file and not self.tls_cert_file:
            return ["tls_client_ca_file: needs tls_cert_file and tls_key_file beside it"]
        return []

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """Lower-case host names."""
        return frozenset(_listed(self.http_allowed_hosts.lower()))

    @property
    def allowed_origins(self) -> frozenset[str]:
        """Lower-case origins, without a slash at the end."""
        return frozenset(origin.rstrip("/") for origin in _listed(self.http_allowed_origins.lower()))

    @field_validator("http_allowed_origins")
    @classmethod
    def _origins(cls, text: str) -> str:
        for origin in _listed(text):
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin: give scheme://host or scheme://host:port")
        return text


class GatewaySettings(HttpSettings):
    """Settings of a gateway that runs apart from its workers."""

    http_port: int | None = Field(8080, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    target: str = Field(
        "127.0.0.1:50051",
        min_length=1,
        max_length=8192,
        description="gRPC addresses of the workers, with commas between; dns:HOST:PORT stands for all of a host's",
    )
    host: str = Field("127.0.0.1", min_length=1, max_length=253, description="address to listen on")
    allow_remote: bool = Field(
        False,
        description="listen on other than loopback addresses; needs API keys, client certificates or workers_ask_keys",
    )
    workers_ask_keys: bool = Field(
        False, description="the workers ask for API keys, which this gateway passes on without looking at them"
    )
    target_tls: bool = Field(False, description="speak TLS to the workers; target_ca_file, target_cert_file imply it")
    target_ca_file: str = Field("", description="PEM file with the roots of the workers' certificates")
    target_cert_file: str = Field("", description="PEM file with the certificate to show to the workers")
    target_key_file: str = Field("", description="PEM file with that certificate's private key")
    drain_seconds: float = Field(
        30.0, ge=0, le=3600, description="how long running requests may finish at shutdown, seconds"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity that is logged")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="json, console, or auto: console on a terminal, json elsewhere"
    )

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(_listed(self.target))

    @model_validator(mode="after")
    def _consistent(self) -> GatewaySettings:
        problems = []
        if not self.allow_remote and not is_loopback(self.host):
            problems.append(f"host: {self.host!r} is not a loopback address, which needs allow_remote")
        if self.allow_remote and not (self.api_keys_file or self.tls_client_ca_file or self.workers_ask_keys):
            needs = "API keys (api_keys_file), client certificates (tls_client_ca_file) or workers_ask_keys"
            problems.append(f"allow_remote: needs {needs}")
        if bool(self.target_cert_file) != bool(self.target_key_file):
            problems.append("target_cert_file and target_key_file belong together")
        problems += self.tls_problems()
        if not self.targets:
            problems.append("target: names no worker")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]
