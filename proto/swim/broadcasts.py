# SPDX-License-Identifier: Apache-2.0
"""News on its way: claims that wait to be carried by packets, and how often each was.

A claim is sent a bounded number of times by each member, in proportion to the logarithm of their number,
which reaches all of them with high probability (SWIM §4.1); what was sent least goes first. A newer claim
about a member takes the older one's place, so the queue never holds more claims than there are members.
"""

from __future__ import annotations

from math import ceil, log10

from proto.swim.packets import CLAIM_MOST, MOST_CLAIMS, Claim, claim_size


class Broadcasts:
    """The queue; `repeats` × log10(members) is how often each claim is sent."""

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats
        self._sent: dict[str, int] = {}
        self._queues: list[dict[str, Claim]] = [{}]
        self.resize(1)

    def resize(self, members: int) -> None:
        """So many members there are now."""
        self._limit = max(1, self._repeats * ceil(log10(members + 1)))
        while len(self._queues) < self._limit:
            self._queues.append({})

    def __bool__(self) -> bool:
        return bool(self._sent)

    def add(self, claim: Claim) -> None:
        """Spread this; forget older news of the same member."""
        self.forget(claim.peer)
        self._sent[claim.peer] = 0
        self._queues[0][claim.peer] = claim

    def forget(self, peer: str) -> None:
        """There is no news of this member any more."""
        sent = self._sent.pop(peer, None)
        if sent is not None:
            del self._queues[sent][peer]

    def take(self, room: int) -> tuple[Claim, ...]:
        """Claims for one packet, `room` bytes at most; counts them as sent once more."""
        if not self._sent:
            return ()
        taken: list[tuple[int, Claim]] = []
        left = len(self._sent)
        for sent, queue in enumerate(self._queues):
            if not left or room < CLAIM_MOST:
                break
            left -= len(queue)
            for claim in queue.values():
                if room < CLAIM_MOST or len(taken) == MOST_CLAIMS - 1:
                    break
                room -= claim_size(claim)
                taken.append((sent, claim))
        for sent, claim in taken:
            del self._queues[sent][claim.peer]
            if sent + 1 < self._limit:
                self._sent[claim.peer] = sent + 1
                self._queues[sent + 1][claim.peer] = claim
            else:
                del self._sent[claim.peer]
        return tuple(claim for _, claim in taken)
