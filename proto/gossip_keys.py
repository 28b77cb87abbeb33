# SPDX-License-Identifier: Apache-2.0
"""When gossip gets a new key, and which keys seal and open it meanwhile.

The keys are in the catalog, so every member has them and nobody else. The coordinator has a new one written
when there is none, when the newest has been in use for a day, and at once when a member has left or was
evicted, who knows the old ones.

Members hear of a new key at slightly different times. So a member seals with the older key for a moment
longer, until all have had the time to hear, and opens both; but the older one only for so long, since
somebody who has left may know it.
"""

from __future__ import annotations

from collections.abc import Sequence

from proto.entries import GossipKey
from proto.state import State

DAY = 86_400.0

SETTLE = 2.0
"""Seconds from hearing of a new key to sealing with it."""

GRACE = 10.0
STALE_GRACE = 4.0
"""Seconds for which the key before is still opened, also if somebody who has left knows it."""


def next_generation(state: State, wall: float) -> int | None:
    """The generation of the key that the coordinator should have written now (`wall`: seconds since 1970);
    None if the newest is good, or nobody is there to gossip with."""
    if sum(member.status == "member" for member in state.members.values()) < 2:
        return None
    if not state.gossip_keys:
        return 1
    newest = state.gossip_keys[-1]
    return newest.generation + 1 if newest.stale or wall - newest.since >= DAY else None


class Keyring:
    """The keys of one member, by generation; times are seconds on its own clock."""

    def __init__(self) -> None:
        self._newest: GossipKey | None = None
        self._older: GossipKey | None = None
        self._learned = 0.0

    def learn(self, keys: Sequence[GossipKey], now: float) -> None:
        """These are the catalog's keys, the newest last. The first ones learned are in use at once."""
        *before, newest = sorted(keys, key=lambda key: key.generation) or (None,)
        known = self._newest.generation if self._newest else 0
        if newest is None or newest.generation <= known:
            return
        older = before[-1] if before else None
        in_use = older is not None and older.generation == known
        self._learned = now if in_use else now - SETTLE
        self._older = older if in_use or (older and not older.stale) else None
        self._newest = newest

    def sealing(self, now: float) -> GossipKey | None:
        """The key to seal with; None if there is none yet."""
        if self._older is not None and now - self._learned < SETTLE:
            return self._older
        return self._newest

    def opening(self, generation: int, now: float) -> GossipKey | None:
        """The key of this generation, if it may still be opened."""
        if self._newest is not None and generation == self._newest.generation:
            return self._newest
        older = self._older
        if older is None or generation != older.generation:
            return None
        return older if now - self._learned < (STALE_GRACE if older.stale else GRACE) else None
