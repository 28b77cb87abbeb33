# SPDX-License-Identifier: Apache-2.0
"""What must never be, looked at whenever something changes that it speaks of.

Each check compares one change with what is known of all before, so its cost does not grow with the length of
a seed. Nobody in the mesh can see what is seen here: all hosts at once, and real time.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from proto import entries
from proto.peer_events import Applied
from proto.state import State

if TYPE_CHECKING:
    from tests.sim.hosts import Copy, Host
    from tests.sim.mesh_world import World

COMPARE_EVERY = 8
"""Whole states are compared at every so many indices, and at the end."""
LONGEST_STALE = 1.5
"""Seconds in which a shim must have stopped a guest whose deadline has passed, while its host goes on."""


class Violation(AssertionError):
    """What must never be, at this seed."""


class Invariants:
    """The referee of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.leaders: dict[int, str] = {}
        self.committed: dict[int, Applied] = {}
        """What the first peer that applied an index made of it."""
        self.newest = State()
        """The newest state that anybody has applied."""
        self.oldest = 0
        """Up to here everything was there when the world began."""
        self._decided: dict[tuple[str, int, int], int] = {}
        self._running: dict[str, dict[Host, Copy]] = defaultdict(dict)
        self._ran: dict[tuple[str, int], Host] = {}
        self._first_run: dict[str, tuple[int, float]] = {}
        self._forced: set[tuple[str, int]] = set()

    # The log.

    def leads(self, host: Host, term: int) -> None:
        """At most one leader per term."""
        other = self.leaders.setdefault(term, host.id)
        if other != host.id:
            raise Violation(f"two leaders in term {term}: {self.world.name(other)} and {host.name}")

    def applied(self, host: Host, effect: Applied) -> None:
        """A committed record never changes, makes the same state everywhere, and takes effect once."""
        known = self.committed.get(effect.index)
        if known is None:
            self._commit(host, effect)
            return
        if known.proposal != effect.proposal and not effect.repeated:
            raise Violation(
                f"record {effect.index} has changed: {known.proposal!r}; at {host.name} {effect.proposal!r}"
            )
        if (known.refused is None) != (effect.refused is None):
            raise Violation(
                f"record {effect.index} is refused by some: {known.refused!r}, {effect.refused!r}"
            )
        if effect.index % COMPARE_EVERY == 0:
            self.same_state(host, effect.index, effect.state)

    def same_state(self, host: Host, index: int, state: State) -> None:
        """Equal logs make equal states."""
        known = self.committed.get(index)
        if known is not None and known.state != state:
            fields = [n for n in State.__dataclass_fields__ if getattr(known.state, n) != getattr(state, n)]
            raise Violation(f"{host.name}'s state after record {index} differs from others' in {fields}")

    def _commit(self, host: Host, effect: Applied) -> None:
        self.committed[effect.index] = effect
        before = self.newest
        if effect.state.index != effect.index:
            raise Violation(f"{host.name}'s state after record {effect.index} says {effect.state.index}")
        if effect.index > before.index:
            self.newest = effect.state
        proposal = effect.proposal
        if proposal is None or effect.index != before.index + 1:
            return
        if proposal.client:
            self._once(effect, before)
        self._right_to_run(host, before, effect.state, proposal.entry)

    def _once(self, effect: Applied, before: State) -> None:
        proposal = effect.proposal
        assert proposal is not None
        key = (proposal.client, proposal.boot, proposal.sequence)
        first = self._decided.setdefault(key, effect.index)
        if first == effect.index:
            return
        same = replace(effect.state, index=before.index, time=before.time, sessions=before.sessions)
        if same != before:
            raise Violation(
                f"a proposal took effect twice, as record {first} and {effect.index}: {proposal!r}"
            )

    # Who may run what.

    def _right_to_run(self, host: Host, before: State, after: State, entry: entries.AnyEntry) -> None:
        if before.guests is after.guests:
            return
        for key, guest in after.guests.items():
            old = before.guests.get(key)
            if old is None or old.id != guest.id or (old.owner, old.epoch) == (guest.owner, guest.epoch):
                continue
            if guest.epoch <= old.epoch:
                raise Violation(f"the epoch of {key} fell from {old.epoch} to {guest.epoch}")
            loser = self._bereft(before, entry, old)
            if loser is not None:
                self._lease_is_out(loser, f"{key} was given to {after.peer_name(guest.owner)}")

    def _bereft(self, before: State, entry: entries.AnyEntry, old: entries.Guest) -> str | None:
        """The peer whose lease must be out for this to be committed; None if it agreed, or never will run."""
        if isinstance(entry, entries.Failover):
            by_lease = old.on_partition == "freeze" and entry.reason == LEASE_RAN_OUT
            return before.migrations[entry.migration].destination if by_lease else None
        if entry.kind == "fail-over-guest":
            return old.owner
        return None

    def _lease_is_out(self, peer: str, what: str) -> None:
        host = self.world.hosts[peer]
        process = host.process
        if process is not None and not host.gone and host.now < process.lease:
            raise Violation(
                f"{what} while the lease of {host.name} lasts {process.lease - host.now:.3f} s more"
            )
        for copy in host.copies.values():
            if copy.lease_bound and copy.phase == "running" and host.now < copy.deadline:
                raise Violation(f"{what} while {copy.guest.key} runs at {host.name} within its deadline")

    def leased(self, host: Host, state: State, deadline: float) -> None:
        """Who has a lease knows of everything that was taken from it."""
        if deadline <= host.now:
            return
        for key, guest in self.newest.guests.items():
            mine = state.guests.get(key)
            if mine is None or mine.id != guest.id or guest.on_partition != "freeze":
                continue
            if mine.owner == host.id and guest.owner != host.id and self._taken(host, mine, guest):
                raise Violation(
                    f"{host.name} has a lease and does not know that {key} e{mine.epoch} "
                    f"was taken from it (now e{guest.epoch})"
                )

    def _taken(self, host: Host, mine: entries.Guest, now: entries.Guest) -> bool:
        """Whether the copy was taken by a failover: a handover would have needed the host itself."""
        copy = host.copies.get(mine.id)
        return copy is not None and copy.phase == "running" and copy.epoch == mine.epoch

    # Running copies.

    def runs(self, host: Host, copy: Copy) -> None:
        """A copy begins to run: no other may, in any epoch."""
        id, key = copy.guest.id, f"{copy.guest.key} e{copy.epoch}"
        self.world.say(host.name, f"runs {key}")
        for other, its in self._running[id].items():
            if other is not host and (not its.lease_bound or other.now < its.deadline):
                raise Violation(f"two copies run: {key} at {host.name} and e{its.epoch} at {other.name}")
        first = self._ran.setdefault((id, copy.epoch), host)
        if first is not host:
            raise Violation(f"{key} ran at {first.name} and now at {host.name}")
        newest, _ = self._first_run.get(id, (0, 0.0))
        if copy.epoch < newest:
            raise Violation(f"{key} runs at {host.name} although epoch {newest} has run")
        if copy.epoch > newest:
            self._first_run[id] = (copy.epoch, self.world.now)
        self._running[id][host] = copy

    def stopped(self, host: Host, copy: Copy) -> None:
        """A copy stands still."""
        self._running[copy.guest.id].pop(host, None)

    def output(self, host: Host, copy: Copy) -> None:
        """A frame left the host: its switch found the deadline not passed."""
        newest, since = self._first_run.get(copy.guest.id, (0, 0.0))
        if copy.epoch < newest:
            raise Violation(
                f"output of {copy.guest.key} e{copy.epoch} at {host.name} was accepted, "
                f"but e{newest} runs since {since:.3f}"
            )

    def look_at_copies(self) -> None:
        """No shim lets its guest run on long after the deadline."""
        for copies in self._running.values():
            for host, copy in copies.items():
                late = host.now - copy.deadline if copy.lease_bound else 0.0
                awake = self.world.now - host.woke
                if late > LONGEST_STALE < awake and not (host.still or copy.stopped_shim):
                    raise Violation(f"{copy.guest.key} runs at {host.name} {late:.1f} s after its deadline")

    def acknowledged(self, index: int) -> None:
        """A client is told that this is decided: it must have been."""
        if index not in self.committed and index > self.oldest:
            raise Violation(f"a client was told of record {index}, which nobody has applied")


LEASE_RAN_OUT = "the destination's lease ran out"
"""The reason with which `proto.handover.Coordinator` fails over because of a lease."""
