# SPDX-License-Identifier: Apache-2.0
"""Gossip's envelope: packets sealed so that only members read and write them.

A datagram is versions (1), the version spoken (1), the key's generation (4), the sender's id (8), a nonce
(12), and the packet (`proto/swim/codec.py`) sealed with AES-256-GCM, its tag (16) last; the fields before the
packet are authenticated with it. A datagram that is too long or too short, of a generation not held or from
somebody who is no member is dropped before anything is opened.

*Keys and nonces.* The key of a generation is everybody's; each sender seals with a key of its own, derived
from it and the sender's id (HKDF-SHA-256), so that two members can never use a nonce twice between them. The
nonce is random, 96 bits. A member sends far fewer than 2^32 datagrams a day, and a key lives for a day, which
keeps the chance that a nonce ever repeats below 2^-32 (NIST SP 800-38D, §8.3), and needs no counter that
would have to survive a crash.

*Replay* does no harm: a claim holds for one incarnation, so an old one changes nothing that was refuted; an
answer is only taken for a question under way, once; answers go to the sender's address in the catalog, never
to where a datagram came from, and those that are larger than the question are paced. A key that is gone ends
it for good.

*Versions.* Each datagram tells the lowest and highest version that its sender speaks (four bits each). A
member speaks to another the highest that both speak, and the lowest of its own until it has heard from it.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from proto.entries import GossipKey
from proto.gossip_keys import Keyring
from proto.swim import codec
from proto.swim.packets import DATAGRAM, ENVELOPE, Packet
from proto.wire import WireError

VERSIONS = (1, 1)
"""The lowest and highest version that this program speaks."""

NONCE = 12

_HEADER = struct.Struct(f"!BBI8s{NONCE}s")

Fault = Literal["size", "stranger", "key", "version", "seal", "packet"]
"""Why a datagram was dropped: its length; its sender is no member; a generation not held; no version in
common; altered or sealed with another key; sealed well, but no packet."""


class Unacceptable(Exception):
    """A datagram that is dropped; `sender` is whom it names, "" if it is too short for that."""

    def __init__(self, fault: Fault, sender: str = "") -> None:
        super().__init__(fault)
        self.fault: Fault = fault
        self.sender = sender


@dataclass(frozen=True, slots=True)
class Opened:
    """A datagram that came from a member."""

    sender: str
    packet: Packet


class Envelopes:
    """Seals what the member `own` sends, and opens what it gets. Times are seconds on its own clock."""

    def __init__(self, own: str, keys: Keyring, versions: tuple[int, int] = VERSIONS) -> None:
        self._own = own
        self._keys = keys
        self._versions = versions
        self._heard: dict[str, tuple[int, int]] = {}
        self._ciphers: dict[tuple[int, str], AESGCM] = {}

    def enrol(self, members: Collection[str]) -> None:
        """Keep nothing of anybody else."""
        self._heard = {peer: heard for peer, heard in self._heard.items() if peer in members}
        self._ciphers = {about: cipher for about, cipher in self._ciphers.items() if about[1] in members}

    def seal(self, peer: str, packet: Packet, nonce: bytes, now: float) -> bytes | None:
        """The datagram for `peer`; `nonce` is fresh and random. None without a key."""
        key = self._keys.sealing(now)
        if key is None:
            return None
        version = self._spoken(self._heard.get(peer))
        low, high = self._versions
        header = _HEADER.pack(low << 4 | high, version, key.generation, bytes.fromhex(self._own), nonce)
        return header + self._cipher(key, self._own).encrypt(nonce, codec.encode(packet), header)

    def open(self, datagram: bytes, members: Collection[str], now: float) -> Opened:
        """The packet in a datagram, if a member sealed it; raises `Unacceptable`."""
        if not ENVELOPE < len(datagram) <= DATAGRAM:
            raise Unacceptable("size")
        versions, spoken, generation, sender_bytes, nonce = _HEADER.unpack_from(datagram)
        sender = sender_bytes.hex()
        if sender not in members or sender == self._own:
            raise Unacceptable("stranger", sender)
        key = self._keys.opening(generation, now)
        if key is None:
            raise Unacceptable("key", sender)
        header = datagram[: _HEADER.size]
        try:
            data = self._cipher(key, sender).decrypt(nonce, datagram[_HEADER.size :], header)
        except InvalidTag:
            raise Unacceptable("seal", sender) from None
        self._heard[sender] = (versions >> 4, versions & 15)
        low, high = self._versions
        if not low <= spoken <= high:
            raise Unacceptable("version", sender)
        try:
            return Opened(sender, codec.decode(data))
        except WireError:
            raise Unacceptable("packet", sender) from None

    def _spoken(self, heard: tuple[int, int] | None) -> int:
        low, high = self._versions
        common = min(high, heard[1]) if heard else low
        # Without a version in common the other one cannot read it, but can tell its people why.
        return common if common >= max(low, heard[0] if heard else low) else low

    def _cipher(self, key: GossipKey, sender: str) -> AESGCM:
        cipher = self._ciphers.get((key.generation, sender))
        if cipher is None:
            self._ciphers = {
                about: old for about, old in self._ciphers.items() if about[0] >= key.generation - 1
            }
            info = b"mobitopolo gossip\0" + bytes.fromhex(sender)
            derived = HKDF(SHA256(), 32, salt=None, info=info).derive(key.key)
            cipher = self._ciphers[key.generation, sender] = AESGCM(derived)
        return cipher
