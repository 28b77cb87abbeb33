# SPDX-License-Identifier: Apache-2.0
"""TLS 1.3 with pinned keys instead of authorities.

A server accepts a client certificate only if it is, byte for byte, one of those the catalog lists now; a
client without one is let in as a stranger, who may only join or log in. A client accepts exactly the key it
expected. The trust store is a new context for every change of the catalog, since a certificate cannot be
taken out of an old one; session tickets are off, since a resumed session would not look at the store again.

Host names mean nothing here: the key is the name.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Sequence

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mobid.identity import Identity
from proto.api import OperationError
from proto.identity import IdentityError, public_key


def _pem(certificates: Iterable[bytes]) -> str:
    return "".join(
        x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode() for der in certificates
    )


def server_context(
    identity: Identity, trusted: Iterable[bytes], protocols: Sequence[str] = ()
) -> ssl.SSLContext:
    """For incoming connections; `trusted` are the DER certificates of all members and users.

    `protocols` are those besides requests that a client may ask for (ALPN).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    if protocols:
        context.set_alpn_protocols(list(protocols))
    context.load_cert_chain(identity.path)
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trust = _pem(trusted)
    if trust:
        context.load_verify_locations(cadata=trust)
    return context


def client_context(identity: Identity | None, protocol: str = "") -> ssl.SSLContext:
    """For outgoing connections; with `identity` None the caller is a stranger.

    `protocol` says what they are for (ALPN), if it is not requests.

    The context itself accepts any certificate: `check_pinned` must be called after the handshake, which has
    proved that the server holds the key of the certificate it showed.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocol:
        context.set_alpn_protocols([protocol])
    if identity is not None:
        context.load_cert_chain(identity.path)
    return context


def check_pinned(certificate: bytes | None, expected: bytes, where: str) -> None:
    """Raise `OperationError(unauthenticated)` unless `certificate` carries the raw public key `expected`."""
    try:
        shown = public_key(certificate or b"")
    except IdentityError:
        shown = b""
    if shown != expected:
        raise OperationError(
            "unauthenticated",
            f"whoever answers at {where} does not hold the expected key",
            "somebody else listens at that address, or the peer was made anew",
        )
