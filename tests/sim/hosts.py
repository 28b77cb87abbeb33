# SPDX-License-Identifier: Apache-2.0
"""A simulated host: its clocks, its disk, the guests' processes (shims), and the peer on it, if any.

A *shim* is the parent of one guest. It does what it is told, in order and a moment later, whether or not the
peer that told it still lives, and stops a lease-bound guest by itself when BOOTTIME passes the deadline. A
host that stands still does nothing at all; what was due happens when it goes on, shims a moment after the
rest, so that a guest whose deadline has passed may run a few instructions more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from proto.entries import Guest, Member
from tests.sim.clocks import Clock
from tests.sim.disks import Disk

if TYPE_CHECKING:
    from tests.sim.mesh_world import World
    from tests.sim.process import Process

CopyPhase = Literal["none", "waiting", "running", "frozen", "ended"]

Why = Literal["lease", "handover", "pause"]


@dataclass
class Copy:
    """A host's copy of a guest: its files, and the process if there is one.

    `migration` is the handover that has its hand on it, as its file on disk says. `frozen_by` are the
    reasons for which it stands still. A frozen copy goes on only when none is left.
    """

    guest: Guest
    epoch: int
    phase: CopyPhase = "none"
    frozen_by: set[Why] = field(default_factory=set)
    deadline: float = 0.0
    migration: str = ""
    stopped_shim: bool = False
    going: bool = False
    """It was told to go on and has not done so yet; for whoever asks, it runs."""

    @property
    def lease_bound(self) -> bool:
        return self.guest.on_partition == "freeze"


class Host:
    """One machine. `run_here` is how anything that lives on it is made to happen."""

    def __init__(self, world: World, member: Member, key: Ed25519PrivateKey, drift: float) -> None:
        self.world = world
        self.member = member
        self.id, self.name, self.key = member.id, member.name, key
        self.clock = Clock(world.rng, drift)
        self.disk = Disk(world.rng, self.after)
        self.process: Process | None = None
        self.contacts: set[str] = set()
        """The members that it was told of when it joined, or has known since: a file, written in time."""
        self.copies: dict[str, Copy] = {}
        """By the guest's id."""
        self.gone = False
        """It never comes back."""
        self.leaving = False
        """Somebody has asked that it leaves the mesh, or that it be evicted: it may be gone soon."""
        self.still = False
        self.woke = 0.0
        """Real time at which it last went on after having stood still."""
        self.boot = 0
        self.starts = 0
        """How often a peer has started here, for the number of its boot."""
        self._due: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._shim_free = 0.0
        self._shim_work: deque[Callable[[], None]] = deque()

    def __repr__(self) -> str:
        return self.name

    @property
    def now(self) -> float:
        """CLOCK_BOOTTIME here."""
        return self.clock.boot(self.world.now)

    # What happens here.

    def after(self, seconds: float, run: Callable[..., None], *arguments: Any) -> None:
        """Call `run` then, or when the host goes on; not at all if it has rebooted meanwhile."""
        self.world.at(seconds, self._occur, self.boot, run, arguments)

    def _occur(self, boot: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.still:
            self._due.append((run, arguments))
        elif boot == self.boot:
            run(*arguments)

    def stand_still(self, seconds: float, suspended: bool) -> None:
        """Everything stops; `suspended`: CLOCK_MONOTONIC too."""
        if self.still or self.gone:
            return
        self.world.say(
            self.name, f"host stands still for {seconds:.2f} s", "(suspended)" if suspended else ""
        )
        self.still = True
        if suspended:
            self.clock.lost += seconds
        self.world.at(seconds, self._go_on, self.boot)

    def _go_on(self, boot: int) -> None:
        if not self.still or boot != self.boot:
            return
        self.still, self.woke = False, self.world.now
        self.world.say(self.name, "host goes on")
        due, self._due = self._due, []
        for run, arguments in due:
            self.world.at(0.0, self._occur, self.boot, run, arguments)

    def lose_power(self) -> None:
        """Everything that runs here ends, and what was not durable is gone."""
        self.world.say(self.name, "host loses power")
        self.boot += 1
        self.still, self._due, self._shim_free = False, [], 0.0
        self._shim_work.clear()
        if self.process is not None:
            self.process.end()
        for copy in self.copies.values():
            self.world.invariants.stopped(self, copy)
            copy.phase, copy.frozen_by, copy.stopped_shim, copy.going = "none", set(), False, False

    def leave(self) -> None:
        """Its peer has learnt that it is no member any more: it ends its guests, and then itself."""
        self.world.say(self.name, "is no member any more, and ends")
        if self.process is not None:
            self.process.end()
        for copy in list(self.copies.values()):
            self.remove(copy)
        self.gone = True

    # Shims.

    def by_shim(self, run: Callable[[], None]) -> None:
        """A shim's work, done in the order it was asked for."""
        free = max(self._shim_free, self.world.now) + self.world.rng.choice((0.001, 0.01, 0.1)) * (
            self.world.rng.random()
        )
        self._shim_free = free
        self._shim_work.append(run)
        self.after(free - self.world.now, self._shim_step)

    def _shim_step(self) -> None:
        self._shim_work.popleft()()

    def let_run(self, copy: Copy) -> None:
        """The copy's process may run, as far as its lease allows."""
        copy.frozen_by -= {"handover", "pause"}
        self.settle(copy)

    def freeze(self, copy: Copy, why: Why) -> None:
        """The copy stands still for this reason too."""
        copy.frozen_by.add(why)
        if copy.phase == "running":
            copy.phase = "frozen"
            self.world.invariants.stopped(self, copy)

    def settle(self, copy: Copy) -> None:
        """Run or freeze as the reasons say, and the deadline."""
        if copy.phase not in ("running", "frozen"):
            return
        if copy.lease_bound:
            if self.now < copy.deadline:
                copy.frozen_by.discard("lease")
                self.world.at(
                    self.clock.real(copy.deadline) - self.world.now, self._check_deadline, self.boot, copy
                )
            else:
                self.freeze(copy, "lease")
        if not copy.frozen_by and copy.phase == "frozen":
            copy.phase = "running"
            self.world.invariants.runs(self, copy)

    def extend(self, copy: Copy, deadline: float) -> None:
        """The shim is told a deadline; an earlier one than it knows changes nothing."""
        if deadline > copy.deadline and copy.phase in ("running", "frozen", "waiting"):
            copy.deadline = deadline
            self.settle(copy)

    def _check_deadline(self, boot: int, copy: Copy) -> None:
        if boot != self.boot or copy.phase != "running":
            return
        if self.still or copy.stopped_shim:
            self.world.at(0.05, self._check_deadline, boot, copy)
        elif self.now >= copy.deadline:
            self.world.say(self.name, f"lease of {copy.guest.key} e{copy.epoch} ran out: frozen")
            self.freeze(copy, "lease")

    def start(self, copy: Copy) -> None:
        """A process for the guest begins to run."""
        copy.phase, copy.frozen_by = "frozen", set()
        self.settle(copy)

    def kill(self, copy: Copy, phase: CopyPhase = "none") -> None:
        """The guest's process ends."""
        if copy.phase == "running":
            self.world.invariants.stopped(self, copy)
        copy.phase, copy.frozen_by = phase, set()

    def remove(self, copy: Copy) -> None:
        """Nothing of the guest is left here."""
        self.kill(copy)
        if self.copies.get(copy.guest.id) is copy:
            del self.copies[copy.guest.id]
