# SPDX-License-Identifier: Apache-2.0
"""Who somebody is, as far as it can be said from bytes: keys, certificates, ids, signatures.

There is no certificate authority. A peer, or a user, *is* an Ed25519 key; its certificate is signed by
itself and only dresses the key for TLS. The id is the first 16 hex digits of SHA-256 of the public key.
Keys need randomness: `mobid` and `mobictl` make and keep them; here they are dressed, read and checked.
"""

from __future__ import annotations

import datetime
import hashlib

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

MAX_CERTIFICATE = 2048


class IdentityError(ValueError):
    """A certificate that is none, or not of the kind used here. Carries a sentence."""


def peer_id(key: bytes) -> str:
    """The id that belongs to a raw 32-byte Ed25519 public key."""
    return hashlib.sha256(key).hexdigest()[:16]


def self_signed(key: Ed25519PrivateKey, serial: int) -> x509.Certificate:
    """The certificate that dresses a key for TLS, valid as long as one can be; `serial` > 0 is for show."""
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer_id(raw))])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, algorithm=None)
    )


def to_pem(key: Ed25519PrivateKey, serial: int) -> bytes:
    """A private key and its certificate, PEM, as `identity.pem` holds them."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem + self_signed(key, serial).public_bytes(Encoding.PEM)


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
