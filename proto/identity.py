# SPDX-License-Identifier: Apache-2.0
"""Who somebody is, as far as it can be said from bytes: keys, certificates, ids, signatures.

There is no certificate authority. A peer, or a user, *is* an Ed25519 key; its certificate is signed by
itself and only dresses the key for TLS. The id is the first 16 hex digits of SHA-256 of the public key.
Making keys needs randomness and is the business of `mobid` and `mobictl`; here they are only read and
checked.
"""

from __future__ import annotations

import hashlib

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

MAX_CERTIFICATE = 2048


class IdentityError(ValueError):
    """A certificate that is none, or not of the kind used here. Carries a sentence."""


def peer_id(key: bytes) -> str:
    """The id that belongs to a raw 32-byte Ed25519 public key."""
    return hashlib.sha256(key).hexdigest()[:16]


def public_key(certificate: bytes) -> bytes:
    """The raw public key in a DER certificate that its own key signed; raises `IdentityError`."""
    if len(certificate) > MAX_CERTIFICATE:
        raise IdentityError(f"it has {len(certificate)} bytes, more than {MAX_CERTIFICATE}")
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise IdentityError("its key is not Ed25519")
        parsed.verify_directly_issued_by(parsed)
    except IdentityError:
        raise
    except (ValueError, TypeError, InvalidSignature):
        raise IdentityError("it is no certificate signed by its own key") from None
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def verify(certificate: bytes, signature: bytes, text: bytes) -> bool:
    """Whether `signature` over `text` was made with the key of this certificate."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key(certificate)).verify(signature, text)
    except (IdentityError, InvalidSignature):
        return False
    return True
