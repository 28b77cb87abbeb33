# SPDX-License-Identifier: Apache-2.0
"""The handovers of a simulated peer: the machines of `proto.handover` and what they ask of the world.

A migration's bulk stream is a thing between two hosts that breaks at most once and carries one release at
most. Notes are on the peer's disk, copies at its shims, so both outlive the process; a new process takes up
what it finds. The process that coordinates runs a `Coordinator` for every open handover.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from proto import entries, handover
from proto import handover_events as ev
from proto.api import OperationError
from proto.machine import Persist, Persisted, Send, WakeAt, Woken
from proto.state import State
from tests.sim.hosts import Copy
from tests.sim.invariants import LEASE_RAN_OUT

if TYPE_CHECKING:
    from tests.sim.hosts import Host
    from tests.sim.process import Process

ANSWER_TIMEOUT = 3.0
SETTLE_TIMEOUT = 2.0
DEADLINE = 20.0
FORGET_AFTER = 8.0
"""Seconds after which nobody waits for a proposal any more."""


@dataclass(eq=False)
class Stream:
    """The bulk connection of one migration: `ends` are the processes that hold it."""

    source: Process
    destination: Process | None = None
    closed: bool = False
    released: bool = False


@dataclass(eq=False)
class Shell:
    """One machine and what belongs to it."""

    migration: entries.Migration
    machine: handover.Source | handover.Destination
    side: Literal["source", "destination"]
    wakes: int = 0
    discards: Copy | None = None
    """What is being removed: no keeper may have it any more."""


@dataclass(frozen=True, slots=True)
class AskPrepare:
    """Source to destination: get ready."""

    migration: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Destination to source: pages may come."""

    migration: str


SHELL_MESSAGES = (AskPrepare, Ready, ev.Settle, ev.AskDurable, ev.Durable, ev.CopyLost)
"""Messages between shells; everything else is for the machine of the peer."""


class Moves:
    """All handovers of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._host: Host = process.host
        self._world = process.world
        self._rng: random.Random = process.world.rng
        self._shells: dict[str, Shell] = {}
        self._asked: set[str] = set()
        """Handovers that this life of the peer has asked for: another life may have ended its own already."""
        self._coordinators: dict[str, handover.Coordinator] = {}
        self._coordinating = False

    # Beginning.

    def migrate(self, key: str, to: str, answer: Callable[[OperationError | None], None]) -> None:
        """`vm.migrate` at the guest's owner: hold the guest, open the handover, begin."""
        state = self._process.state
        guest = state.guests.get(key)
        copy = self._host.copies.get(guest.id) if guest is not None else None
        if guest is None or copy is None or copy.phase != "running" or copy.migration or to == self._host.id:
            answer(OperationError("conflict", "it does not run here"))
            return
        id = f"{self._rng.getrandbits(128):032x}"
        entry = entries.Handover(
            migration=id,
            guest=key,
            epoch=copy.epoch,
            source=self._host.id,
            destination=to,
            timeout=DEADLINE,
        )
        copy.migration = id
        self._asked.add(id)

        def decided(_index: int, refused: OperationError | None) -> None:
            migration = self._process.state.migrations.get(id)
            if refused is None and migration is not None and id not in self._shells:
                self._begin_source(migration)
            elif refused is not None:
                copy.migration = ""
            answer(refused)

        def undecided() -> None:
            """Whether it was opened shows later: `look` finds it then."""
            self._process.give_up(sequence)
            if copy.migration == id and id not in self._process.state.migrations:
                copy.migration = ""
                self._process.keepers.wake()

        sequence = self._process.propose(entry, decided)
        self._process.after(FORGET_AFTER, undecided)

    def look(self, state: State) -> None:
        """The log has moved: new handovers of ours begin, closed ones are told."""
        if not state.migrations:
            return
        for id, migration in state.migrations.items():
            shell = self._shells.get(id)
            if migration.state != "open":
                if shell is not None:
                    self._tell_closed(shell, migration)
            elif shell is None and migration.source == self._host.id:
                self._begin_source(migration)
            if self._coordinating:
                self._coordinate(migration)

    def _begin_source(self, migration: entries.Migration) -> None:
        copy = self._copy(migration)
        unasked = migration.id not in self._asked
        if unasked or copy is None or copy.migration != migration.id or migration.id in self._host.disk.notes:
            self._process.after(SETTLE_TIMEOUT, self._adopt, migration.id)
            return
        shell = Shell(migration, handover.Source(migration), "source")
        self._shells[migration.id] = shell
        self._world.streams[migration.id] = Stream(self._process)
        self._tell(shell, ev.Begin())
        if migration.state != "open":
            self._tell_closed(shell, migration)
        self._process.after(DEADLINE * self._rng.random() * 2, self._tell, shell, ev.Abort("out of time"))

    def take_up(self) -> None:
        """A new process finds what the last one left."""
        held = {copy.migration for copy in self._host.copies.values() if copy.migration}
        ids = held | self._host.disk.notes.keys()
        ids |= {m.id for m in self._process.state.migrations.values() if m.state == "open" and self._ours(m)}
        for id in sorted(ids):
            self._adopt(id)

    def _ours(self, migration: entries.Migration) -> bool:
        return self._host.id in (migration.source, migration.destination)

    def _adopt(self, id: str) -> None:
        migration = self._process.state.migrations.get(id)
        if id in self._shells:
            return
        if migration is None:
            self._adopt_later(id)
            return
        copy = self._copy(migration)
        held = copy is not None and copy.migration == id
        found = "none"
        if copy is not None and held:
            found = "running" if copy.going else copy.phase
        lease_bound = copy is not None and copy.lease_bound
        source = migration.source == self._host.id
        shell = (
            Shell(migration, handover.Source(migration), "source")
            if source
            else Shell(migration, handover.Destination(migration, lease_bound), "destination")
        )
        if migration.state != "open" and not held and id not in self._host.disk.notes:
            return
        self._shells[id] = shell
        self._tell(shell, ev.Adopted(self._host.disk.notes.get(id), "none" if found == "ended" else found))
        if migration.state != "open":
            self._tell_closed(shell, migration)

    def _tell_closed(self, shell: Shell, migration: entries.Migration) -> None:
        self._tell(shell, ev.Logged(migration.state))
        guest = self._process.state.guests.get(migration.guest)
        if shell.side == "source" and handover.is_superseded(migration, guest):
            self._tell(shell, ev.Superseded())

    def _adopt_later(self, id: str) -> None:
        """This log may be behind; a hold without a note is let go once a read has shown that it is not."""
        if id not in self._host.disk.notes and self._process.fresh:
            for copy in self._host.copies.values():
                if copy.migration == id:
                    copy.migration = ""
            self._process.keepers.wake()
        else:
            self._process.after(1.0, self._adopt, id)

    def _copy(self, migration: entries.Migration) -> Copy | None:
        for copy in self._host.copies.values():
            if copy.guest.id == migration.guest_id and copy.migration in ("", migration.id):
                return copy
        return None

    def died(self) -> None:
        """The process is gone, and its ends of streams with it."""
        for shell in self._shells.values():
            self._break(shell.migration.id)

    # Telling the machines.

    def _tell(self, shell: Shell, event: Any) -> None:
        if self._shells.get(shell.migration.id) is not shell or not self._process.alive:
            return
        before = shell.machine.state
        effects = shell.machine.handle(event, self._host.now)
        self._world.say(self._host.name, shell.side, before, "+", event, "→", str(shell.machine.state))
        for effect in effects:
            if self._world.faults.at_effect(self._process, shell.side, type(effect).__name__):
                return
            getattr(self, "_do_" + type(effect).__name__)(shell, effect)

    def _later(self, shell: Shell, event: Any, seconds: float | None = None) -> None:
        delay = self._rng.choice((0.001, 0.01, 0.1)) * self._rng.random() if seconds is None else seconds
        self._process.after(delay, self._tell, shell, event)

    def lease_valid(self) -> None:
        """The own lease was renewed, with the log that it names applied."""
        for shell in list(self._shells.values()):
            if shell.side == "destination" and self._process.leased:
                self._tell(shell, ev.LeaseValid())

    def receive(self, sender: str, message: Any) -> None:
        """A message of another shell."""
        id = message.migration
        migration = self._process.state.migrations.get(id)
        shell = self._shells.get(id)
        if isinstance(message, AskPrepare):
            if migration is None:
                self._process.after(0.1, self.receive, sender, message)
            elif shell is None and migration.state == "open" and migration.source == sender:
                self._begin_destination(migration)
        elif isinstance(message, ev.Settle) and shell is None:
            if migration is not None and migration.state == "open" and self._ours(migration):
                self._adopt(id)
        elif isinstance(message, ev.AskDurable) and shell is None:
            if migration is not None and migration.state == "done" and id not in self._host.disk.notes:
                self._world.network.send(self._host.id, sender, ev.Durable(id))
        elif isinstance(message, ev.CopyLost):
            self._lost(id)
        elif shell is not None and isinstance(message, Ready):
            self._tell(shell, ev.Prepared())
            self._later(shell, ev.Switch(), self._rng.choice((0.05, 0.5, 2.0)) * self._rng.random())
        elif shell is not None:
            self._tell(shell, message)

    def _begin_destination(self, migration: entries.Migration) -> None:
        guest = self._process.state.guests[migration.guest]
        lease_bound = guest.on_partition == "freeze"
        shell = Shell(migration, handover.Destination(migration, lease_bound), "destination")
        self._shells[migration.id] = shell
        self._tell(shell, ev.Begin())

    # What the machines want.

    def _do_Persist(self, shell: Shell, effect: Persist) -> None:
        id, notes = shell.migration.id, self._host.disk.notes

        def durable() -> None:
            if self._process.alive or self._rng.random() < 0.5:
                if effect.data is None:
                    notes.pop(id, None)
                else:
                    notes[id] = effect.data
            self._process.here(self._tell, shell, Persisted(id))

        self._host.after(self._rng.random() * self._host.disk.slowness, durable)

    def _do_WakeAt(self, shell: Shell, effect: WakeAt) -> None:
        shell.wakes += 1
        number = shell.wakes

        def due() -> None:
            if shell.wakes == number:
                self._tell(shell, Woken(effect.timer))

        self._process.after(max(0.0, self._host.clock.real(effect.at) - self._world.now), due)

    def _do_Send(self, _shell: Shell, effect: Send) -> None:
        self._send(effect.peer or self._process.leader, effect.message)

    def _send(self, to: str, message: Any) -> None:
        if to == self._host.id:
            self._process.after(0.0, self.receive, to, message)
        elif to:
            self._world.network.send(self._host.id, to, message)

    def _do_Prepare(self, shell: Shell, _effect: ev.Prepare) -> None:
        if shell.side == "source":
            self._world.network.send(
                self._host.id, shell.migration.destination, AskPrepare(shell.migration.id)
            )
            self._process.after(ANSWER_TIMEOUT, self._unanswered, shell)
            return

        def prepare() -> None:
            guest = self._process.state.guests.get(shell.migration.guest)
            if guest is None or guest.id in self._host.copies or self._rng.random() < 0.03:
                self._process.here(self._tell, shell, ev.Abort("no room"))
                return
            copy = Copy(guest, shell.migration.epoch + 1, phase="waiting", migration=shell.migration.id)
            self._host.copies[guest.id] = copy
            self._process.here(self._tell, shell, ev.Prepared())

        self._host.by_shim(prepare)

    def _unanswered(self, shell: Shell) -> None:
        if shell.machine.state == handover.SourceState.PREPARING:
            self._tell(shell, ev.Abort("the destination does not answer"))

    def _do_ReportReady(self, shell: Shell, _effect: ev.ReportReady) -> None:
        id = shell.migration.id
        stream = self._world.streams.get(id)
        if stream is not None and not stream.closed:
            stream.destination = self._process
        self._world.network.send(self._host.id, shell.migration.source, Ready(id))
        if stream is None or stream.closed:
            self._later(shell, ev.StreamBroken("no stream"))

    def _do_Freeze(self, shell: Shell, _effect: ev.Freeze) -> None:
        def freeze() -> None:
            copy = self._copy(shell.migration)
            if copy is None or copy.phase not in ("running", "frozen") or self._rng.random() < 0.03:
                self._process.here(self._tell, shell, ev.FreezeFailed("a device does not answer"))
                return
            self._host.freeze(copy, "handover")
            self._process.here(self._tell, shell, ev.Frozen())

        self._host.by_shim(freeze)

    def _do_Thaw(self, shell: Shell, _effect: ev.Thaw) -> None:
        copy = self._copy(shell.migration)
        if copy is None or copy.phase != "frozen":
            return
        self._process.keepers.take_back(copy)
        if copy.lease_bound and self._process.keepers.entitled(copy):
            copy.deadline = max(copy.deadline, self._process.lease)
        self._host.let_run(copy)  # at once: the worst case for "two copies run"

    def _do_SendFinal(self, shell: Shell, _effect: ev.SendFinal) -> None:
        self._process.after(self._rng.random() * 0.1, self._release, shell)

    def _release(self, shell: Shell) -> None:
        """The moment at which the release is, or is not, handed to the stream."""
        stream = self._world.streams.get(shell.migration.id)
        if stream is None or stream.closed or stream.destination is None or self._rng.random() < 0.03:
            self._break(shell.migration.id)
            self._tell(shell, ev.Sent("no"))
            return
        if self._rng.random() < 0.15 or not self._world.network.reaches(
            self._host.id, shell.migration.destination
        ):
            self._break(shell.migration.id)
            self._later(shell, ev.Sent("maybe"))
            return
        receiver = stream.destination
        receiver.after(self._rng.random() * 0.1, receiver.moves.released, shell.migration.id)
        self._later(shell, ev.Sent("yes" if self._rng.random() < 0.9 else "maybe"))

    def released(self, id: str) -> None:
        """The release has arrived at this end of the stream, if that still is one."""
        stream = self._world.streams.get(id)
        shell = self._shells.get(id)
        if stream is None or shell is None or stream.closed or stream.destination is not self._process:
            return
        stream.released = True
        self._later(shell, ev.Received(self._rng.random() > 0.03))

    def _do_CancelStream(self, shell: Shell, _effect: ev.CancelStream) -> None:
        stream = self._world.streams.get(shell.migration.id)
        if shell.side == "destination" and stream is not None and stream.released:
            return
        self._break(shell.migration.id)
        if shell.side == "destination":
            self._later(shell, ev.StreamBroken("closed here"))

    def _break(self, id: str) -> None:
        stream = self._world.streams.get(id)
        if stream is None or stream.closed:
            return
        stream.closed = True
        ends = [stream.source] + ([stream.destination] if stream.destination and not stream.released else [])
        for process in ends:
            process.after(self._rng.random() * 0.05, process.moves.stream_broke, id)

    def stream_broke(self, id: str) -> None:
        """This end of the stream hears that it is closed."""
        shell = self._shells.get(id)
        if shell is not None:
            self._tell(shell, ev.StreamBroken("it broke"))

    def break_streams(self) -> None:
        """All connections of this process break."""
        for id in list(self._shells):
            self._break(id)

    def _do_Start(self, shell: Shell, _effect: ev.Start) -> None:
        told = self._copy(shell.migration)
        if told is not None:
            told.going = True

        def start() -> None:
            copy = self._copy(shell.migration)
            if told is not None:
                told.going = False
            kind = self._rng.random()
            if copy is None or copy.phase != "waiting" or kind < 0.02:
                if copy is not None:
                    self._host.kill(copy)
                self._process.here(self._tell, shell, ev.StartFailed(False, "the process ended"))
                return
            copy.deadline = self._process.lease if copy.lease_bound else 0.0
            self._host.start(copy)
            if kind < 0.04:
                self._host.kill(copy)
                self._process.here(self._tell, shell, ev.StartFailed(True, "it crashed at once"))
                return
            self._process.here(self._tell, shell, ev.Started())

        self._host.by_shim(start)

    def _do_Propose(self, shell: Shell, effect: ev.Propose) -> None:
        self._propose(effect.entry)

    def _propose(self, entry: entries.Entry) -> None:
        """The machines ask again until the log has it, so that nobody need wait for the answer."""
        sequence = self._process.propose(entry, lambda _index, _refused: None)
        self._process.after(5.0, self._process.give_up, sequence)

    def _do_Refuse(self, shell: Shell, effect: ev.Refuse) -> None:
        migration = shell.migration
        text = entries.refusal_text(migration.id, migration.guest, migration.epoch)
        self._propose(
            entries.Cancel(
                migration=migration.id,
                by=self._host.id,
                refusal=self._host.key.sign(text),
                reason=effect.reason,
            )
        )

    def _do_Sync(self, shell: Shell, _effect: ev.Sync) -> None:
        self._later(shell, ev.Synced(self._rng.random() > 0.1))

    def _do_Discard(self, shell: Shell, _effect: ev.Discard) -> None:
        def held() -> Copy | None:
            copy = self._copy(shell.migration)
            return copy if copy is not None and copy.migration == shell.migration.id else None

        shell.discards = held()

        def discard() -> None:
            copy = shell.discards or held()  # it may have been under way to be made
            if copy is not None:
                self._host.remove(copy)
                self._process.here(self._process.keepers.wake)
            self._process.here(self._tell, shell, ev.Discarded())

        self._host.by_shim(discard)

    def _do_Over(self, shell: Shell, effect: ev.Over) -> None:
        self._world.say(self._host.name, f"{shell.side} is over: {effect.outcome} {effect.reason}")
        self._shells.pop(shell.migration.id, None)
        copy = self._copy(shell.migration)
        if copy is not None and copy.migration == shell.migration.id and copy is not shell.discards:
            copy.migration = ""
            self._process.keepers.take_back(copy)
        self._process.keepers.wake()

    # At the coordinator.

    def coordinates(self, leads: bool) -> None:
        """This process coordinates from now on, or does not any more."""
        self._coordinating = leads
        self._coordinators.clear()
        if leads:
            self.look(self._process.state)

    def _coordinate(self, migration: entries.Migration) -> None:
        machine = self._coordinators.get(migration.id)
        if migration.state != "open":
            if machine is not None:
                del self._coordinators[migration.id]
            return
        if machine is None:
            guest = self._process.state.guests[migration.guest]
            machine = handover.Coordinator(migration, failover=guest.on_partition == "freeze")
            self._coordinators[migration.id] = machine
            self._ask_coordinator(migration.id, ev.Begin())

    def _ask_coordinator(self, id: str, event: ev.Event, lost: tuple[str, int] | None = None) -> None:
        machine = self._coordinators.get(id)
        if machine is None:
            return
        for effect in machine.handle(event, self._host.now):
            if isinstance(effect, Send):
                self._send(effect.peer, effect.message)
            elif isinstance(effect, WakeAt):
                self._process.after(
                    max(0.05, effect.at - self._host.now), self._ask_coordinator, id, Woken(id)
                )
            elif isinstance(effect, ev.Propose) and lost is not None:
                self._process.fence(lost[0], effect.entry, lost[1])
            elif isinstance(effect, ev.Propose) and effect.entry.reason != LEASE_RAN_OUT:  # type: ignore[attr-defined]
                self._propose(effect.entry)

    def peer_lost(self, peer: str, term: int) -> None:
        """The lease of a peer is out by every clock: what was released to it goes back to its source, what
        comes from it runs at its destination, or never will.
        """
        for id, machine in list(self._coordinators.items()):
            if machine.migration.destination == peer:
                self._ask_coordinator(id, ev.PeerLost(), (peer, term))
            elif machine.migration.source == peer:
                self._send(machine.migration.destination, ev.Settle(id))

    def operator_adopts(self, id: str) -> None:
        """An operator says that the destination's copy does not run and never will."""
        self._ask_coordinator(id, ev.Adopt())

    def _lost(self, id: str) -> None:
        self._ask_coordinator(id, ev.CopyLost(id))
