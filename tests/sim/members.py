# SPDX-License-Identifier: Apache-2.0
"""Peers for simulations: keys and certificates that are the same in every run."""

from __future__ import annotations

from functools import cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from proto.entries import Member
from proto.identity import peer_id, self_signed


@cache
def member(name: str, seed: int) -> tuple[Member, Ed25519PrivateKey]:
    """A member whose key follows from `seed`."""
    key = Ed25519PrivateKey.from_private_bytes(seed.to_bytes(32, "big"))
    certificate = self_signed(key, serial=seed)
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    der = certificate.public_bytes(Encoding.DER)
    return Member(id=peer_id(raw), name=name, address="127.0.0.1:1", certificate=der), key
