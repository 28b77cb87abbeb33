# SPDX-License-Identifier: Apache-2.0
"""What the people do who run the mesh: guests, moves, and peers that come, are emptied, leave or are evicted.

They ask a peer and forget about it: what comes of it shows in the end, when nothing may be half done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from proto import entries
from proto.api import OperationError
from proto.state import State

if TYPE_CHECKING:
    from tests.sim.hosts import Host
    from tests.sim.mesh_world import World
    from tests.sim.process import Process

FORGET_AFTER = 8.0


class Operator:
    """One hand that does something every now and then."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._pace = world.rng.choice((0.3, 1.0, 3.0))
        self._guests = 0
        self._tokens = 0
        self._most = world.rng.choice((1, 3, 6))
        self._moves = world.rng.choice((1, 4, 10))
        self._membership = world.rng.choice((0, 0, 1, 2))
        self._draining: set[str] = set()

    def begin(self) -> None:
        """Work from now on."""
        for _ in range(self._most):
            self.world.at(0.3 + self.world.rng.random(), self.add_guest)
        self.world.at(1.0, self._work)

    def _work(self) -> None:
        if self.world.healing:
            self.tidy()
            return
        todo = [self.add_guest, self.change_wanted, self.remove_guest] + self._moves * [self.migrate]
        todo += self._membership * [self.join, self.drain, self.evict, self.leave]
        self.world.rng.choice(todo)()
        self.world.at(self._pace * 2 * self.world.rng.random(), self._work)

    def _ask(self, entry: entries.AnyEntry, process: Process | None = None) -> None:
        process = process or self.world.some_process()
        if process is None:
            return
        asked = process

        def propose() -> None:
            sequence = asked.propose(entry, lambda _index, _refused: None)
            asked.after(FORGET_AFTER, asked.give_up, sequence)

        process.host.after(0.0, process.here, propose)

    @property
    def _state(self) -> State:
        return self.world.invariants.newest

    def _members(self) -> list[str]:
        return [id for id, m in self._state.members.items() if m.status == "member"]

    # Guests.

    def add_guest(self) -> None:
        """A guest appears, somewhere."""
        if len(self._state.guests) >= self._most:
            return
        rng = self.world.rng
        self._guests += 1
        policy: Literal["run", "freeze"] = rng.choice(("run", "freeze", "freeze"))
        guest = entries.Guest(
            key=f"lab/g{self._guests % 8}",
            id=f"g{self._guests}",
            image="i",
            memory=1 << 26,
            owner=rng.choice(self._members()),
            on_partition=policy,
        )
        self._ask(entries.AddGuest(guest=guest))

    def _some_guest(self) -> entries.Guest | None:
        guests = list(self._state.guests.values())
        return self.world.rng.choice(guests) if guests else None

    def change_wanted(self) -> None:
        """Start, stop or pause a guest."""
        guest = self._some_guest()
        if guest is not None:
            wanted: entries.WantedState = self.world.rng.choice(("running", "running", "stopped", "paused"))
            self._ask(entries.SetWanted(guest=guest.key, wanted=wanted))

    def remove_guest(self) -> None:
        """A guest is not wanted any more."""
        guest = self._some_guest()
        if guest is not None and self.world.rng.random() < 0.3:
            self._ask(entries.RemoveGuest(guest=guest.key))

    def migrate(self) -> None:
        """Move a guest live; or, if it runs nowhere, give it to another peer."""
        guest = self._some_guest()
        if guest is None:
            return
        to = self.world.rng.choice(self._members())
        process = self.world.hosts[guest.owner].process
        # Any other lost guest may run on where it was; whether it does, people must know.
        surely_lost = guest.state == "lost" and guest.ends_with_lease
        if guest.state in ("stopped", "failed", "pending") or surely_lost:
            self._ask(entries.MoveGuest(guest=guest.key, epoch=guest.epoch, owner=to))
        elif process is not None:
            process.host.after(0.0, process.here, process.moves.migrate, guest.key, to, lambda _refused: None)

    # Members.

    def join(self) -> None:
        """A new host is admitted with a token."""
        if self.world.healing or len(self.world.hosts) > 320:
            return
        host = self.world.new_host()
        self._tokens += 1
        token = entries.Token(
            id=f"j{self._tokens}", secret_hash=b"", role="peer", uses=1, expires=1e12, created_by="operator"
        )
        self._admit(host, token)

    def _admit(self, host: Host, token: entries.Token) -> None:
        """`mesh.join` at any peer; asked again elsewhere until it is answered."""
        member = host.member.model_copy(update={"token": token.id})
        batch = entries.Batch(entries=(entries.AddToken(token=token), entries.AddPeer(member=member)))
        process = self.world.some_process()
        if process is None:
            self.world.at(1.0, self._admit, host, token)
            return
        asked = process

        def decided(_index: int, refused: OperationError | None) -> None:
            if host.process is None and (refused is None or host.id in asked.state.members):
                host.contacts = set(asked.state.members)
                self.world.start(host)

        def propose() -> None:
            sequence = asked.propose(batch, decided)
            asked.after(FORGET_AFTER, asked.give_up, sequence)

        process.host.after(0.0, process.here, propose)
        self.world.at(FORGET_AFTER, self._admit_again, host, token)

    def _admit_again(self, host: Host, token: entries.Token) -> None:
        if host.process is None and host.starts == 0 and not host.gone:
            self._admit(host, token)

    def drain(self) -> None:
        """A peer shall be emptied, or be used again."""
        id = self.world.rng.choice(self._members())
        draining = not self._state.members[id].draining
        if not draining or len(self._members()) > 3:
            self._ask(entries.DrainPeer(peer=id, draining=draining))

    def evict(self) -> None:
        """Peers that are gone for ever are evicted, with their guests; sometimes one that is not."""
        for id in self._members():
            if self.world.hosts[id].gone:
                self._ask(entries.RemovePeer(peer=id, force=True))
        host = self._dispensable() if self.world.rng.random() < 0.3 else None
        if host is not None:
            self._ask(entries.RemovePeer(peer=host.id, force=True))

    def leave(self) -> None:
        """Peers leave, perhaps several at once: each gives its vote away first, and must have no guests."""
        for _ in range(self.world.rng.choice((1, 1, 2))):
            host = self._dispensable()
            if host is not None:
                self._ask(entries.DrainPeer(peer=host.id, draining=True))
                self.world.at(4.0 * self.world.rng.random(), self._leave, host)

    def _leave(self, host: Host) -> None:
        if host.process is not None:
            self._ask(entries.RemovePeer(peer=host.id), host.process)

    def _dispensable(self) -> Host | None:
        """A peer that may leave. Where nothing else is lost, that is everybody at any time: the peers
        themselves see to it that enough others stay."""
        host, faults = self.world.hosts[self.world.rng.choice(self._members())], self.world.faults
        if host.gone or (faults.loses_logs and not faults.survives_without(host)) or self._strands(host):
            return None
        host.leaving = True
        return host

    def _strands(self, host: Host) -> bool:
        """Whether a peer that was away would find nobody it knows any more: it needs a token again then."""
        hosts = self.world.hosts
        here = {h.id for h in hosts.values() if not (h.gone or h.leaving or h is host)}
        return any(not here & (hosts[id].contacts - {id}) for id in here if hosts[id].contacts)

    # In the end.

    def tidy(self) -> None:
        """Once faults are over: what needs a person's word gets it, hosts that never come back are evicted,
        and drained peers are used again."""
        leader = self.world.leader()
        for migration in self._state.migrations.values():
            gone = self.world.hosts[migration.destination].gone
            if migration.state == "open" and gone and leader is not None:
                leader.host.after(0.0, leader.here, leader.moves.operator_adopts, migration.id)
        for id in self._members():
            if self.world.hosts[id].gone:
                self._ask(entries.RemovePeer(peer=id, force=True))
            elif self._state.members[id].draining:
                self._ask(entries.DrainPeer(peer=id, draining=False))
        self.world.at(3.0, self.tidy)
