# SPDX-License-Identifier: Apache-2.0
"""Keys and certificates for tests, the same in every run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from proto import entries
from proto.identity import peer_id, self_signed


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
    certificate = self_signed(key, serial=1)
    return Known(peer_id(key.public_key().public_bytes_raw()), key, certificate.public_bytes(Encoding.DER))
