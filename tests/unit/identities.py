# SPDX-License-Identifier: Apache-2.0
"""Keys and certificates for tests, the same in every run."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from proto import entries
from proto.identity import peer_id


@dataclass(frozen=True)
class Known:
    """A key whose holder the test plays."""

    id: str
    key: Ed25519PrivateKey
    certificate: bytes

    def member(self, name: str, token: str = "") -> entries.Member:
        return entries.Member(
            id=self.id, name=name, address="127.0.0.1:1", certificate=self.certificate, token=token
        )


@cache
def known(label: str) -> Known:
    """The key that belongs to `label`."""
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(label.encode()).digest())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, label)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC))
        .sign(key, algorithm=None)
    )
    return Known(peer_id(key.public_key().public_bytes_raw()), key, certificate.public_bytes(Encoding.DER))
