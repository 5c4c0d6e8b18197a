"""TLS for the gRPC port, with certificates that a reload replaces while streams go on."""

from __future__ import annotations

import grpc

from tokenwire.security.tls import Certificates, CertificateSource


def server_credentials(source: CertificateSource) -> grpc.ServerCredentials:
    """Credentials whose every new handshake uses the certificates in force.

    Clients must show a certificate if the source has a client CA; whether it has one cannot change while it serves.
    """
    given = source.current
    first = _configuration(given)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        # Called by a thread of gRPC's at each handshake; None keeps what was given last.
        nonlocal given
        if source.current is given:
            return None
        given = source.current
        return _configuration(given)

    return grpc.dynamic_ssl_server_credentials(
        first,
        fetch,  # type: ignore[arg-type]  # the stubs leave out None, which means no change
        require_client_authentication=source.files.client_ca is not None,
    )


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.cert)], root_certificates=certificates.client_ca
    )
