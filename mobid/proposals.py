# SPDX-License-Identifier: Apache-2.0
"""What this peer has proposed and does not know yet to be decided.

Proposals are numbered within one start of the peer, and starts by a number that grows, the *boot*: those of
an earlier start mean nothing once a later one is known. What became of a proposal is learnt from the own copy
of the log, so no answer can get lost and nothing is done twice.

A peer that has lost its catalog and whose clock was put back may begin with too low a boot. It notices when
the log brings a proposal of its own that it never made, takes a higher one, and proposes again what is under
way, which cannot become true any more as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from mobid.stamps import HybridClock
from mobid.store import Store
from proto import entries
from proto.api import OperationError
from proto.peer_events import Applied, Event, GivenUp, Proposed
from proto.state import SESSION_WINDOW, State

QUEUE = SESSION_WINDOW // 2
"""Proposals of this peer that are under way at once; few enough that none is forgotten too early."""


@dataclass
class _Pending:
    """Somebody waits for a decision."""

    done: trio.Event = field(default_factory=trio.Event)
    index: int = 0
    error: OperationError | None = None
    outdated: bool = False
    """It was proposed with a boot that means nothing any more, and has not become true."""

    def answer(self, error: OperationError | None) -> None:
        if not self.done.is_set():
            self.error = error
            self.done.set()

    def outdate(self) -> None:
        if not self.done.is_set():
            self.outdated = True
            self.done.set()


class Proposals:
    """All of one start of the peer `own`. `feed` gives the machine an event, `state` is the newest one."""

    def __init__(
        self,
        own: str,
        stamps: HybridClock,
        feed: Callable[[Event], None],
        state: Callable[[], State],
    ) -> None:
        self._own = own
        self._stamps = stamps
        self._feed = feed
        self._state = state
        self._store: Store | None = None
        self._boot = 0
        self._sequence = 0
        self._slots = trio.CapacityLimiter(QUEUE)
        self._pending: dict[int, _Pending] = {}

    def begin(self, store: Store) -> None:
        """The log is as the last start left it in `store`: number this one."""
        self._store = store
        self._take_boot()

    def _take_boot(self) -> None:
        """Number this start, later than every one that is known of."""
        assert self._store is not None
        session = self._state().sessions.get(self._own)
        self._boot = self._store.next_boot(max(time.time_ns(), session.boot + 1 if session else 0))

    def _outdated(self) -> bool:
        """Whether the log has proposals of this peer that were not made in this start, nor before it."""
        session = self._state().sessions.get(self._own)
        return session is not None and (session.boot, session.newest) > (self._boot, self._sequence)

    # What the log says.

    def applied(self, applied: Applied) -> None:
        """A record was applied, and the state is the one after it."""
        proposal = applied.proposal
        if proposal is not None and (proposal.client, proposal.boot) == (self._own, self._boot):
            pending = self._pending.get(proposal.sequence)
            if pending is not None:
                pending.index = applied.index
                pending.answer(applied.refused)
        if self._outdated():
            for pending in self._pending.values():
                pending.outdate()

    def skipped(self) -> None:
        """Records were not seen one by one. If the boot is outdated by them, what is under way may have
        become true before it was."""
        if self._outdated():
            self.fail(
                OperationError(
                    "no-leader",
                    "this peer has just been given a newer state, which does not tell whether the change has "
                    "become true",
                    "look again in a moment",
                )
            )

    def fail(self, error: OperationError) -> None:
        """Whoever waits is told that there is no use in it."""
        for pending in list(self._pending.values()):
            pending.answer(error)

    # Proposing.

    async def propose(self, entry: entries.Entry, request: str) -> int:
        """Wait until `entry` is true and applied here; returns its index. `request`: a step of a command.

        Raises `OperationError`. Whoever stops waiting gives the proposal up; it may still become true.
        """
        async with self._slots:
            while True:
                pending = await self._propose_once(entry, request)
                if pending.error is not None:
                    raise pending.error
                if not pending.outdated:
                    return pending.index

    async def _propose_once(self, entry: entries.Entry, request: str) -> _Pending:
        if self._outdated():
            self._take_boot()
        self._sequence += 1
        sequence, pending = self._sequence, _Pending()
        proposal = entries.Proposal(
            entry=entry,
            client=self._own,
            boot=self._boot,
            sequence=sequence,
            request=request,
            stamp=self._stamps.now(),
        )
        self._pending[sequence] = pending
        try:
            self._feed(Proposed(proposal, time.time()))
            await pending.done.wait()
        finally:
            if self._pending.pop(sequence, None) is not None:
                self._feed(GivenUp(sequence))
        return pending
