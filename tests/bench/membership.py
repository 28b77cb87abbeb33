# SPDX-License-Identifier: Apache-2.0
"""The membership, simulated: how soon a crash is known to the first and to all, and what it costs.

The members are the real machines in a simulated LAN (`tests/sim/swim_world.py`); times are simulated, so the
figures do not depend on this machine. Bytes are those of the datagrams with their IP and UDP headers, sent by
one member a second while nothing happens. A false positive is a running member that another one counts as
dead.

Beside it stands what memberlist (the SWIM library of Consul and Nomad) takes by its own formula with its LAN
settings: a probe each second (in the mean e/(e - 1) intervals until a crashed member is probed), a probe's
interval for its failure, suspicion of 4 x log10(n) intervals when enough others confirm it (6 times that when
nobody does), and then gossip to 3 others every 200 ms.
"""

from __future__ import annotations

import gc
import math
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.bench.report import Figure, Row, figure
from tests.sim.swim_world import World

WARM = 5.0
QUIET = 15.0
"""Seconds over which the bytes of members without news are counted."""

WATCHED = 60.0
"""Seconds within which a crash must be known to all."""

STEP = 2.0
TRIALS = {10: 10, 100: 4, 1000: 1}
"""Crashes by number of members."""

LARGEST = 10_000
LOSSES = (0.0, 0.1)
UNKNOWN: Figure = {"error": "memberlist was not run: only its detection has a formula"}


@dataclass
class Seen:
    """What the trials of one size and loss gave: seconds, views, bytes a second and member."""

    first: list[float] = field(default_factory=list)
    all: list[float] = field(default_factory=list)
    wrong: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)


def run() -> list[Row]:
    """Simulate; raises `RuntimeError` if a crash stays unknown to somebody."""
    rows = []
    for members, loss in [*((n, loss) for n in TRIALS for loss in LOSSES), (LARGEST, 0.0)]:
        seen = Seen()
        for seed in range(TRIALS.get(members, 1)):
            with _without_collector():
                _crash(seed, members, loss, seen)
        rows += _rows(members, loss, seen)
        print(f"bench membership: {members} members, {loss:.0%} loss done", file=sys.stderr, flush=True)
    return rows


@contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of objects live as long as a world: looking through them again and again finds nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def _crash(seed: int, members: int, loss: float, seen: Seen) -> None:
    rng = random.Random(seed)
    world = World(seed, members, loss=loss)
    world.run(WARM)
    quiet_from = sum(host.bytes_out for host in world.up)
    world.run(WARM + QUIET)
    seen.rate.append((sum(host.bytes_out for host in world.up) - quiet_from) / QUIET / members)
    victim = world.hosts[rng.choice(world.roster.ids)]
    at = WARM + QUIET + rng.random()
    world.run(at)
    world.crash(victim)
    known: list[float] = []
    while len(known) < members - 1:
        if world.now > at + WATCHED:
            raise RuntimeError(f"{members} members, seed {seed}: {len(known)} know of a crash after a minute")
        world.run(world.now + STEP)
        known = [time for time, _, peer, state in world.turned if (peer, state) == (victim.id, "dead")]
    seen.first.append(min(known) - at)
    seen.all.append(max(known) - at)
    seen.wrong.append(sum(state == "dead" and peer != victim.id for _, _, peer, state in world.turned))


def _rows(members: int, loss: float, seen: Seen) -> list[Row]:
    where = f"{members} peers, {loss:.0%} loss"
    return [
        Row(f"detection first, {where}", "s", "lower", figure(seen.first), {"memberlist": _formula(members)}),
        Row(
            f"detection all, {where}",
            "s",
            "lower",
            figure(seen.all),
            {"memberlist": _formula(members, spread=True)},
        ),
        Row(f"false positives, {where}", "views", "lower", figure(seen.wrong), {"memberlist": UNKNOWN}),
        Row(f"bytes per peer, {where}", "B/s", "lower", figure(seen.rate), {"memberlist": UNKNOWN}),
    ]


def _formula(members: int, *, spread: bool = False) -> Figure:
    """Least: probed at once, enough confirm. Median: probed in the mean time. Most: the last of a round, and
    nobody confirms."""
    suspicion = 4 * max(1.0, math.log10(members))
    gossip = 0.2 * math.log(members, 4) if spread else 0.0
    probed = math.e / (math.e - 1)
    return figure(
        [1 + suspicion + gossip, probed + 1 + suspicion + gossip, members + 1 + 6 * suspicion + gossip]
    )
