# SPDX-License-Identifier: Apache-2.0
"""Short plays for the Raft machine, one line per step.

Nothing happens by itself: time stands still but for `elapse`, `beat` and `campaign`, messages arrive at once
and in order unless a line is cut or tapped, and disks are instant unless held. So a line of a play is one
thing that happens, and all that follows from it.

    elapse 1            everybody's clock goes on by a second; nobody is woken
    campaign a          nobody hears anything for `election`; then a's time is up first
    beat a              one heartbeat later a is woken
    propose a x y       commands; `voters a b c` and `transfer a b` ask a for that; `compact a INDEX KEEP`
    read a 1            with cookie 1; `read a 1 fresh`
    cut a b             both directions (`cut a`: from everybody); `mute a b`: only from a to b; `heal`
    tap a b             messages from a to b are put aside; `pour` brings them,
                        `pour backwards` the last first, `pour twice` each twice
    hold a              a's disk stands still; `disk a` lets all of it happen
    crash a             what was not durable is lost; `start a` with what was
    damage a            crash, and the records are gone
    a leader term=2     what must be seen at a: role, and any of `SEEN`
"""

from __future__ import annotations

import itertools
import random
from collections import deque

from proto.log import Record
from proto.machine import Persisted, Send, Woken
from proto.raft import events as ev
from proto.raft.configuration import Configuration
from proto.raft.machine import Raft
from tests.sim.raft_world import Disk

SETTINGS = ev.Settings(append_bytes=16_000, part_bytes=4)
ROLES = ("leader", "follower", "candidate", "observer")


def label(configuration: Configuration) -> str:
    """`abc`, while joint `bcd/abc`, with a learner `abc+d`."""
    text = "".join(sorted(configuration.voters))
    if configuration.joint:
        text += "/" + "".join(sorted(configuration.outgoing))
    return text + "".join("+" + learner for learner in sorted(configuration.learners))


class Actor:
    """One replica with its disk, clock and what it has said."""

    def __init__(self, name: str, disk: Disk) -> None:
        self.name, self.disk = name, disk
        self.clock = 100.0
        self.machine: Raft | None = None
        self.held = False
        self.writes: deque[ev.Persist] = deque()
        self.applied: list[str] = []
        self.ready: list[int] = []
        self.failed: list[int] = []
        self.quiet: float | None = None

    def see(self, what: str) -> str:
        assert self.machine is not None
        match what:
            case "log":
                log = self.machine._replica.log
                return ",".join(
                    str(log.term_at(index)) for index in range(log.first_index, log.last_index + 1)
                )
            case "config":
                return label(self.machine.configuration)
            case "applied":
                return ",".join(self.applied)
            case "ready" | "failed":
                return ",".join(map(str, getattr(self, what)))
            case "quiet":
                return str(self.quiet)
            case "commit" | "last" | "first":
                return str(getattr(self.machine, what + "_index"))
            case "lost":
                return "".join(sorted(self.machine.recovering_replicas))
            case _:
                return str(getattr(self.machine, what))


class Scene:
    """Voters (`"a b c"`), others, and the terms of what is in their logs after record 1, which founds all."""

    def __init__(self, voters: str, others: str = "", logs: dict[str, str] | None = None) -> None:
        self.cut: set[tuple[str, str]] = set()
        self.taps: set[tuple[str, str]] = set()
        self.tapped: list[tuple[str, Send]] = []
        self.mail: deque[tuple[str, Send]] = deque()
        self.sent: list[tuple[str, Send]] = []
        self.seed = itertools.count()
        self.actors: dict[str, Actor] = {}
        founded = ev.Snapshot(1, 1, Configuration(frozenset(voters.split())))
        for name in (voters + " " + others).split():
            disk = Disk()
            if name in voters:
                terms = [int(term) for term in (logs or {}).get(name, "").split()]
                records = [Record(term, 2 + place, b"%d" % term) for place, term in enumerate(terms)]
                disk = Disk(ev.Ballot(max([1, *terms])), founded, 1, 1, records, 1)
            self.actors[name] = Actor(name, disk)
        for name in self.actors:
            self.do_start(name)

    def play(self, text: str) -> None:
        for line in text.strip().splitlines():
            words = line.split()
            if words and words[0] in self.actors:
                self.check(line.strip(), *words)
            elif words:
                getattr(self, "do_" + words[0])(*words[1:])
                self.settle()

    def check(self, line: str, name: str, *expected: str) -> None:
        actor = self.actors[name]
        for word in expected:
            what, _, value = word.partition("=") if "=" in word else ("role", "", word)
            seen = actor.see(what)
            assert seen == value, f"{line}: {what} is {seen}"

    def settle(self) -> None:
        for _ in range(20_000):
            if not self.mail:
                return
            sender, send = self.mail.popleft()
            if (sender, send.peer) in self.taps:
                self.tapped.append((sender, send))
            elif (sender, send.peer) not in self.cut:
                self.feed(send.peer, ev.Received(sender, send.message))
        raise AssertionError("the messages do not come to an end")

    def feed(self, name: str, event: ev.Event) -> None:
        actor = self.actors[name]
        if actor.machine is None:
            return
        for effect in actor.machine.handle(event, actor.clock):
            match effect:
                case Send():
                    self.sent.append((name, effect))
                    self.mail.append((name, effect))
                case ev.Persist():
                    actor.writes.append(effect)
                case ev.Commit(records):
                    actor.applied += [
                        record.payload.decode() for record in records if record.kind == "command"
                    ]
                case ev.Restore(snapshot):
                    actor.applied = snapshot.data.decode().split(",") if snapshot.data else []
                case ev.Became("leader", quiet=quiet):
                    actor.quiet = quiet
                case ev.ReadReady(cookie):
                    actor.ready.append(cookie)
                case ev.ReadFailed(cookie):
                    actor.failed.append(cookie)
        if not actor.held:
            self.do_disk(name)

    # The steps.

    def do_elapse(self, seconds: str) -> None:
        for actor in self.actors.values():
            actor.clock += float(seconds)

    def do_wake(self, name: str) -> None:
        self.feed(name, Woken(ev.TIMER))

    def do_campaign(self, name: str) -> None:
        self.do_elapse("1.0")
        self.actors[name].clock += 0.31
        self.do_wake(name)

    def do_beat(self, name: str) -> None:
        self.do_elapse(str(SETTINGS.heartbeat + 0.001))
        self.do_wake(name)

    def do_propose(self, name: str, *payloads: str) -> None:
        self.feed(name, ev.Propose(tuple(payload.encode() for payload in payloads)))

    def do_read(self, name: str, cookie: str, fresh: str = "") -> None:
        self.feed(name, ev.Read(int(cookie), bool(fresh)))

    def do_voters(self, name: str, *voters: str) -> None:
        self.feed(name, ev.ChangeVoters(frozenset(voters)))

    def do_transfer(self, name: str, to: str) -> None:
        self.feed(name, ev.TransferTo(to))

    def do_compact(self, name: str, index: str, keep: str) -> None:
        actor = self.actors[name]
        self.feed(name, ev.Compact(int(index), ",".join(actor.applied).encode(), int(keep)))

    def do_contacts(self, name: str, *peers: str) -> None:
        self.feed(name, ev.Contacts(peers))

    def do_cut(self, name: str, other: str = "") -> None:
        for peer in [other] if other else self.actors:
            self.cut |= {(name, peer), (peer, name)}

    def do_mute(self, name: str, other: str) -> None:
        self.cut.add((name, other))

    def do_heal(self) -> None:
        self.cut.clear()

    def do_tap(self, name: str, other: str) -> None:
        self.taps.add((name, other))

    def do_pour(self, how: str = "") -> None:
        self.taps.clear()
        mail, self.tapped = self.tapped, []
        if how == "backwards":
            mail.reverse()
        self.mail.extend(mail * (2 if how == "twice" else 1))

    def do_hold(self, name: str) -> None:
        self.actors[name].held = True

    def do_disk(self, name: str, count: str = "all") -> None:
        actor = self.actors[name]
        if count == "all":
            actor.held = False
        for _ in range(int(count) if count != "all" else 10_000):
            if not actor.writes:
                return
            write = actor.writes.popleft()
            actor.disk.write(write.data)
            self.feed(name, Persisted(write.key))

    def do_crash(self, name: str) -> None:
        actor = self.actors[name]
        actor.machine = None
        actor.writes.clear()
        actor.held = False
        actor.applied = []

    def do_damage(self, name: str) -> None:
        self.do_crash(name)
        self.actors[name].disk = Disk(recovering=True)

    def do_start(self, name: str) -> None:
        actor = self.actors[name]
        data = actor.disk.snapshot.data.decode()
        actor.applied = data.split(",") if data else []
        actor.machine = Raft(name, actor.disk.stored(), SETTINGS, random.Random(next(self.seed)))
        self.do_wake(name)
