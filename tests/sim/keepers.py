# SPDX-License-Identifier: Apache-2.0
"""Who looks after the guests of a simulated peer: `proto.reconcile.next_step`, carried out by shims.

As in `mobid`, a guest is started only after the catalog has taken the owner's report that it is starting, and
nothing is begun by a peer that does not know yet whether what it has stored is old. A lease-bound guest is
started only while the lease holds, and its shim gets the deadline with the order to start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto import entries, reconcile
from proto.api import OperationError
from proto.handover import right_after_failover
from proto.reconcile import Actual, Phase, Step
from tests.sim.hosts import Copy, CopyPhase

if TYPE_CHECKING:
    from tests.sim.process import Process

REPORT_AGAIN = 1.0

PHASES: dict[CopyPhase, Phase] = {
    "none": "absent",
    "waiting": "running",
    "running": "running",
    "frozen": "running",
    "ended": "ended",
}


class Keepers:
    """All keepers of one process. Each guest has at most one step under way."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._host = process.host
        self._world = process.world
        self._busy: set[str] = set()
        self._looking = False
        self._retry: dict[str, float] = {}

    def wake(self) -> None:
        """Something may have changed: look soon."""
        if not self._looking:
            self._looking = True
            self._process.after(0.002 * self._world.rng.random(), self._look)

    def entitled(self, copy: Copy) -> bool:
        """Whether the catalog, as it is known here, gives this copy the right to run."""
        state = self._process.state
        guest = state.guests.get(copy.guest.key)
        if guest is None or guest.id != copy.guest.id:
            return False
        if (guest.owner, guest.epoch) == (self._host.id, copy.epoch):
            return True
        migration = state.migrations.get(copy.migration)
        incoming = migration is not None and migration.destination == self._host.id
        return (
            incoming and migration is not None and migration.state == "open" and copy.epoch == guest.epoch + 1
        )

    def _look(self) -> None:
        self._looking = False
        state = self._process.state
        known = {guest.id: guest for guest in state.guests.values()}
        ids = {guest.id for guest in known.values() if guest.owner == self._host.id}
        for id in sorted(ids | self._host.copies.keys()):
            if id not in self._busy:
                self._step(id, known.get(id), self._host.copies.get(id))

    def take_back(self, copy: Copy) -> None:
        """A handover of which this peer may never have known has failed over: the copy here is the guest."""
        copy.epoch = right_after_failover(self._process.state, self._host.id, copy.guest.id, copy.epoch)

    def _step(self, id: str, guest: entries.Guest | None, copy: Copy | None) -> None:
        held = copy is not None and bool(copy.migration)
        if copy is not None and not held:
            self.take_back(copy)
        paused = copy is not None and "pause" in copy.frozen_by
        phase: Phase = "absent" if copy is None else "paused" if paused else PHASES[copy.phase]
        actual = Actual(
            phase,
            files=copy is not None,
            held=held,
            retry_at=self._retry.get(id),
            may_run=guest is None or not guest.lease_bound or self._process.leased,
            stale=copy is not None and guest is not None and copy.epoch < guest.epoch,
        )
        step = reconcile.next_step(guest, self._host.id, actual, self._host.now)
        if step is Step.DISCARD and copy is not None:
            if self._process.fresh:
                self._by_shim(id, lambda: self._host.remove(copy))
        elif step is Step.START and guest is not None:
            self._start(guest, copy)
        elif step is Step.WAIT:
            self._process.after(REPORT_AGAIN, self.wake)
        elif step is Step.STOP and copy is None and guest is not None:
            self._report(guest, "stopped")
        elif copy is not None and guest is not None:
            self._other(step, guest, copy)

    def _other(self, step: Step, guest: entries.Guest, copy: Copy) -> None:
        host = self._host
        if step is Step.STOP:
            self._by_shim(guest.id, lambda: host.kill(copy), lambda: self._report(guest, "stopped"))
        elif step is Step.PAUSE:
            self._by_shim(guest.id, lambda: host.freeze(copy, "pause"), lambda: self._report(guest, "paused"))
        elif step is Step.RESUME:
            self._by_shim(guest.id, lambda: host.let_run(copy), lambda: self._report(guest, "running"))
        elif guest.state not in ("running", "paused") and copy.phase == "running":
            self._report(guest, "running")

    # Starting: the catalog hears of it first.

    def _start(self, guest: entries.Guest, copy: Copy | None) -> None:
        if not self._process.fresh:
            return
        self._busy.add(guest.id)
        report = entries.Report(guest=guest.key, owner=self._host.id, epoch=guest.epoch, state="starting")

        def decided(_index: int, refused: OperationError | None) -> None:
            self._busy.discard(guest.id)
            now = self._process.state.guests.get(guest.key)
            mine = now is not None and (now.id, now.owner, now.epoch) == (
                guest.id,
                self._host.id,
                guest.epoch,
            )
            same = now is not None and mine and now.wanted != "stopped"
            if refused is None and same and not (copy and copy.migration):
                self._bring_up(guest)
            else:
                self._process.after(REPORT_AGAIN * self._world.rng.random(), self.wake)

        self._process.propose(report, decided)

    def _bring_up(self, guest: entries.Guest) -> None:
        copy = Copy(guest, guest.epoch, deadline=self._process.lease)
        self._host.copies[guest.id] = copy
        self._by_shim(guest.id, lambda: self._host.start(copy), lambda: self._report(guest, "running"))

    def _report(self, guest: entries.Guest, state: entries.GuestState) -> None:
        self._busy.add(guest.id)
        report = entries.Report(guest=guest.key, owner=self._host.id, epoch=guest.epoch, state=state)

        def decided(_index: int, _refused: OperationError | None) -> None:
            self._busy.discard(guest.id)
            self.wake()

        self._process.propose(report, decided)

    def _by_shim(self, id: str, run: object, then: object = None) -> None:
        """A step that a shim takes; `then` happens in this process when it is done, if it still lives."""
        assert callable(run)
        self._busy.add(id)

        def due() -> None:
            run()
            self._process.here(finished)

        def finished() -> None:
            self._busy.discard(id)
            if callable(then):
                then()
            else:
                self.wake()

        self._host.by_shim(due)

    def ended(self, copy: Copy) -> None:
        """A guest ended by itself: it is started again after a pause."""
        self._retry[copy.guest.id] = self._host.now + self._world.rng.choice((0.0, 0.5))
        self.wake()
