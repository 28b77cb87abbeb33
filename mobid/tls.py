# SPDX-License-Identifier: Apache-2.0
"""TLS 1.3 with pinned keys instead of authorities.

A server accepts a client certificate only if it is, byte for byte, one of those the catalog lists now; a
client without one is let in as a stranger, who may only join or log in. A client accepts exactly the key it
expected. The trust store is a new context for every change of the catalog, since a certificate cannot be
taken out of an old one; session tickets are off, since a resumed session would not look at the store again.

Host names mean nothing here: the key is the name. The handshake also finds the version of the protocol that
both sides speak (`proto/versions.py`).
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mobid.identity import Identity
from proto import versions, wire
from proto.api import OperationError
from proto.identity import IdentityError, public_key

REFUSAL_TIMEOUT = 2.0


def _pem(certificates: Iterable[bytes]) -> str:
    return "".join(
        x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode() for der in certificates
    )


def server_context(
    identity: Identity, trusted: Iterable[bytes], protocols: Sequence[str] = ()
) -> ssl.SSLContext:
    """For incoming connections; `trusted` are the DER certificates of all members and users.

    `protocols` are those besides requests that a client may ask for (ALPN). Whether one was found is seen
    after the handshake: a client that shares none is told so (`refuse_protocol`).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.set_alpn_protocols([*protocols, *versions.names()])
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
    context.set_alpn_protocols([protocol] if protocol else versions.names())
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


async def check_protocol(stream: trio.SSLStream[trio.SocketStream], where: str) -> None:
    """Raise `OperationError(unsupported)` if the other side speaks no version that this one does."""
    if stream.selected_alpn_protocol() is not None:
        return
    theirs = ""
    with trio.move_on_after(REFUSAL_TIMEOUT), suppress(trio.BrokenResourceError, wire.WireError):
        decoder = wire.Decoder(wire.LIMIT_UNAUTHENTICATED)
        while not theirs and (data := await stream.receive_some(wire.LIMIT_UNAUTHENTICATED)):
            for message in decoder.feed(data):
                theirs = f": {message.error.message}" if isinstance(message, wire.Failure) else ""
    raise OperationError(
        "unsupported",
        f"{where} speaks none of the protocols that this one does ({', '.join(versions.names())}){theirs}",
        "use versions of Mobitopolo that are closer to one another",
    )


async def refuse_protocol(stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Tell a client that shares no version, and close."""
    said = f"it speaks {', '.join(versions.names())}"
    with trio.move_on_after(REFUSAL_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(wire.encode(wire.Failure(0, OperationError("unsupported", said))))
        while await stream.receive_some(wire.LIMIT_UNAUTHENTICATED):
            pass
    await trio.aclose_forcefully(stream)
