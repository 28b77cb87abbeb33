# SPDX-License-Identifier: Apache-2.0
"""One life of a peer: the real machine (`proto.peer`), and a shell round it made of simulated parts.

What the machine wants is carried out as `mobid` would do it: messages go to the network, writes to the disk,
deadlines to the shims. A process can be stopped for a while between any two events, and also between what it
decided and its carrying that out; then it goes on with what is stale by now.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proto import entries
from proto import peer_events as pe
from proto.api import OperationError
from proto.lease_events import Deadline, PeerFound, PeerLost
from proto.machine import Persisted, Send, WakeAt, Woken
from proto.raft import events as raft
from proto.state import State
from tests.sim.keepers import Keepers
from tests.sim.moves import SHELL_MESSAGES, Moves

if TYPE_CHECKING:
    from tests.sim.hosts import Host

WALL_EVERY = 60.0
LEASE_GUARD = 0.02
STANDING_EVERY = 10.0
FAREWELL = 0.5

Answer = Callable[[int, OperationError | None], None]
"""Called with the index at which a proposal was decided, and why it was refused."""


@dataclass(slots=True)
class Timer:
    """When the machine wants to be woken (BOOTTIME), and the earliest wake-up that is under way for it."""

    at: float
    armed: float


class Process:
    """From start to crash. `Keepers` and `Moves` are its parts that look after guests and handovers."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.world = host.world
        self.alive = True
        self.stopped = False
        self.life = host.starts = host.starts + 1
        self.boot = self.life
        self.lease = 0.0
        """Deadline of the own lease in BOOTTIME seconds; 0 if there was never one."""
        self.role: raft.Role = "observer"
        self.term = 0
        self.leader = ""
        self.changed_at = 0.0
        self.hold_next = False
        """Stop between the next decision and its being carried out."""
        self.fresh = False
        """Whether a linearizable read has succeeded since the start."""
        self._timers: dict[str, Timer] = {}
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._held: list[Any] = []
        """Effects that were decided before it was stopped."""
        self._proposals: dict[int, tuple[entries.Proposal, Answer]] = {}
        self._reads: dict[int, Callable[[State | None], None]] = {}
        self._sequence = 0
        self._cookie = 0
        rng = random.Random(self.world.rng.random())
        self.machine = self.world.new_machine(host, rng)
        self.state: State = self.machine.state
        self.moves = Moves(self)
        self.keepers = Keepers(self)
        self._perform: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            WakeAt: self._wake_at,
            raft.Persist: self._persist,
            raft.Became: self._became,
            raft.ReadFailed: lambda effect: self._read_done(effect.cookie, None),
            pe.Readable: lambda effect: self._read_done(effect.cookie, effect.state),
            pe.Applied: self._applied,
            pe.Restored: self._restored,
            Deadline: self._deadline,
            PeerLost: lambda effect: self.moves.peer_lost(effect.peer, effect.term),
            PeerFound: lambda _effect: None,
        }

    def begin(self) -> None:
        """The shell starts: the wall clock, what was stored, then guests and handovers."""
        self._tell_wall()
        self.feed(Woken(raft.TIMER))
        while self.machine.behind:
            self.feed(Woken(raft.TIMER))
        self.state = self.machine.state
        self.moves.take_up()
        self._ask_fresh()
        self._ask_standing()

    def end(self) -> None:
        """The process dies: `kill -9`."""
        self.alive = False
        self.host.disk.crash()
        self.host.process = None
        self.moves.died()

    # Events.

    def feed(self, event: Any) -> None:
        """Tell the machine, now or when the process goes on."""
        self.here(self._feed, event)

    def here(self, run: Callable[..., None], *arguments: Any) -> None:
        """Do something in this process, now or when it goes on; not at all once it has died."""
        if not self.alive:
            return
        if self.stopped:
            self._inbox.append((run, arguments))
        else:
            run(*arguments)

    def after(self, seconds: float, run: Callable[..., None], *arguments: Any) -> None:
        """Do something in this process after a while (its timers run on CLOCK_MONOTONIC)."""
        self.world.at(seconds, self._later, self.host.clock.lost, run, arguments)

    def _later(self, lost: float, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self.alive:
            return
        more = self.host.clock.lost - lost
        if more > 0:
            self.world.at(more, self._later, self.host.clock.lost, run, arguments)
        else:
            self.host.after(0.0, self.here, run, *arguments)

    def _feed(self, event: Any) -> None:
        effects = self.machine.handle(event, self.host.now)
        if not effects:
            return
        if self.hold_next and not isinstance(event, pe.Sighted):
            self.hold_next = False
            self.stop(self.world.rng.choice((0.5, 2.0, 5.0, 15.0)) * self.world.rng.random())
            self._held = effects
            return
        self._carry_out(effects)

    def _carry_out(self, effects: list[Any]) -> None:
        perform = self._perform
        for effect in effects:
            if not self.alive:
                return
            perform[type(effect)](effect)

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT later; shims and switch go on."""
        if self.stopped or not self.alive:
            return
        self.world.say(self.host.name, f"peer is stopped for {seconds:.2f} s")
        self.stopped = True
        self.world.at(seconds, self._go_on)

    def _go_on(self) -> None:
        """First what was decided before is carried out; then what came meanwhile, in any order."""
        if not self.alive:
            return
        if self.host.still:
            self.host.after(0.0, self._go_on)
            return
        self.world.say(self.host.name, "peer goes on")
        self.stopped = False
        held, self._held = self._held, []
        inbox, self._inbox = _shuffled(self._inbox, self.world.rng), []
        self._carry_out(held)
        for run, arguments in inbox:
            self.host.after(0.0, self.here, run, *arguments)

    # Effects of the machine.

    def _send(self, effect: Send) -> None:
        self.world.network.send(self.host.id, effect.peer, effect.message)

    def _wake_at(self, effect: WakeAt) -> None:
        timer = self._timers.get(effect.timer)
        if timer is None:
            timer = self._timers[effect.timer] = Timer(effect.at, float("inf"))
        timer.at = effect.at
        if effect.at < timer.armed:
            timer.armed = effect.at
            self._arm(effect.timer, effect.at)

    def _arm(self, name: str, at: float) -> None:
        seconds = max(0.0, self.host.clock.real(at) - self.world.now)
        self.world.at(seconds, self._later, self.host.clock.lost, self._timer_due, (name, at))

    def _timer_due(self, name: str, armed: float) -> None:
        timer = self._timers[name]
        if timer.armed != armed:
            return
        timer.armed = float("inf")
        if timer.at > self.host.now:
            timer.armed = timer.at
            self._arm(name, timer.at)
        else:
            timer.at = float("inf")
            self._feed(Woken(name))

    def _persist(self, effect: raft.Persist) -> None:
        done = self._persisted
        if not self.host.disk.write(effect.data, lambda: done(effect.key)):
            self.world.say(self.host.name, "the disk fails: the peer ends")
            self.world.crash(self.host)

    def _persisted(self, key: str) -> None:
        self.host.after(0.0, self.feed, Persisted(key))

    def _became(self, effect: raft.Became) -> None:
        self.world.say(self.host.name, effect)
        if (effect.role == "leader") and (self.role, self.term) != ("leader", effect.term):
            self.world.invariants.leads(self.host, effect.term)
        led = self.role == "leader" and self.term == effect.term
        self.role, self.term, self.leader = effect.role, effect.term, effect.leader
        if (effect.role == "leader") != led:
            self.moves.coordinates(effect.role == "leader")

    def _applied(self, effect: pe.Applied) -> None:
        proposal = effect.proposal
        of_log = effect.index == effect.state.index
        if of_log:
            self.world.invariants.applied(self.host, effect)
            self.host.disk.commit = effect.index
        if effect.state.members is not self.state.members:
            self.host.contacts |= effect.state.members.keys()
        self.state = effect.state
        if proposal is not None and (proposal.client, proposal.boot) == (self.host.id, self.boot):
            self._decided(proposal, effect)
        if self._left:
            self.after(FAREWELL, self.host.leave)
        if of_log:
            self._look(proposal.entry if proposal is not None and effect.refused is None else None)

    @property
    def _left(self) -> bool:
        member = self.state.members.get(self.host.id)
        return member is not None and member.status == "left"

    def _ask_standing(self) -> None:
        """Who was away while it was evicted gets no records any more, and asks around."""
        if self._left:
            self.host.leave()
            return
        if not self.leased:
            other = self.world.some_process()
            if other is not None and self.world.network.reaches(other.host.id, self.host.id):
                member = other.state.members.get(self.host.id)
                if member is not None and member.status == "left" and other.state.index > self.state.index:
                    self.host.leave()
                    return
        self.after(STANDING_EVERY, self._ask_standing)

    def _look(self, entry: entries.AnyEntry | None) -> None:
        if entry is not None and entry.kind not in QUIET:
            self.moves.look(self.state)
            self.keepers.wake()

    def _decided(self, proposal: entries.Proposal, effect: pe.Applied) -> None:
        waiting = self._proposals.pop(proposal.sequence, None)
        if waiting is not None:
            waiting[1](effect.index, effect.refused)

    def _restored(self, effect: pe.Restored) -> None:
        self.world.say(self.host.name, f"restored to {effect.state.index}")
        self.world.invariants.same_state(self.host, effect.state.index, effect.state)
        self.host.contacts |= effect.state.members.keys()
        self.state = effect.state
        self.host.disk.commit = max(self.host.disk.commit, effect.state.index)
        self.moves.look(self.state)
        self.keepers.wake()

    def _deadline(self, effect: Deadline) -> None:
        if effect.at <= self.lease:
            return
        self.lease = effect.at
        self.world.invariants.leased(self.host, self.state, effect.at)
        for copy in self.host.copies.values():
            if copy.lease_bound and self.keepers.entitled(copy):
                self.host.after(0.001 * self.world.rng.random(), self.host.extend, copy, effect.at)
        self.moves.lease_valid()
        self.keepers.wake()

    @property
    def leased(self) -> bool:
        """Whether the own lease holds now."""
        return self.host.now < self.lease - LEASE_GUARD

    # What the parts of the shell ask for.

    def propose(self, entry: entries.Entry, answer: Answer, request: str = "") -> int:
        """Propose in the own name; `answer` is called once it is decided, unless it is given up before."""
        self._sequence += 1
        proposal = entries.Proposal(
            entry=entry, client=self.host.id, boot=self.boot, sequence=self._sequence, request=request
        )
        self._proposals[self._sequence] = (proposal, answer)
        self.host.after(0.0, self.feed, pe.Proposed(proposal, self.wall))
        return self._sequence

    def give_up(self, sequence: int) -> None:
        """Nobody waits for this proposal any more."""
        if self._proposals.pop(sequence, None) is not None:
            self.host.after(0.0, self.feed, pe.GivenUp(sequence))

    def fence(self, peer: str, entry: entries.Entry, term: int) -> None:
        """At the coordinator: what follows from a lost lease."""
        self.host.after(0.0, self.feed, pe.Fence(peer, entry, term, self.wall))

    def read(self, answer: Callable[[State | None], None], fresh: bool = False) -> None:
        """A linearizable read; `answer` gets None if it failed."""
        self._cookie += 1
        self._reads[self._cookie] = answer
        self.host.after(0.0, self.feed, raft.Read(self._cookie, fresh))

    def _read_done(self, cookie: int, state: State | None) -> None:
        answer = self._reads.pop(cookie, None)
        if answer is not None:
            answer(state)

    @property
    def wall(self) -> float:
        return self.host.clock.wall(self.world.now)

    def _tell_wall(self) -> None:
        self.feed(pe.Wall(self.wall))
        self.after(WALL_EVERY, self._tell_wall)

    def _ask_fresh(self) -> None:
        """What is stored may be old: nothing new is begun before a read has shown that it is not."""
        if not self.fresh:
            self.read(self._fresh_answer)

    def _fresh_answer(self, state: State | None) -> None:
        if state is None:
            self.after(0.5, self._ask_fresh)
            return
        self.fresh = True
        self.keepers.wake()

    def _knows(self, sender: str) -> bool:
        """The channel takes messages of members only; who knows an old state goes by whom it knew before."""
        member = self.state.members.get(sender)
        return member.status == "member" if member is not None else sender in self.host.contacts

    def receive(self, sender: str, message: Any) -> None:
        """A message arrived at this host."""
        if not self._knows(sender):
            return
        if isinstance(message, SHELL_MESSAGES):
            self.moves.receive(sender, message)
        else:
            self._feed(raft.Received(sender, message))


QUIET = frozenset({"put-lab", "remove-lab", "add-token", "revoke-token", "set-lease"})
"""Entries after which no guest and no handover needs a look."""


def _shuffled(inbox: list[Any], rng: random.Random) -> list[Any]:
    """Timers, messages and answers in any order, but what became durable in its own."""
    written = [item for item in inbox if item[1] and isinstance(item[1][0], Persisted)]
    mixed = list(inbox)
    rng.shuffle(mixed)
    in_order = iter(written)
    return [next(in_order) if item[1] and isinstance(item[1][0], Persisted) else item for item in mixed]
