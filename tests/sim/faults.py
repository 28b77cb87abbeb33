# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a seed, and when it stops.

Each seed draws its own mixture: some have only cuts, some everything. Losses that a mesh cannot survive (the
logs of a majority of voters gone for good) are not made, since nothing is promised after them; everything
else may come at any moment, also at chosen steps of a handover and between a decision and its being carried
out. At `until` it all ends: what stood still goes on, what was dead is started, and the network is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from proto.raft.events import TransferTo

if TYPE_CHECKING:
    from tests.sim.hosts import Host
    from tests.sim.mesh_world import World
    from tests.sim.process import Process

STEPS = (
    *(
        ("source", step)
        for step in ("Prepare", "Persist", "Freeze", "SendFinal", "Thaw", "Discard", "Propose")
    ),
    *(("destination", step) for step in ("Prepare", "Persist", "ReportReady", "Start", "Propose", "Sync")),
    *(("destination", step) for step in ("Discard", "Refuse", "Over")),
    ("source", "Over"),
)


class Faults:
    """The fault schedule of one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        rng = world.rng
        self.until = rng.choice((4.0, 8.0, 12.0, 12.0, 20.0)) if not world.crowd else 5.0
        """Real time at which faults stop."""
        self.bystanders = 0
        """Peers that are still to join."""
        self._pace = rng.choice((0.2, 0.5, 1.0, 2.0, 4.0))
        kinds: list[Callable[[], None]] = [
            self.crash_one,
            self.crash_leader,
            self.lose_power,
            self.stop_peer,
            self.hold_effects,
            self.stand_still,
            self.stop_shims,
            self.split,
            self.isolate,
            self.cut_some,
            self.weather,
            self.slow_disk,
            self.fail_disk,
            self.damage_log,
            self.set_wall_clock,
            self.transfer,
            self.break_streams,
            self.crash_at_step,
            self.end_guest,
            self.lose_host,
        ]
        self._kinds = rng.sample(kinds, rng.choice((0, 1, 2, 3, 5, 8, len(kinds))))
        self.loses_logs = not {self.lose_host, self.damage_log}.isdisjoint(self._kinds)
        """Whether what a peer had on disk may be gone for good in this world."""
        self._crash_at: tuple[str, str] | None = None
        if rng.random() < 0.3:
            self.weather()

    def begin(self) -> None:
        """Faults happen from now until `until`."""
        if self._kinds:
            self.world.at(0.2 + self._pace * self.world.rng.random(), self._next)
        self.world.at(self.until, self._heal)

    def _next(self) -> None:
        if self.world.healing:
            return
        self.world.rng.choice(self._kinds)()
        self.world.at(2 * self._pace * self.world.rng.random(), self._next)

    def _heal(self) -> None:
        world = self.world
        world.say("faults", "stop; everything heals")
        world.healing = True
        world.network.heal()
        self._crash_at = None
        for host in world.hosts.values():
            host.disk.slowness = 0.0005
            host.disk.writes_to_failure = None
            self._shims_go_on(host)

    # Whom it hits.

    def _some_host(self) -> Host:
        there = [host for host in self.world.hosts.values() if not host.gone]
        return self.world.rng.choice(there)

    def _some_process(self) -> Process | None:
        return self._some_host().process

    def _seconds(self) -> float:
        """A while: mostly short, sometimes longer than every lease and election."""
        left = max(0.5, self.until - self.world.now)
        return min(left, self.world.rng.choice((0.3, 1.0, 3.0, 15.0)) * self.world.rng.random())

    def survives_without(self, host: Host) -> bool:
        """Whether a majority of every set of voters that anybody goes by has its log, even without this."""
        sound = {
            h.id
            for h in self.world.hosts.values()
            if not (h.gone or h.leaving or h.disk.recovering or h is host)
        }
        return all(
            process.machine.configuration.quorum(sound)
            for process in self.world.processes()
            if process.machine.configuration.voters
        ) and all(self._stored_quorum(h, sound) for h in self.world.hosts.values() if h.process is None)

    def _stored_quorum(self, host: Host, sound: set[str]) -> bool:
        if host.gone or not host.starts:
            return True
        known = host.disk.configuration()
        return not known.voters or known.quorum(sound)

    # Processes and hosts.

    def crash_one(self) -> None:
        """kill -9 of one peer, or of several."""
        for _ in range(self.world.rng.choice((1, 1, 1, 2, 5))):
            self.world.crash(self._some_host())

    def crash_leader(self) -> None:
        """kill -9 of the coordinator."""
        leader = self.world.leader()
        if leader is not None:
            self.world.crash(leader.host)

    def lose_power(self) -> None:
        """A host reboots; its guests end, BOOTTIME begins anew."""
        host = self._some_host()
        host.lose_power()
        host.clock.restart(self.world.now)
        self.world.at(0.5 + self._seconds(), self.world.start_when_awake, host)

    def stop_peer(self) -> None:
        """SIGSTOP of one peer's process."""
        process = self._some_process()
        if process is not None:
            process.stop(self._seconds())

    def hold_effects(self) -> None:
        """A process is stopped between its next decision and the carrying out."""
        process = self.world.leader() if self.world.rng.random() < 0.5 else self._some_process()
        if process is not None:
            process.hold_next = True

    def stand_still(self) -> None:
        """A whole host stops, its shims and its switch too."""
        self._some_host().stand_still(self._seconds(), suspended=self.world.rng.random() < 0.5)

    def stop_shims(self) -> None:
        """SIGSTOP of the shims of one host."""
        host, seconds = self._some_host(), self._seconds()
        for copy in host.copies.values():
            copy.stopped_shim = True
        self.world.at(seconds, self._shims_go_on, host)

    def _shims_go_on(self, host: Host) -> None:
        """They look at their deadlines at once."""
        for copy in host.copies.values():
            copy.stopped_shim = False
            if not host.still:
                host.settle(copy)

    def end_guest(self) -> None:
        """A guest crashes by itself."""
        host = self._some_host()
        for copy in host.copies.values():
            if copy.phase == "running" and not host.still:
                host.kill(copy, "ended")
                if host.process is not None:
                    host.process.here(host.process.keepers.ended, copy)

    def lose_host(self) -> None:
        """A host burns down."""
        host = self._some_host()
        losable = self.survives_without(host) and self.bystanders <= len(self.world.hosts)
        if self.world.rng.random() < 0.3 and losable:
            host.lose_power()
            host.gone = True
            self.world.say(host.name, "is gone for ever")

    # The network.

    def _ids(self) -> list[str]:
        return [host.id for host in self.world.hosts.values() if not host.gone]

    def split(self) -> None:
        """Two halves, perhaps in one direction only."""
        ids = self._ids()
        self.world.rng.shuffle(ids)
        middle = self.world.rng.randrange(1, len(ids)) if len(ids) > 1 else 0
        self._cut(ids[:middle], ids[middle:])

    def isolate(self) -> None:
        """One peer, often the coordinator, alone."""
        leader = self.world.leader()
        one = leader.host.id if leader and self.world.rng.random() < 0.6 else self._some_host().id
        self._cut([one], [id for id in self._ids() if id != one])

    def cut_some(self) -> None:
        """Some pairs do not reach one another, others do."""
        ids = self._ids()[:12]
        share = self.world.rng.choice((0.1, 0.3, 0.5))
        pairs = [(a, b) for a in ids for b in ids if a != b and self.world.rng.random() < share]
        self.world.say("network", f"{len(pairs)} directions are cut")
        self.world.network.cut(pairs, self._seconds())

    def _cut(self, some: list[str], others: list[str]) -> None:
        seconds, kind = self._seconds(), self.world.rng.choice(("both", "both", "to", "from"))
        pairs = [(a, b) for a in some for b in others] if kind != "from" else []
        pairs += [(b, a) for a in some for b in others] if kind != "to" else []
        names = [self.world.name(id) for id in some[:12]]
        self.world.say("network", f"{names} cut off ({kind}) for {seconds:.2f} s")
        self.world.network.cut(pairs, seconds)

    def weather(self) -> None:
        """Loss, doubling and lateness from now on."""
        network, rng = self.world.network, self.world.rng
        network.loss = rng.choice((0.0, 0.02, 0.1, 0.3))
        network.doubling = rng.choice((0.0, 0.05, 0.3))
        network.late = rng.choice((0.0, 0.02, 0.1))
        network.longest = rng.choice((0.5, 2.0, 8.0))

    def break_streams(self) -> None:
        """The bulk connections of one peer break."""
        process = self._some_process()
        if process is not None:
            process.moves.break_streams()

    def transfer(self) -> None:
        """The coordinator shall hand over."""
        leader = self.world.leader()
        if leader is not None:
            to = self.world.rng.choice(sorted(leader.machine.configuration.voters or {leader.host.id}))
            leader.host.after(0.0, leader.feed, TransferTo(to))

    # Disks and clocks.

    def slow_disk(self) -> None:
        """Writes of one host take their time."""
        self._some_host().disk.slowness = self.world.rng.choice((0.0005, 0.02, 0.3, 2.0, 15.0))

    def fail_disk(self) -> None:
        """One of the next writes of a peer fails."""
        self._some_host().disk.writes_to_failure = self.world.rng.randrange(20)

    def damage_log(self) -> None:
        """A peer dies, and what it finds then is damaged in the middle."""
        host = self._some_host()
        if self.survives_without(host):
            self.world.crash(host)
            if host.disk.damage():
                self.world.say(host.name, "its log is damaged, and set aside")

    def set_wall_clock(self) -> None:
        """Somebody sets the time."""
        self._some_host().clock.wall_offset += self.world.rng.choice((-1e6, -60.0, 60.0, 1e5)) * (
            self.world.rng.random()
        )

    # Chosen steps.

    def crash_at_step(self) -> None:
        """The next peer that comes to this step of a handover dies there."""
        self._crash_at = self.world.rng.choice(STEPS)

    def at_effect(self, process: Process, side: str, effect: str) -> bool:
        """Whether the process dies before it carries this effect of a handover out."""
        if self._crash_at != (side, effect):
            return False
        self._crash_at = None
        self.world.say(process.host.name, f"dies before {side}.{effect}")
        self.world.crash(process.host)
        return True
