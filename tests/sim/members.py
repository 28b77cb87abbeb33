# SPDX-License-Identifier: Apache-2.0
"""Peers for simulations: keys and certificates that are the same in every run."""

from __future__ import annotations

import datetime
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from proto.entries import Member
from proto.identity import peer_id

LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


@cache
def member(name: str, seed: int) -> tuple[Member, Ed25519PrivateKey]:
    """A member whose key follows from `seed`."""
    key = Ed25519PrivateKey.from_private_bytes(seed.to_bytes(32, "big"))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(seed)
        .not_valid_before(LONG_AGO)
        .not_valid_after(LONG_AGO + datetime.timedelta(days=36500))
        .sign(key, None)
    )
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    der = certificate.public_bytes(Encoding.DER)
    return Member(id=peer_id(raw), name=name, address="127.0.0.1:1", certificate=der), key
