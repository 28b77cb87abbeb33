# SPDX-License-Identifier: Apache-2.0
"""Tokens: one line of text that lets a new peer or user in, and tells it whom to trust.

A token is copied by hand from one screen to another, so it is plain ASCII with a checksum: a truncated or
altered one is told apart from a wrong one before anything is sent. It carries the mesh's id, where to
knock, the public keys that must answer there (so the newcomer cannot be lured elsewhere), and a secret. The
catalog keeps only a hash of the secret, with uses and expiry; those decide, the expiry inside is only a
courtesy.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass
from typing import Any

from proto import wire
from proto.api import OperationError

PREFIX = "mobi1-"
SECRET_SIZE = 20
_CHECKSUM = 6


@dataclass(frozen=True)
class Token:
    """What a token says. `doors` are (address, public key) of peers that let the bearer in."""

    id: str
    secret: bytes
    mesh: str
    role: str
    expires: float
    doors: tuple[tuple[str, bytes], ...]

    def __repr__(self) -> str:
        return f"Token({self.id}, {self.role})"


def hash_secret(id: str, secret: bytes) -> bytes:
    """What the catalog keeps. The secret has 160 random bits, so one round of a hash is enough."""
    return hashlib.blake2b(secret, key=id.encode(), digest_size=32, person=b"mobi-token").digest()


def secret_matches(id: str, secret: bytes, secret_hash: bytes) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(hash_secret(id, secret), secret_hash)


def encode(token: Token) -> str:
    """The text of a token."""
    doors = [[address, key] for address, key in token.doors]
    body = wire.pack([token.id, token.secret, token.mesh, token.role, token.expires, doors])
    data = body + _checksum(body)
    return PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM, person=b"mobi-token-sum").digest()


def decode(text: str, now: float | None = None) -> Token:
    """The token in `text`.

    Raises `OperationError(bad-argument)`, or `unauthenticated` if it expired before `now`.
    """
    text = text.strip()
    if not text.startswith(PREFIX):
        raise OperationError(
            "bad-argument",
            f"this is no token: one begins with {PREFIX}",
            "copy the whole line that token new printed",
        )
    encoded = text[len(PREFIX) :]
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    body, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    if not body or not hmac.compare_digest(_checksum(body), checksum):
        raise OperationError(
            "bad-argument",
            f"the token is truncated or altered (it has {len(text)} characters)",
            "copy the whole line that token new printed",
        )
    try:
        value = wire.unpack(body)
    except wire.WireError:  # the checksum is right, which anybody can make so
        value = None
    token = _from_list(value)
    if now is not None and now >= token.expires:
        raise OperationError(
            "unauthenticated", f"token {token.id} has expired", "ask for a new one: mobictl peer token new"
        )
    return token


def _from_list(value: Any) -> Token:
    match value:
        case [str(id), bytes(secret), str(mesh), str(role), float(expires), list(doors)]:
            pairs = [(door[0], door[1]) for door in doors if isinstance(door, list) and len(door) == 2]
            if len(pairs) == len(doors) and all(
                isinstance(address, str) and isinstance(key, bytes) for address, key in pairs
            ):
                return Token(id, secret, mesh, role, expires, tuple(pairs))
    raise OperationError(
        "unsupported", "this token was made by another version of Mobitopolo", "use the same version"
    )
