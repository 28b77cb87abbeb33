# SPDX-License-Identifier: Apache-2.0
"""A peer's own key: made once, kept in `identity.pem`, never shown to anybody.

The file holds the private key and the self-signed certificate that dresses it for TLS, mode 0600. The
certificate is valid for as long as certificates can be: trust comes from the catalog naming the key, and ends
when the catalog says so, not on a date.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from mobid.config import write_durably
from proto.api import OperationError
from proto.identity import peer_id, to_pem


class Identity:
    """The key pair of this peer. `id` is what others call it, `certificate` (DER) what they pin."""

    def __init__(self, path: Path, key: Ed25519PrivateKey, certificate: x509.Certificate) -> None:
        self.path = path
        self._key = key
        self.public_key = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.certificate = certificate.public_bytes(Encoding.DER)
        self.id = peer_id(self.public_key)

    def __repr__(self) -> str:
        return f"Identity({self.id})"

    def sign(self, text: bytes) -> bytes:
        """An Ed25519 signature (64 bytes)."""
        return self._key.sign(text)


def load_or_create(path: Path) -> Identity:
    """The identity in `path`, made now if there is none; raises `OperationError` if the file is bad."""
    if not path.exists():
        _create(path)
    try:
        data = path.read_bytes()
        if stat.S_IMODE(path.stat().st_mode) & 0o077 or path.stat().st_uid != os.getuid():
            raise OperationError(
                "forbidden", f"{path} can be read by others, or is not yours", f"chmod 600 {path}"
            )
        key = load_pem_private_key(data, password=None)
        certificate = x509.load_pem_x509_certificate(data)
    except (OSError, ValueError, TypeError) as error:
        raise OperationError(
            "failed",
            f"the identity in {path} cannot be read: {error}",
            "restore the file from a copy; without it this peer must join anew from an empty directory",
        ) from None
    if not isinstance(key, Ed25519PrivateKey) or certificate.public_key() != key.public_key():
        raise OperationError("failed", f"the key and the certificate in {path} do not belong together")
    return Identity(path, key, certificate)


def _create(path: Path) -> None:
    pem = to_pem(Ed25519PrivateKey.generate(), x509.random_serial_number())
    write_durably(path, pem, mode=0o600)
