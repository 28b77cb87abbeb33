# SPDX-License-Identifier: Apache-2.0
"""Leases: how a peer knows that nobody else may run its lease-bound guests, with nobody there to ask.

A *holder* asks the coordinator for a lease again and again and counts it from the moment it *sent* the
question. The *grantor*, a part of whoever coordinates, notes when it granted what. After d seconds the
holder stops by its own clock; the grantor waits longer, and only then says that the peer is lost. What
follows from that (another owner, another epoch) is an entry of the log, committed through a *fence*.

**Why two leases never overlap.** Clocks are CLOCK_BOOTTIME; of two, none runs faster than the other by more
than the fraction r (`drift`). Let P hold a lease until its own clock shows s + d, s being when it asked;
and let a fence for P be committed. Then either P's lease has run out when the fence was appended, or P had
applied the fence before that lease counted:

1. *The fence was appended by the coordinator that granted.* It granted at g, after s, and holds the peer
   for alive until g + d (1 + r) + margin on its own clock. By then P's clock shows more than s + d. The
   margin is for what is not exact in reading clocks and setting timers.
2. *By a later coordinator.* The grant followed a *fresh* read: a quorum answered after s that the grantor
   led. The new leader knows (`quiet` q) that no earlier leader got such an answer within q seconds before
   it began to lead, at b. So s < b − q, and b − q + d (1 + r) + margin is late enough for every lease that
   an earlier leader can have granted: d is at most `Member.lease`, which is in the log, never falls, and is
   known in full as soon as the leader has applied a record of its own term; before that it calls nobody
   lost.
3. *By an earlier coordinator, or by this one, before the grant.* A fence in flight at this coordinator bars
   the peer from renewal until it is applied or is never going to be. A fence of an earlier leader that ever
   gets committed is in the log before the new leader's first record (Raft: a later leader has all that is
   committed, and what it does not have can never be). The grant names the index up to which its grantor has
   applied the log itself, which is not below that first record nor below a fence that bars no more, and it
   counts at P only once P has applied the log up to there, the fence included.

So the grantor may be paused, replaced or cut off at any point; what is late is only ever late. The deadline
of a holder never goes back: a new leader, or none, changes nothing in what is held.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from proto.lease_events import Deadline, Granted, NotGranted, PeerFound, PeerLost, Renew
from proto.machine import Send, WakeAt

HOLDER_TIMER = "lease"
GRANTOR_TIMER = "grants"

OUTSTANDING = 16
"""Requests of a holder whose answers are still awaited, and grants that wait for the log."""

TELL_AGAIN = 1.0
"""Seconds after which a peer that stays lost is called so again."""

RENEWALS = 5
"""A lease is asked for so many times within its duration."""


class Holder:
    """One peer's own lease. `duration` is what it asks for, in seconds; the owner of the object keeps it.

    Numbers begin at random, so that an answer to an earlier start of this peer is not taken for one to this.
    """

    def __init__(self, duration: float, rng: random.Random) -> None:
        self.duration = duration
        self.deadline = 0.0
        """On the own clock; 0 if there was never a lease."""
        self._coordinator = ""
        self._number = rng.getrandbits(62)
        self._sent: dict[int, tuple[str, float, float]] = {}
        self._early: list[tuple[int, float]] = []

    def follow(self, coordinator: str, now: float) -> list[Send | WakeAt]:
        """From now on this peer coordinates ("" if nobody does)."""
        self._coordinator = coordinator
        return self.renew(now)

    def renew(self, now: float) -> list[Send | WakeAt]:
        """Ask now (also when the timer comes), and again after a fifth of the duration.

        Not while a grant has run out before the log was applied up to what it names: whose disk stands still
        cannot use a lease, and by asking on it would only keep its guests from being started elsewhere.
        """
        if not self._coordinator:
            return []
        again = WakeAt(HOLDER_TIMER, now + self.duration / RENEWALS)
        if any(at <= now for _, at in self._early):
            return [again]
        self._number += 1
        self._sent[self._number] = (self._coordinator, now, self.duration)
        while len(self._sent) > OUTSTANDING:
            del self._sent[min(self._sent)]
        request = Renew(self._number, self.duration)
        return [Send(self._coordinator, request), again]

    def granted(self, peer: str, grant: Granted, applied: int) -> list[Deadline]:
        """An answer; `applied` is the index up to which this peer has applied the log."""
        asked = self._sent.get(grant.number)
        if asked is None or asked[0] != peer:
            return []
        del self._sent[grant.number]
        _, sent, duration = asked
        self._early.append((grant.index, sent + min(duration, max(grant.duration, 0.0))))
        del self._early[:-OUTSTANDING]
        return self.applied(applied)

    def refused(self, peer: str, answer: NotGranted) -> None:
        """The coordinator said no; the next request comes at its time."""
        asked = self._sent.get(answer.number)
        if asked is not None and asked[0] == peer:
            del self._sent[answer.number]

    def applied(self, index: int) -> list[Deadline]:
        """The log is applied up to `index`: grants that waited for it count now."""
        if not self._early:
            return []
        until = max((at for needed, at in self._early if needed <= index), default=0.0)
        self._early = [(needed, at) for needed, at in self._early if needed > index]
        if until <= self.deadline:
            return []
        self.deadline = until
        return [Deadline(until)]


@dataclass
class _Granted:
    """What the grantor knows of one peer. `longest`: the longest lease it may have; `since`: no lease of an
    earlier leader was counted from after this; `until`: no lease granted in this term holds any more."""

    longest: float
    since: float
    until: float = 0.0
    told: float | None = None
    graced: bool = False


@dataclass(frozen=True, slots=True)
class AskFresh:
    """Effect: do a fresh read (`raft.Read`), then call `Grantor.read` as it says."""


GrantorEffect = Send | WakeAt | AskFresh | PeerLost | PeerFound


class Grantor:
    """The leases of all peers; there is one only while this peer leads, and only for one term.

    Requests that come while a read is under way share the next one.
    """

    def __init__(self, term: int, quiet: float, drift: float, margin: float, now: float) -> None:
        self.term = term
        self._drift = drift
        self._margin = margin
        self._began = now - quiet
        self._peers: dict[str, _Granted] = {}
        self._gone: Collection[str] = ()
        self._settled = False
        self._bars: dict[int, str] = {}
        self._asking: dict[str, Renew] | None = None
        self._waiting: dict[str, Renew] = {}
        self._due = 0.0

    def members(self, leases: Mapping[str, float], gone: Collection[str], now: float) -> list[GrantorEffect]:
        """The longest leases (seconds, 0: none was ever allowed) as the log has them; `gone` of these peers
        get none any more, but must still be waited for. Call whenever members change."""
        self._gone = gone
        known = self._peers
        self._peers = {}
        for peer, longest in leases.items():
            if longest <= 0.0 and peer not in gone:
                continue  # one that has gone without ever having had a lease is lost too
            since = now if self._settled else self._began
            peer_known = known.get(peer) or _Granted(longest, since)
            peer_known.longest = longest
            self._peers[peer] = peer_known
        return self._plan(now) if self._settled else []

    def settle(self, now: float) -> list[GrantorEffect]:
        """A record of this term is applied: `members` was called with all that earlier leaders knew."""
        self._settled = True
        return self._plan(now)

    # Granting.

    def renew(self, peer: str, request: Renew) -> list[GrantorEffect]:
        """A peer asks for a lease."""
        if self._refusal(peer):
            return [Send(peer, NotGranted(request.number, self._refusal(peer)))]
        if self._asking is not None:
            self._waiting[peer] = request
            return []
        self._asking = {peer: request}
        return [AskFresh()]

    def read(self, index: int | None, now: float) -> list[GrantorEffect]:
        """The fresh read is done: answer all who asked before it began.

        `index`: up to where this peer has applied the log by now; None if the read failed.
        """
        effects: list[GrantorEffect] = []
        asked, self._asking = self._asking or {}, None
        for peer, request in asked.items():
            effects += self._grant(peer, request, index, now)
        if self._waiting:
            self._asking, self._waiting = self._waiting, {}
            effects.append(AskFresh())
        return effects

    def _refusal(self, peer: str) -> str:
        if peer not in self._peers:
            return "no lease is allowed yet"
        if peer in self._gone:
            return "it has left the mesh"
        return "what follows from its lost lease is being decided" if peer in self._bars.values() else ""

    def _grant(self, peer: str, request: Renew, index: int | None, now: float) -> list[GrantorEffect]:
        reason = "the coordinator may not lead any more" if index is None else self._refusal(peer)
        if reason or index is None:
            return [Send(peer, NotGranted(request.number, reason))]
        known = self._peers[peer]
        duration = min(max(request.duration, 0.0), known.longest)
        known.until = max(known.until, now + self._enough(duration))
        known.graced = False
        effects: list[GrantorEffect] = [Send(peer, Granted(request.number, duration, index))]
        if known.told is not None:
            known.told = None
            effects.append(PeerFound(peer))
        return effects

    def _enough(self, duration: float) -> float:
        return duration * (1.0 + self._drift) + self._margin

    # Losing.

    def out(self, peer: str, now: float) -> bool:
        """Whether every lease of `peer`, whoever granted it, has run out by every clock."""
        known = self._peers.get(peer)
        return self._settled and known is not None and now >= self._expiry(known)

    def holds(self, peer: str, now: float) -> bool:
        """Whether `peer` has got a lease in this term and it may hold still: it was there a moment ago."""
        known = self._peers.get(peer)
        return known is not None and now < known.until and known.told is None and not known.graced

    def _expiry(self, known: _Granted) -> float:
        return max(known.until, known.since + self._enough(known.longest))

    def bar(self, peer: str, fence: int) -> None:
        """A fence for `peer` was appended: no lease until `lift` is called with the same number."""
        self._bars[fence] = peer

    def lift(self, fence: int) -> None:
        """The fence is applied, or changed nothing."""
        self._bars.pop(fence, None)

    def barred(self, peer: str) -> bool:
        """Whether a fence for `peer` is in flight."""
        return peer in self._bars.values()

    def woken(self, now: float) -> list[GrantorEffect]:
        """The timer: say who is lost.

        A grantor that was itself away for a while has heard nobody, so it gives everybody the time of two
        more requests, once; that is only ever later than it need be.
        """
        if not self._settled:
            return []  # a timer of an earlier time as coordinator; `settle` sets the first of this one
        effects: list[GrantorEffect] = []
        away = now > self._due + self._margin
        for peer, known in self._peers.items():
            if now < self._expiry(known):
                continue
            if away and known.told is None and not known.graced:
                known.graced = True
                known.until = now + 2 * known.longest / RENEWALS
            elif known.told is None or now >= known.told + TELL_AGAIN:
                known.told = now
                effects.append(PeerLost(peer, self.term))
        return effects + self._plan(now)

    def _plan(self, now: float) -> list[GrantorEffect]:
        """Wake when the next lease runs out, or the next lost peer is to be named again."""
        times = (
            max(self._expiry(known), 0.0 if known.told is None else known.told + TELL_AGAIN)
            for known in self._peers.values()
        )
        self._due = max(now, min(times, default=now + TELL_AGAIN))
        return [WakeAt(GRANTOR_TIMER, self._due)]
