# SPDX-License-Identifier: Apache-2.0
"""How long a guest is away when its host dies: from the death to the first beat of the new copy.

Three peers in network namespaces on one machine, with the leases of a LAN. Everything on the host of a
lease-bound guest is killed in one go; the coordinator waits for the lease to run out, chooses another peer,
and that one starts the guest from its image. The time is told by the guest itself (`tests/guest/beats.py`),
so it includes the boot. When the coordinator dies with the guest, an election comes on top.
"""

from __future__ import annotations

import json
import sys
import time

from tests.bench.report import Row, figure
from tests.built import built_helper, missing
from tests.chaos.hosts import Hosts, hosts
from tests.chaos.witness import Witness
from tests.guest.beats import BEAT

NAMES = ["tokyo", "virginia", "oslo"]
DEATHS = 5
WAIT = 60.0
QUIET = 2.0
"""Seconds of ordinary running before each death."""
GUEST = "away/guest"


def run() -> list[Row]:
    """Measure; raises `RuntimeError` if something is missing or went wrong."""
    if gone := missing():
        raise RuntimeError(gone)
    found: dict[bool, list[float]] = {False: [], True: []}
    try:
        with hosts(NAMES, built_helper()) as mesh, Witness(mesh.directories()) as witness:
            mesh.wait_for_leader(NAMES, voters=3)
            node = {"image": "mini", "memory": "40M", "on-partition": "freeze", "exec": [BEAT]}
            lab = json.dumps({"name": "away", "topology": {"nodes": {"guest": node}}})
            mesh.ask("tokyo", "lab.up", timeout=60, lab=lab, source="away.yaml")
            for number in range(2 * DEATHS):
                with_leader = number % 2 == 1
                found[with_leader].append(_death(mesh, witness, with_leader))
                print(f"bench mesh: {number + 1} of {2 * DEATHS} deaths", file=sys.stderr, flush=True)
    except (TimeoutError, AssertionError) as error:
        raise RuntimeError(str(error)) from error
    cases = {False: "guest away, its host died", True: "guest away, the coordinator's host died"}
    return [Row(cases[with_leader], "s", "lower", figure(times)) for with_leader, times in found.items()]


def _death(mesh: Hosts, witness: Witness, with_leader: bool) -> float:
    """Kill the guest's host; seconds until the guest's next beat."""
    host = _settled(mesh, with_leader)
    time.sleep(QUIET)
    killed = time.time()
    mesh.kill_host(host)
    others = [name for name in NAMES if name != host]
    deadline = time.monotonic() + WAIT
    while not (beats := witness.since(GUEST, killed, others)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{GUEST} did not come back within {WAIT:g} s")
        time.sleep(0.05)
    mesh.up_all()
    mesh.wait_for_leader(NAMES, voters=3)
    return beats[0].at - killed


def _settled(mesh: Hosts, with_leader: bool) -> str:
    """The guest's host, once it is the coordinator's, or is not; the guest is moved there if need be."""
    leader = mesh.wait_for_leader(NAMES, voters=3)
    host = str(mesh.ask(leader, "vm.show", vm=GUEST)["peer"])
    if (host == leader) is not with_leader:
        host = leader if with_leader else next(name for name in NAMES if name != leader)
        moved = mesh.ask(leader, "vm.migrate", timeout=60, vm=GUEST, to=host)
        if not moved["ok"]:
            raise TimeoutError(f"{GUEST} could not be moved to {host}: {moved['reason']}")
    return host
