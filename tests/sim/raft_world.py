# SPDX-License-Identifier: Apache-2.0
"""A small world for the Raft machine alone: replicas, their disks and clocks, a network, and all that fails.

One seed is one schedule. Messages are lost, doubled, late and out of order; links are cut, also in one
direction only; peers crash and lose what was not yet durable, or their whole disk; disks are slow; clocks run
at different speeds, and a peer may stop for seconds in which its clock goes on. Meanwhile commands are
proposed, read, compacted away, voters changed and leadership handed over. After every event:

* a term has at most one leader, and it has every record that was committed in earlier terms;
* two records with the same index and term are equal, and so are those before them;
* what is committed is the same everywhere, and so is the state that a snapshot brings;
* a read sees everything that anybody saw before it was asked;
* no old leader's round begun within a new leader's `quiet` was answered by a quorum.

When the faults stop, everybody must come to the same end of the log soon.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from proto.log import Record
from proto.machine import Persisted, Send, WakeAt, Woken
from proto.raft import events as ev
from proto.raft.configuration import Configuration
from proto.raft.machine import Raft

FAULTS_UNTIL = 12.0
ENDS_BY = 60.0
DRIFT = 0.04
SETTINGS = ev.Settings(heartbeat=0.2, election=1.0, append_bytes=400, inflight=8, part_bytes=9, drift=DRIFT)


class Violation(AssertionError):
    """What must never be, at this seed."""


@dataclass
class Disk:
    """What is durable."""

    ballot: ev.Ballot = field(default_factory=ev.Ballot)
    snapshot: ev.Snapshot = field(default_factory=ev.Snapshot)
    base_index: int = 0
    base_term: int = 0
    records: list[Record] = field(default_factory=list)
    commit: int = 0
    recovering: bool = False

    def write(self, data: ev.Durable) -> None:
        if data.ballot:
            self.ballot = data.ballot
        if data.truncate is not None:
            del self.records[max(0, data.truncate - self.base_index - 1) :]
        if data.snapshot:
            self.snapshot = data.snapshot
        if data.keep is not None and data.keep > self.base_index + 1:
            kept = [record for record in self.records if record.index >= data.keep]
            known = {record.index: record.term for record in self.records}
            if data.snapshot:
                known[data.snapshot.index] = data.snapshot.term
            self.base_index, self.base_term = data.keep - 1, known[data.keep - 1]
            self.records = kept
        if data.records:
            end = self.base_index + len(self.records)
            if data.records[0].index != end + 1:
                raise Violation(f"a record {data.records[0].index} is written after {end}")
            self.records.extend(data.records)
        if data.recovered:
            self.recovering = False

    def stored(self) -> ev.Stored:
        end = self.base_index + len(self.records)
        if self.commit > max(end, self.snapshot.index):
            raise Violation(f"{self.commit} was handed out as committed, but the log on disk ends at {end}")
        return ev.Stored(
            ballot=self.ballot,
            snapshot=self.snapshot,
            base_index=self.base_index,
            base_term=self.base_term,
            records=list(self.records),
            commit=self.commit,
            recovering=self.recovering,
        )


@dataclass
class Host:
    """A peer: its disk, its clock, and its machine while it is up."""

    name: str
    rate: float
    offset: float
    disk: Disk = field(default_factory=Disk)
    machine: Raft | None = None
    life: int = 0
    paused_until: float = 0.0
    disk_free: float = 0.0
    slow: float = 1.0
    wake: int = 0
    applied: int = 0
    writes: deque[ev.Durable] = field(default_factory=deque)
    role: str = ""
    led: int = 0
    nap: bool = False
    """It stops for a while after its next heartbeat."""

    def clock(self, now: float) -> float:
        return self.offset + self.rate * now


@dataclass
class Question:
    """A read: who asked, when, and what was visible somewhere then."""

    host: str
    asked: float
    seen: int
    fresh: bool


class World:
    """One seed's schedule, from the founding to rest."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.trace: deque[tuple[float, str, object]] = deque(maxlen=3000)
        count = rng.choice((1, 2, 3, 3, 3, 4, 5, 5, 6, 7))
        names = [chr(ord("a") + place) for place in range(count)]
        self.hosts = {
            name: Host(name, 1 + DRIFT * (rng.random() - 0.5), 1000 * rng.random()) for name in names
        }
        self.blocked: set[tuple[str, str]] = set()
        self.loss = rng.choice((0.0, 0.02, 0.1))
        self.lag = rng.choice((0.002, 0.01, 0.05))
        self.leaders: dict[int, str] = {}
        self.promises: list[tuple[int, float]] = []
        """Of each leader: its term, and the last moment of which it says that no earlier one asked since."""
        self.rounds: list[tuple[int, float]] = []
        """Of each fresh read answered at a leader: its term, and when it was asked."""
        self.records: dict[tuple[int, int], tuple[Record, int]] = {}
        self.committed: list[Record] = []
        self.states = [b""]
        self.questions: dict[int, Question] = {}
        self.cookies = itertools.count(1)
        self.payloads = itertools.count(1)
        self.calm = False
        self.answered = self.looked = 0
        plain = [self.crash, self.cut, self.cut_one_way, self.split, self.heal, self.pause, self.slow_disk]
        planned = [self.coup, self.hand_over, self.amnesia, self.nap]
        self.faults = [*plain, *plain, self.heal, self.lose_disk, *planned]
        self.undisturbed_until = 0.0
        """No other fault while a planned one takes its course."""
        self.idle_until = 0.0
        """Nor anything that would make the log of a voter that is cut off too old to win."""
        if rng.random() < 0.3:
            self.faults = [*planned, self.heal]
        self.found(names[: rng.randint(1, min(count, 5))])

    def found(self, voters: list[str]) -> None:
        """All voters begin with the same snapshot."""
        start = Record(1, 1, b"")
        self.committed.append(start)
        self.states.append(digest(b"", start))
        snapshot = ev.Snapshot(1, 1, Configuration(frozenset(voters)), self.states[1])
        for host in self.hosts.values():
            if host.name in voters:
                host.disk = Disk(ev.Ballot(1), snapshot, 1, 1, commit=1)
            self.start(host)

    # Time.

    def at(self, delay: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + delay, next(self.order), do))

    def run_until(self, end: float, done: Callable[[], bool] = lambda: False) -> bool:
        while self.queue and self.queue[0][0] <= end:
            self.now, _, do = heapq.heappop(self.queue)
            do()
            if done():
                return True
        self.now = end
        return False

    def run(self) -> None:
        """Everything: faults, then calm, in which all must agree."""
        for do in (self.propose, self.propose, self.ask, self.ask, self.disturb, self.steer, self.compact):
            self.every(do)
        self.run_until(FAULTS_UNTIL)
        self.calm_down()
        if not self.run_until(ENDS_BY, self.settled) and not self.hopeless():
            raise Violation(f"no rest {ENDS_BY - FAULTS_UNTIL:.0f} s after the last fault: {self.summary()}")

    def every(self, do: Callable[[], None]) -> None:
        pace = self.rng.choice((0.1, 0.3, 1.0))

        def again() -> None:
            if not self.calm:
                do()
                self.at(self.rng.expovariate(1 / pace), again)

        self.at(pace * self.rng.random(), again)

    def settled(self) -> bool:
        """Whether all have the end of the log, and one leads by everybody's word."""
        self.looked += 1
        if self.looked % 64:
            return False
        machines = [host.machine for host in self.hosts.values()]
        leading = [machine for machine in machines if machine and machine.role == "leader"]
        if len(leading) != 1 or self.now < FAULTS_UNTIL + 3:
            return False
        end, leader = leading[0].last_index, leading[0].leader
        return (
            all(
                machine
                and machine.applied_index == end
                and machine.leader == leader
                and not machine.recovering
                for machine in machines
            )
            and not leading[0].configuration.joint
        )

    def hopeless(self) -> bool:
        """Whether a change that was under way when a disk was lost left too few voters that remember."""
        machines = {host.name: host.machine for host in self.hosts.values() if host.machine}
        sound = [name for name, machine in machines.items() if not machine.recovering]
        return any(not machine.configuration.quorum(sound) for machine in machines.values())

    def summary(self) -> str:
        return ", ".join(
            f"{host.name}: {host.machine.role} {host.machine.term} {host.machine.leader or '-'} "
            f"{host.machine.applied_index}/{host.machine.last_index}{' R' * host.machine.recovering} "
            f"{'+'.join(sorted(host.machine.configuration.replicas))}"
            if host.machine
            else f"{host.name}: down"
            for host in self.hosts.values()
        )

    def lines(self) -> list[str]:
        """The trace, readable: when, where, what."""
        return [f"{at:8.3f} {name} {what}" for at, name, what in self.trace]

    # Faults.

    def disturb(self) -> None:
        if self.now < self.undisturbed_until:
            return
        host = self.rng.choice(list(self.hosts.values()))
        fault = self.rng.choice(self.faults)
        fault(host)

    def crash(self, host: Host, down: float | None = None) -> None:
        if host.machine is None:
            return
        if down is None:
            down = self.rng.choice((0.01, 0.5, 3.0)) * self.rng.random()
        self.note(host, "crashes")
        host.machine = None
        host.life += 1
        host.role = ""
        for _ in range(self.rng.randint(0, len(host.writes))):
            host.disk.write(host.writes.popleft())
        host.writes.clear()
        host.disk_free = self.now
        self.at(down, lambda: self.start(host))

    def lose_disk(self, host: Host) -> None:
        """Only as much as the others can make good: one voter of three or more at a time."""
        if not self.may_lose():
            return
        if self.rng.random() < 0.5:
            self.crash(host)
            disk = host.disk
            host.disk = (
                Disk(disk.ballot, recovering=True) if self.rng.random() < 0.5 else Disk(recovering=True)
            )
            if self.rng.random() < 0.5 and disk.records:
                keep = disk.records[: self.rng.randrange(len(disk.records))]
                host.disk = replace(disk, records=keep, recovering=True)
                host.disk.commit = 0
            self.note(host, "has lost its disk")

    def coup(self, _host: Host) -> None:
        """The worst moment for a lease: the leader is heard by all but one voter, which campaigns; at that
        moment the leader is cut off, while it is asked, and perhaps the others have just started again."""
        leader = self.leading()
        if leader is None or leader.machine is None:
            return
        others = sorted(leader.machine.configuration.voters - {leader.name})
        if not others:
            return
        rival = self.hosts[self.rng.choice(others)]
        self.blocked.clear()
        restart, self.undisturbed_until = self.rng.random() < 0.5, self.now + 2.5
        self.idle_until = self.now + 1.5

        def watch() -> None:
            if self.calm or self.now > self.undisturbed_until:
                return
            if rival.role != "candidate":
                self.at(0.003, watch)
                return
            self.cut(leader)
            for name in others if restart else ():
                if name != rival.name:
                    self.crash(self.hosts[name], 0.001)
            self.press(leader)

        def begin() -> None:
            if self.calm:
                return
            self.blocked |= {(leader.name, rival.name), (rival.name, leader.name)}
            watch()

        self.at(0.2, begin)

    def hand_over(self, _host: Host) -> None:
        """The leader hands over and hears nothing more, while it is asked."""
        leader = self.leading()
        if leader is None or leader.machine is None:
            return
        self.blocked.clear()
        self.feed(leader, ev.TransferTo(self.rng.choice(sorted(leader.machine.configuration.voters))))
        self.blocked |= {(other, leader.name) for other in self.hosts}
        self.press(leader)

    def nap(self, _host: Host) -> None:
        """The leader stops between a round and its answers, and hears of them when others may lead."""
        leader = self.leading()
        if leader is None or leader.machine is None:
            return
        self.blocked.clear()
        leader.nap = True
        self.undisturbed_until = self.now + 2.5

        def cut_off() -> None:
            if not self.calm:
                self.cut(leader)

        self.at(0.5, cut_off)
        self.at(0.9, lambda: self.press(leader))

    def press(self, host: Host) -> None:
        """For a while everybody who leads appends, and this host is asked."""
        if self.calm:
            return
        self.undisturbed_until = self.now + 1.2
        for step in range(1, 60):
            self.at(0.02 * step, lambda: self.ask_of(host, False))
            if step % 4 == 0:
                self.at(0.02 * step, self.propose_everywhere)

    def leading(self) -> Host | None:
        """The leader of the highest term."""
        found = [host for host in self.hosts.values() if host.machine and host.machine.role == "leader"]
        return max(found, key=lambda host: host.machine.term if host.machine else 0, default=None)

    def amnesia(self, _host: Host) -> None:
        """One voter is behind, another one loses its disk, and then the leader is gone."""
        leader = self.leading()
        if leader is None or leader.machine is None or len(leader.machine.configuration.voters) != 3:
            return
        behind, lost = self.rng.sample(sorted(leader.machine.configuration.voters - {leader.name}), 2)
        if not self.may_lose():
            return
        self.blocked.clear()
        self.cut(self.hosts[behind])
        self.propose()
        self.undisturbed_until = self.now + 3.0

        def strike() -> None:
            if not self.calm and self.may_lose() and leader.machine and leader.machine.role == "leader":
                self.crash(self.hosts[lost], 0.001)
                self.hosts[lost].disk = Disk(self.hosts[lost].disk.ballot, recovering=True)
                self.crash(leader, 6.0)
                self.blocked.clear()

        self.at(0.3, strike)

    def start(self, host: Host) -> None:
        if host.machine is not None:
            return
        host.life += 1
        host.paused_until = 0.0
        host.slow = 1.0
        stored = host.disk.stored()
        host.applied = stored.snapshot.index
        self.note(host, f"starts: {stored.ballot}, {stored.snapshot.index}, {len(stored.records)} records")
        host.machine = Raft(host.name, stored, SETTINGS, random.Random(self.rng.random()))
        self.feed(host, Woken(ev.TIMER))
        self.feed(host, ev.Contacts(tuple(name for name in self.hosts if name != host.name)))

    def may_lose(self) -> bool:
        """Whether all are up, all remember, and three or more vote."""
        for host in self.hosts.values():
            if host.machine is None or host.disk.recovering or host.machine.recovering:
                return False
            configuration = host.machine.configuration
            if any(0 < len(part) < 3 for part in (configuration.voters, configuration.outgoing)):
                return False
        return True

    def cut(self, host: Host) -> None:
        for other in self.hosts:
            self.blocked |= {(host.name, other), (other, host.name)}

    def cut_one_way(self, host: Host) -> None:
        for other in self.rng.sample(sorted(self.hosts), self.rng.randint(1, len(self.hosts))):
            self.blocked.add(self.rng.choice([(host.name, other), (other, host.name)]))

    def split(self, _host: Host) -> None:
        side = set(self.rng.sample(sorted(self.hosts), len(self.hosts) // 2))
        for one in side:
            for other in self.hosts.keys() - side:
                self.blocked |= {(one, other), (other, one)}

    def heal(self, _host: Host) -> None:
        self.blocked.clear()

    def pause(self, host: Host) -> None:
        self.note(host, "stops")
        host.paused_until = self.now + self.rng.choice((0.3, 1.0, 4.0)) * self.rng.random()

    def slow_disk(self, host: Host) -> None:
        host.slow = self.rng.choice((1.0, 10.0, 100.0))

    def calm_down(self) -> None:
        self.calm = True
        self.blocked.clear()
        self.loss = 0.0
        for host in self.hosts.values():
            host.slow, host.paused_until = 1.0, 0.0
            self.start(host)
        self.at(0.5, self.mend)

    def mend(self) -> None:
        """Who decides about voters demotes those that have lost their disk; else nothing changes."""
        for host in self.hosts.values():
            if host.machine and host.machine.role == "leader":
                voters = host.machine.configuration.voters
                sound = voters - host.machine.recovering_replicas
                if sound != voters:
                    self.feed(host, ev.ChangeVoters(sound))
        self.at(0.5, self.mend)

    # Load.

    def somebody(self) -> Host:
        """Often one that believes that it leads."""
        leading = [host for host in self.hosts.values() if host.machine and host.machine.role == "leader"]
        if leading and self.rng.random() < 0.8:
            return self.rng.choice(leading)
        return self.rng.choice(list(self.hosts.values()))

    def propose(self) -> None:
        if self.now < self.idle_until:
            return
        payloads = tuple(b"%d" % next(self.payloads) for _ in range(self.rng.choice((1, 1, 3, 20))))
        self.feed(self.somebody(), ev.Propose(payloads))

    def propose_everywhere(self) -> None:
        for host in self.hosts.values():
            if host.role == "leader":
                self.feed(host, ev.Propose((b"%d" % next(self.payloads),)))

    def ask(self) -> None:
        self.ask_of(self.somebody(), self.rng.random() < 0.5)

    def ask_of(self, host: Host, fresh: bool) -> None:
        if host.machine and host.paused_until <= self.now:
            cookie = next(self.cookies)
            self.questions[cookie] = Question(host.name, self.now, len(self.committed), fresh)
            self.feed(host, ev.Read(cookie, fresh))

    def steer(self) -> None:
        host = self.somebody()
        if self.now < self.undisturbed_until:
            return
        if self.rng.random() < 0.4:
            names = sorted(self.hosts)
            size = self.rng.choice([1, 2, 3, 3, 3, 3, 5, 5, 5])
            lost = {other.name for other in self.hosts.values() if other.disk.recovering}
            voters = frozenset(self.rng.sample(names, min(size, len(names)))) - lost
            if lost and host.machine:
                voters = host.machine.configuration.voters - lost
            self.feed(host, ev.ChangeVoters(voters))
        else:
            self.feed(host, ev.TransferTo(self.rng.choice(sorted(self.hosts))))

    def compact(self) -> None:
        host = self.somebody()
        if host.machine and host.applied > 1 and host.paused_until <= self.now:
            keep = host.applied + 1 - self.rng.choice((0, 0, 3, 10))
            self.feed(host, ev.Compact(host.applied, self.states[host.applied], keep))

    # The machines.

    def note(self, host: Host, what: object) -> None:
        self.trace.append((self.now, host.name, what))

    def feed(self, host: Host, event: ev.Event) -> None:
        machine = host.machine
        if machine is None:
            return
        if host.paused_until > self.now:
            life = host.life
            self.at(
                host.paused_until - self.now, lambda: self.feed(host, event) if host.life == life else None
            )
            return
        self.note(host, event)
        for effect in machine.handle(event, host.clock(self.now)):
            self.note(host, effect)
            ACTIONS[type(effect)](self, host, effect)
        if host.nap and machine.role == "leader" and isinstance(event, Woken):
            host.nap, host.paused_until = False, self.now + 0.95
        if machine.role == "leader" and host.led != machine.term:
            raise Violation(f"{host.name} leads without having said so")

    def do_send(self, host: Host, effect: Send) -> None:
        rng = self.rng
        for _ in range(2 if rng.random() < 0.02 else 1):
            if rng.random() < self.loss:
                continue
            late = rng.random() < 0.01
            delay = self.lag * rng.random() if not late else rng.choice((0.5, 3.0)) * rng.random()
            self.at(delay, lambda: self.deliver(host.name, effect))

    def deliver(self, sender: str, effect: Send) -> None:
        if (sender, effect.peer) not in self.blocked:
            self.feed(self.hosts[effect.peer], ev.Received(sender, effect.message))

    def do_wake(self, host: Host, effect: WakeAt) -> None:
        host.wake += 1
        number, life = host.wake, host.life

        def due() -> None:
            if host.life == life and host.wake == number:
                self.feed(host, Woken(effect.timer))

        self.at(max(0.0, (effect.at - host.clock(self.now)) / host.rate) + 1e-6, due)

    def do_persist(self, host: Host, effect: ev.Persist) -> None:
        self.check_records(host, effect.data)
        host.writes.append(effect.data)
        life = host.life
        if host.disk_free < self.now + 1.0:  # else it is written together with those that wait
            host.disk_free = max(host.disk_free, self.now) + 0.004 * self.rng.random() * host.slow

        def due() -> None:
            if host.life == life:
                host.disk.write(host.writes.popleft())
                self.feed(host, Persisted(effect.key))

        self.at(host.disk_free - self.now, due)

    def do_became(self, host: Host, effect: ev.Became) -> None:
        host.role = effect.role
        if effect.role != "leader":
            return
        host.led = effect.term
        other = self.leaders.setdefault(effect.term, host.name)
        if other != host.name:
            raise Violation(f"{other} and {host.name} both lead in term {effect.term}")
        since = self.now - effect.quiet / host.rate
        self.promises.append((effect.term, since))
        if any(term < effect.term and asked > since for term, asked in self.rounds):
            raise Violation(f"a leader before {effect.term} was answered within its quiet")
        log = host.machine._replica.log if host.machine and effect.term == max(self.leaders) else None
        for record in self.committed[-3:]:
            if log and record.index > log.base_index and log.term_at(record.index) != record.term:
                raise Violation(f"leader {host.name} of {effect.term} lacks committed {record}")

    def do_commit(self, host: Host, effect: ev.Commit) -> None:
        for record in effect.records:
            if record.index != host.applied + 1:
                raise Violation(f"{host.name} applies {record.index} after {host.applied}")
            host.applied = record.index
            if record.index < len(self.committed) + 1:
                if self.committed[record.index - 1] != record:
                    raise Violation(f"{record} and {self.committed[record.index - 1]} are both committed")
            else:
                self.committed.append(record)
                self.states.append(digest(self.states[-1], record))
        host.disk.commit = host.applied

    def do_restore(self, host: Host, effect: ev.Restore) -> None:
        index = effect.snapshot.index
        if index < host.applied or effect.snapshot.data != self.states[index]:
            raise Violation(f"{host.name} restores a state that never was after record {index}")
        host.applied = index

    def do_read_ready(self, host: Host, effect: ev.ReadReady) -> None:
        question = self.questions.pop(effect.cookie)
        self.answered += 1
        if effect.index < question.seen or host.applied < effect.index:
            raise Violation(f"{host.name} reads at {effect.index} what is old since {question.seen}")
        if question.fresh and host.machine and host.machine.role == "leader":
            term = host.machine.term
            self.rounds.append((term, question.asked))
            if any(newer > term and question.asked > since for newer, since in self.promises):
                raise Violation(f"{host.name} was answered in {term} within the quiet of a newer leader")

    def do_read_failed(self, _host: Host, effect: ev.ReadFailed) -> None:
        del self.questions[effect.cookie]

    def check_records(self, host: Host, data: ev.Durable) -> None:
        if not data.records or host.machine is None:
            return
        before = host.machine._replica.log.term_at(data.records[0].index - 1)
        for record in data.records:
            known, known_before = self.records.setdefault((record.index, record.term), (record, before or 0))
            if known != record or (before is not None and known_before not in (before, 0)):
                raise Violation(f"{known} and {record}, or what is before them, differ")
            before = record.term


ACTIONS: dict[type, Callable[..., None]] = {
    Send: World.do_send,
    WakeAt: World.do_wake,
    ev.Persist: World.do_persist,
    ev.Became: World.do_became,
    ev.Commit: World.do_commit,
    ev.Restore: World.do_restore,
    ev.ReadReady: World.do_read_ready,
    ev.ReadFailed: World.do_read_failed,
}


def digest(state: bytes, record: Record) -> bytes:
    """The state after a record: some bytes that depend on all records so far."""
    return hashlib.blake2b(state + repr(record).encode(), digest_size=24).digest()
