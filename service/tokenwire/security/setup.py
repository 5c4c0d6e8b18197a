"""From the settings to the guard and the certificates, and their reload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenwire.config import Settings
from tokenwire.http_config import GatewaySettings, HttpSettings
from tokenwire.observe.logging import get_logger
from tokenwire.security.guard import Guard
from tokenwire.security.key_file import KeyFileError, read_keys
from tokenwire.security.principal import Quota
from tokenwire.security.tls import CertificateSource, TlsError, TlsFiles, read_certificates


@dataclass(frozen=True, slots=True)
class Security:
    """What the ports of one process share.

    Attributes:
        certificates: None: the ports speak plain text.
    """

    guard: Guard
    certificates: CertificateSource | None = None

    def describe(self) -> dict[str, object]:
        """Which doors are locked, for the log."""
        fields: dict[str, object] = {"tls": self.certificates is not None, "open": self.guard.is_open}
        if self.certificates is not None:
            fields["certificate_sha256"] = self.certificates.current.fingerprint
        if not self.guard.is_open:
            fields["keys"] = self.guard.num_keys
        return fields

    def warn_if_plain(self, allow_remote: bool) -> None:
        """Says so where other machines may connect and nothing is encrypted here."""
        if allow_remote and self.certificates is None:
            message = "keys and prompts travel unencrypted unless a proxy or a mesh encrypts them: see tls_cert_file"
            get_logger().warning("plain_text", message=message)

    def reload(self) -> None:
        """Reads keys and certificates anew; a file that is not usable changes nothing and is logged."""
        log = get_logger()
        try:
            ended = self.guard.reload()
            log.info("keys_reloaded", keys=self.guard.num_keys, calls_ended=ended)
        except KeyFileError as error:
            log.error("reload_failed", what="keys", problems=list(error.problems))
        if self.certificates is None:
            return
        try:
            changed = self.certificates.reload()
            log.info("certificates_reloaded", changed=changed, sha256=self.certificates.current.fingerprint)
        except TlsError as error:
            log.error("reload_failed", what="certificates", problems=list(error.problems))


def build_security(settings: Settings) -> Security:
    """
    Raises:
        KeyFileError, TlsError: a file is not usable.
    """
    guard = Guard(
        Path(settings.api_keys_file) if settings.api_keys_file else None,
        client_certificates=bool(settings.tls_client_ca_file),
        each=Quota(settings.requests_per_minute, settings.tokens_per_minute, settings.concurrent_requests),
        overall=Quota(
            settings.total_requests_per_minute, settings.total_tokens_per_minute, settings.total_concurrent_requests
        ),
    )
    return Security(guard, _certificates(settings))


def build_gateway_security(settings: GatewaySettings) -> Security:
    """For a gateway apart from its workers, which do the counting.

    Raises:
        KeyFileError, TlsError: a file is not usable.
    """
    guard = Guard(
        Path(settings.api_keys_file) if settings.api_keys_file else None,
        client_certificates=bool(settings.tls_client_ca_file),
    )
    return Security(guard, _certificates(settings))


def _certificates(settings: HttpSettings) -> CertificateSource | None:
    files = _tls_files(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
    return CertificateSource(files) if files is not None else None


def file_problems(values: Mapping[str, object]) -> list[str]:
    """What is wrong with the files that the settings name; settings that are wrong themselves are not looked at."""

    def text(name: str) -> str:
        value = values.get(name)
        return value if isinstance(value, str) else ""

    problems: list[str] = []
    if text("api_keys_file"):
        try:
            read_keys(Path(text("api_keys_file")))
        except KeyFileError as error:
            problems += [f"api_keys_file ({error.path}): {problem}" for problem in error.problems]
    files = _tls_files(text("tls_cert_file"), text("tls_key_file"), text("tls_client_ca_file"))
    if files is not None:
        try:
            read_certificates(files)
        except TlsError as error:
            problems += error.problems
    for name in ("target_ca_file", "target_cert_file", "target_key_file"):
        if text(name):
            try:
                Path(text(name)).read_bytes()
            except OSError as error:
                problems.append(f"{name} ({text(name)}): cannot be read: {error.strerror}")
    return problems


def _tls_files(cert: str, key: str, client_ca: str) -> TlsFiles | None:
    if not (cert and key):
        return None
    return TlsFiles(Path(cert), Path(key), Path(client_ca) if client_ca else None)
