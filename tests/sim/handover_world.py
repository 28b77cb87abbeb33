# SPDX-License-Identifier: Apache-2.0
"""A small world for the handover's machines: three hosts, their processes, a log, and everything that fails.

One seed is one schedule. Time is simulated; each step takes the earliest thing due, lets it happen, and then
checks that at most one copy of the guest runs. Peers crash between any two steps and come back with what was
durable; what a crashed peer had asked of its shim is still carried out, as a real shim would. Streams break,
releases arrive with or without an answer, messages are lost, links are cut, hosts lose all their processes.
The log is the real catalog (`proto.catalog.apply`).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from proto import catalog, entries, handover
from proto import handover_events as ev
from proto.machine import Persist, Persisted, Send, WakeAt, Woken
from proto.state import Refused, State
from tests.sim.members import member

Copy = Literal["running", "frozen", "waiting", "none"]

GUEST = "lab/guest"
MIGRATION = "0123456789abcdef" * 2
FAULTS_UNTIL = 25.0
ENDS_BY = 200.0
LEASE, MARGIN = 3.0, 1.0


class Violation(AssertionError):
    """What must never be, at this seed."""


@dataclass
class Stream:
    """The bulk connection: closed by either end once; the release passes at most once."""

    closed: bool = False
    released: bool = False


@dataclass
class Host:
    """A host: what is on its disk, its copy of the guest, and its peer, which may be down."""

    name: str
    id: str
    key: Ed25519PrivateKey
    copy: Copy = "none"
    up: bool = True
    gone: bool = False
    life: int = 0
    boot: int = 0
    note: ev.Note | None = None
    persist_free: float = 0.0
    shim_free: float = 0.0
    applied: int = 0
    deadline: float = 0.0
    machine: handover.Source | handover.Destination | None = None
    coordinator: handover.Coordinator | None = None
    timers: dict[str, int] = field(default_factory=dict)


@cache
def founded(lease_bound: bool) -> tuple[State, tuple[Ed25519PrivateKey, ...]]:
    """A catalog of three peers, one guest at the first, and its handover to the second, just opened."""
    made = [member(name, seed) for seed, name in enumerate(("source", "destination", "coordinator"), 1)]
    source, destination, coordinator = (m for m, _ in made)
    token = entries.Token(id="t", secret_hash=b"", role="peer", uses=2, expires=1e9)
    partition: Literal["run", "freeze"] = "freeze" if lease_bound else "run"
    guest = entries.Guest(
        key=GUEST, id="g1", image="i", memory=1 << 26, owner=source.id, on_partition=partition
    )
    opened = entries.Handover(
        migration=MIGRATION,
        guest=GUEST,
        epoch=1,
        source=source.id,
        destination=destination.id,
        timeout=20.0,
    )
    todo: list[entries.AnyEntry] = [
        entries.Found(mesh="m", member=coordinator),
        entries.AddToken(token=token),
        entries.AddPeer(member=source.model_copy(update={"token": "t"})),
        entries.AddPeer(member=destination.model_copy(update={"token": "t"})),
        entries.PutLab(lab=entries.Lab(name="lab", model={})),
        entries.AddGuest(guest=guest),
        opened,
    ]
    state = State()
    for index, entry in enumerate(todo, 1):
        proposal = entries.Proposal(entry=entry, client=coordinator.id, boot=1, sequence=index, time=0.0)
        state = catalog.apply(state, index, proposal)
    return state, tuple(key for _, key in made)


class World:
    """One seed's schedule, from the opened handover to rest."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.lease_bound = self.rng.random() < 0.3
        self.log, keys = founded(self.lease_bound)
        migration = self.log.migrations[MIGRATION]
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.trace: list[str] = []
        self.stream = Stream()
        self.sequence = itertools.count(1)
        self.cut: set[frozenset[str]] = set()
        self.last_grant = 0.0
        self.ran = False
        self.ran_and_died = False
        ids = (migration.source, migration.destination, self.log.find_peer("coordinator").id)
        self.hosts = {n: Host(n, i, k) for n, i, k in zip(("S", "D", "C"), ids, keys, strict=True)}
        self.by_id = {host.id: host for host in self.hosts.values()}
        self.S, self.D, self.C = self.hosts.values()
        self.S.copy = "running"
        self.D.deadline = LEASE
        self.S.machine = handover.Source(migration)
        self.D.machine = handover.Destination(migration, self.lease_bound)
        for host in (self.S, self.D):
            self.feed(host, ev.Begin())
            self.at(self.delay(), partial(self.follow, host))
        self.start_coordinator()
        self.at(0.0, self.renew_lease)
        self.plan_faults()

    # Time.

    def at(self, after: float, run: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + after, next(self.order), run))

    def delay(self) -> float:
        return self.rng.choice((0.001, 0.01, 0.1, 1.0)) * self.rng.random()

    def say(self, text: str) -> None:
        self.trace.append(f"{self.now:9.4f} {text}")

    def run(self) -> None:
        """To the end of time; raises `Violation`."""
        while self.queue and self.now < ENDS_BY:
            self.now, _, due = heapq.heappop(self.queue)
            due()
            if self.S.copy == "running" and self.D.copy == "running":
                raise Violation("two copies run")
        self.check_end()

    def check_end(self) -> None:
        migration, guest = self.log.migrations[MIGRATION], self.log.guests[GUEST]
        copies = f"S {self.S.copy}, D {self.D.copy}, log {migration.state}"
        if migration.state == "open":
            raise Violation(f"the handover never ended: {copies}")
        if migration.state == "done":
            right = (guest.owner, guest.epoch) == (self.D.id, 2)
            alive = (self.D.copy, self.S.copy) == ("running", "none")
            if not right or not (alive or (self.ran_and_died and self.S.copy != "running")):
                raise Violation(f"done, but {copies}, owner {self.by_id[guest.owner].name}")
            return
        epoch = 3 if migration.state == "failed-over" else 1
        if (guest.owner, guest.epoch) != (self.S.id, epoch) or self.S.copy != "running":
            raise Violation(f"{copies}, epoch {guest.epoch}")
        if self.D.copy != "none" and not self.D.gone:
            raise Violation(f"the destination kept its copy: {copies}")

    # Faults.

    def plan_faults(self) -> None:
        faults: list[Callable[[], None]] = [
            lambda: self.crash(self.S),
            lambda: self.crash(self.D),
            lambda: self.crash(self.C),
            self.break_stream,
            lambda: self.cut_link("S", "D"),
            lambda: self.cut_link("S", "C"),
            lambda: self.cut_link("D", "C"),
            lambda: self.feed(self.S, ev.Abort("a user said so")),
            lambda: self.feed(self.D, ev.Abort("the destination is being drained")),
            lambda: self.deliver(self.S, ev.Settle(MIGRATION)),
            lambda: self.deliver(self.D, ev.Settle(MIGRATION)),
            self.lose_host,
        ]
        for _ in range(self.rng.choice((0, 1, 1, 2, 3, 5))):
            span = self.rng.choice((1.0, 5.0, FAULTS_UNTIL))
            self.at(span * self.rng.random(), self.rng.choice(faults))
        if self.rng.random() < 0.05:
            self.at(10 * self.rng.random(), self.lose_host_for_ever)
        self.at(30.0 * self.rng.random(), lambda: self.feed(self.S, ev.Abort("the deadline has passed")))

    def crash(self, host: Host) -> None:
        """The peer dies; its shims live, its sending and receiving processes die with it."""
        if not host.up:
            return
        self.say(f"{host.name} crashes")
        host.up, host.machine, host.coordinator = False, None, None
        host.life += 1
        if host is not self.C:
            self.break_stream()
        self.at(self.delay() * 3, lambda: self.restart(host))

    def restart(self, host: Host) -> None:
        if host.gone or host.up:
            return
        if host.shim_free > self.now or host.persist_free > self.now:
            later = max(host.shim_free, host.persist_free) - self.now
            self.at(later + 1e-6, lambda: self.restart(host))
            return
        self.say(f"{host.name} restarts: note {host.note}, copy {host.copy}")
        host.up = True
        if host is self.C:
            self.last_grant = self.now
            self.start_coordinator()
            return
        self.adopt(host)
        self.at(self.delay(), lambda: self.follow(host))

    def adopt(self, host: Host) -> None:
        migration = self.log.migrations[MIGRATION]
        is_source = host is self.S
        host.machine = (
            handover.Source(migration) if is_source else handover.Destination(migration, self.lease_bound)
        )
        copy: Copy = host.copy
        self.feed(host, ev.Adopted(host.note, copy))
        if host.applied:
            self.feed(host, ev.Logged(migration.state))

    def lose_host(self) -> None:
        """The destination's host reboots: its shims die too."""
        if self.D.gone:
            return
        self.kill_copy(self.D)
        self.D.boot += 1
        self.D.shim_free = self.now
        self.crash(self.D)

    def lose_host_for_ever(self) -> None:
        self.lose_host()
        self.D.gone, self.D.up, self.D.machine = True, False, None
        self.say("D is gone for ever")
        self.at(60.0, self.operator_adopts)

    def operator_adopts(self) -> None:
        if self.C.coordinator:
            self.perform_all(self.C, self.C.coordinator.handle(ev.Adopt(), self.now))
        else:
            self.at(1.0, self.operator_adopts)

    def kill_copy(self, host: Host) -> None:
        if host.copy in ("running", "frozen") and host is self.D:
            self.ran_and_died = True
        host.copy = "none"

    def break_stream(self) -> None:
        if self.stream.closed:
            return
        self.say("the stream breaks")
        self.stream.closed = True
        for host in (self.S, self.D):
            if not (host is self.D and self.stream.released):
                life = host.life
                self.at(self.delay(), partial(self.reply, host, life, ev.StreamBroken("it broke")))

    def cut_link(self, a: str, b: str) -> None:
        pair = frozenset((a, b))
        self.say(f"{a}-{b} is cut")
        self.cut.add(pair)
        self.at(self.delay() * 5, lambda: self.cut.discard(pair))

    def reaches(self, a: Host, b: Host) -> bool:
        return frozenset((a.name, b.name)) not in self.cut and not (a.gone or b.gone)

    # What the machines are told, and what they want.

    def feed(self, host: Host, event: ev.Event) -> None:
        if host.up and host.machine:
            before = host.machine.state
            effects = host.machine.handle(event, self.now)
            self.say(f"{host.name} {before} + {event} -> {host.machine.state}")
            self.perform_all(host, effects)

    def reply(self, host: Host, life: int, event: ev.Event) -> None:
        """An answer to something the peer of this life asked for."""
        if host.life == life:
            self.feed(host, event)

    def perform_all(self, host: Host, effects: list[ev.Effect]) -> None:
        for effect in effects:
            getattr(self, "do_" + type(effect).__name__)(host, effect)

    def answer(self, host: Host, event: ev.Event) -> None:
        life = host.life
        self.at(self.delay(), lambda: self.reply(host, life, event))

    def by_shim(self, host: Host, run: Callable[[], ev.Event]) -> None:
        """The shim carries it out, in order, whether or not the peer still lives; then it answers."""
        life, boot = host.life, host.boot
        host.shim_free = max(host.shim_free, self.now) + self.delay()

        def due() -> None:
            if host.boot != boot:
                return
            event = run()
            self.say(f"{host.name}'s shim: {host.copy}")
            self.at(0.0, lambda: self.reply(host, life, event))

        self.at(host.shim_free - self.now, due)

    def do_Persist(self, host: Host, effect: Persist) -> None:
        life = host.life
        host.persist_free = max(host.persist_free, self.now) + self.delay() * self.rng.choice((0.1, 1.0))

        def due() -> None:
            if host.life == life or self.rng.random() < 0.5:
                host.note = effect.data
            self.reply(host, life, Persisted(effect.key))

        self.at(host.persist_free - self.now, due)

    def do_WakeAt(self, host: Host, effect: WakeAt) -> None:
        life = host.life
        number = host.timers[effect.timer] = host.timers.get(effect.timer, 0) + 1

        def due() -> None:
            if host.life != life or host.timers[effect.timer] != number:
                return
            if host is self.C and host.coordinator:
                self.perform_all(host, host.coordinator.handle(Woken(effect.timer), self.now))
            else:
                self.feed(host, Woken(effect.timer))

        self.at(max(0.0, effect.at - self.now), due)

    def do_Send(self, host: Host, effect: Send) -> None:
        target = self.by_id[effect.peer] if effect.peer else self.C
        if self.rng.random() < 0.1 or not self.reaches(host, target):
            return
        self.at(self.delay(), lambda: self.deliver(target, effect.message))

    def deliver(self, target: Host, message: ev.Event) -> None:
        if not target.up:
            return
        if target is self.C:
            if target.coordinator:
                self.perform_all(target, target.coordinator.handle(message, self.now))
        elif isinstance(message, ev.AskDurable) and target.copy == "running" and target.note is None:
            self.do_Send(target, Send(self.S.id, ev.Durable(MIGRATION)))
        elif isinstance(message, ev.Settle) and self.has_forgotten(target):
            self.adopt(target)
        else:
            self.feed(target, message)

    def has_forgotten(self, host: Host) -> bool:
        return bool(host.machine and host.machine.state == "over") and self.known(host) == "open"

    def known(self, host: Host) -> str:
        return self.log.migrations[MIGRATION].state if host.applied == self.log.index else "open"

    def do_Prepare(self, host: Host, _effect: ev.Prepare) -> None:
        if host is self.S:
            return  # the destination begins by itself here

        def run() -> ev.Event:
            if self.rng.random() < 0.05:
                return ev.Abort("no room")
            host.copy = "waiting"
            return ev.Prepared()

        self.by_shim(host, run)

    def do_ReportReady(self, host: Host, _effect: ev.ReportReady) -> None:
        if self.rng.random() > 0.05 and self.reaches(host, self.S):
            self.answer(self.S, ev.Prepared())
            self.at(1.0 + self.delay() * 3, lambda: self.feed(self.S, ev.Switch()))

    def do_Freeze(self, host: Host, _effect: ev.Freeze) -> None:
        def run() -> ev.Event:
            if self.rng.random() < 0.05:
                return ev.FreezeFailed("a device does not answer")
            host.copy = "frozen"
            return ev.Frozen()

        self.by_shim(host, run)

    def do_Thaw(self, host: Host, _effect: ev.Thaw) -> None:
        host.copy = "running"  # at once: the worst case for "two copies run"

    def do_SendFinal(self, host: Host, _effect: ev.SendFinal) -> None:
        life = host.life
        self.at(self.delay(), lambda: self.release(host, life))

    def release(self, host: Host, life: int) -> None:
        """The moment at which the release is, or is not, handed to the stream."""
        arrives = self.rng.random() < 0.8 and not self.stream.closed
        heard = self.rng.random() < 0.9
        if self.stream.closed or host.life != life or self.rng.random() < 0.05:
            self.break_stream()
            self.reply(host, life, ev.Sent("no"))
            return
        if not arrives:
            self.break_stream()
            self.answer(host, ev.Sent("maybe"))
            return
        self.at(self.delay(), self.release_arrives)
        self.answer(host, ev.Sent("yes" if heard else "maybe"))

    def release_arrives(self) -> None:
        if self.stream.closed or not self.D.up:
            return
        self.stream.released = True
        self.answer(self.D, ev.Received(self.rng.random() > 0.05))

    def do_CancelStream(self, host: Host, _effect: ev.CancelStream) -> None:
        if host is self.D and self.stream.released:
            return
        self.break_stream()
        if host is self.D:
            self.answer(host, ev.StreamBroken("closed here"))

    def do_Start(self, host: Host, _effect: ev.Start) -> None:
        def run() -> ev.Event:
            kind = self.rng.random()
            if host.copy != "waiting" or kind < 0.03:
                self.kill_copy(host)
                return ev.StartFailed(False, "the process ended")
            if kind < 0.05:
                self.kill_copy(host)
                self.ran = self.ran_and_died = True
                return ev.StartFailed(True, "it crashed at once")
            self.ran = True
            host.copy = "frozen" if self.lease_bound and self.now > host.deadline else "running"
            return ev.Started()

        self.by_shim(host, run)

    def do_Sync(self, host: Host, _effect: ev.Sync) -> None:
        self.answer(host, ev.Synced(self.rng.random() > 0.1))

    def do_Discard(self, host: Host, _effect: ev.Discard) -> None:
        def run() -> ev.Event:
            host.copy = "none"
            return ev.Discarded()

        self.by_shim(host, run)

    def do_Over(self, host: Host, effect: ev.Over) -> None:
        self.say(f"{host.name} is over: {effect.outcome} {effect.reason}")

    # The log.

    def do_Propose(self, host: Host, effect: ev.Propose) -> None:
        self.propose(host, effect.entry)

    def do_Refuse(self, host: Host, effect: ev.Refuse) -> None:
        signature = host.key.sign(entries.refusal_text(MIGRATION, GUEST, 1))
        self.propose(
            host,
            entries.Cancel(migration=MIGRATION, by=host.id, refusal=signature, reason=effect.reason),
        )

    def propose(self, host: Host, entry: entries.Entry) -> None:
        if self.reaches(host, self.C) and self.rng.random() > 0.1:
            self.at(self.delay(), lambda: self.append(host, entry))

    def append(self, host: Host, entry: entries.Entry) -> None:
        if not self.C.up:
            return
        index = self.log.index + 1
        proposal = entries.Proposal.model_validate(
            {"entry": entry, "client": host.id, "boot": 2, "sequence": next(self.sequence), "time": self.now}
        )
        try:
            self.log = catalog.apply(self.log, index, proposal)
        except Refused as refused:
            self.say(f"the log refuses {entry.__class__.__name__}: {refused}")
            return
        self.say(f"logged: {entry}")
        if isinstance(entry, entries.Cancel) and self.ran:
            raise Violation("a handover was cancelled whose guest had run at the destination")
        if self.C.coordinator:
            told = ev.Logged(self.log.migrations[MIGRATION].state)
            self.perform_all(self.C, self.C.coordinator.handle(told, self.now))

    def follow(self, host: Host) -> None:
        """Peers follow the log some time later."""
        if not host.up:
            return
        if self.C.up and self.reaches(host, self.C) and host.applied != self.log.index:
            host.applied = self.log.index
            self.feed(host, ev.Logged(self.log.migrations[MIGRATION].state))
        life = host.life
        self.at(0.2 + self.delay(), lambda: self.follow(host) if host.life == life else None)

    def start_coordinator(self) -> None:
        self.C.coordinator = handover.Coordinator(self.log.migrations[MIGRATION], self.lease_bound)
        self.perform_all(self.C, self.C.coordinator.handle(ev.Begin(), self.now))
        told = ev.Logged(self.log.migrations[MIGRATION].state)
        self.perform_all(self.C, self.C.coordinator.handle(told, self.now))

    # The destination's lease: its shim freezes what runs when the deadline passes.

    def renew_lease(self) -> None:
        if not self.lease_bound:
            return
        if self.C.up and self.D.up and self.reaches(self.C, self.D):
            self.last_grant, self.D.deadline = self.now, self.now + LEASE
            self.D.applied = self.log.index
            self.feed(self.D, ev.Logged(self.log.migrations[MIGRATION].state))
            state = self.D.machine.state if self.D.machine else "over"
            if self.D.copy == "frozen" and (state in ("running", "syncing") or self.known(self.D) == "done"):
                self.D.copy = "running"
            self.feed(self.D, ev.LeaseValid())
        elif self.D.copy == "running" and self.now > self.D.deadline:
            self.say("the destination's lease ran out")
            self.D.copy = "frozen"
        if self.C.coordinator and self.now > self.last_grant + LEASE + MARGIN:
            self.perform_all(self.C, self.C.coordinator.handle(ev.PeerLost(), self.now))
        self.at(0.3, self.renew_lease)
