"""Certificates: whether files have any, and a server's, which are read again when they change."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from pathlib import Path

import grpc

log = logging.getLogger("nuwa.runtime")


def check_pair(chain: Path, key: Path) -> None:
    """ValueError or OSError unless these are a certificate and its key, PEM."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key)
    except ssl.SSLError as error:
        raise ValueError(
            f"{chain} and {key} are not a certificate and its key: {error.reason}"
        ) from None


def check_authority(path: Path) -> None:
    """ValueError or OSError unless it has certificates of who signs those of others, PEM."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ValueError(f"{path} has no certificate: {error.reason}") from None


class Certificates:
    """chain and key of the server, and who signs those of clients; PEM.

    ValueError or OSError if they cannot be used together, when they are read first. Changed files
    that cannot be used change nothing, which the log says: while one of the two is new already and
    the other still old, the old ones serve.
    """

    def __init__(self, chain: Path, key: Path, client_ca: Path | None = None) -> None:
        self._chain, self._key, self._client_ca = chain, key, client_ca
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._initial = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """For add_secure_port. Clients must show a certificate if there is a client_ca."""
        return grpc.dynamic_ssl_server_credentials(
            self._initial, self.changed, self._client_ca is not None
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """At each handshake: new certificates, or None to go on with the old ones."""
        with self._lock:
            try:
                stamp = self._look()
                if stamp == self._stamp:
                    return None
                found = self._read()
                self._stamp = stamp
            except (OSError, ValueError) as error:
                log.error("the certificates stay as they were: %s", error)
                return None
            log.info("%s: new certificates", self._chain)
            return found

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        paths = [self._chain, self._key, *([self._client_ca] if self._client_ca else [])]
        found = [os.stat(path) for path in paths]
        return tuple((each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for each in found)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        check_pair(self._chain, self._key)
        authority = None
        if self._client_ca is not None:
            check_authority(self._client_ca)
            authority = self._client_ca.read_bytes()
        pair = (self._key.read_bytes(), self._chain.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], authority)
