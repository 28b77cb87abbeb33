# SPDX-License-Identifier: Apache-2.0
"""Kill the coordinator again and again, while people work: everything acknowledged must be there.

    python -m tests.chaos.leader --seconds 600

Five peers, each in a network namespace. One thread kills the coordinator with SIGKILL, waits for the next one
and starts the killed one again. Others work meanwhile, each asking any peer: one makes tokens, one deploys
labs and takes them down, one moves guests. In the end every acknowledged token and lab is there, every guest
of a lab that was not taken down runs, and no guest ever ran twice (`witness.py`). The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from proto.api import OperationError
from tests.built import built_helper, missing
from tests.chaos.anyone import Unanswered, ask_anyone
from tests.chaos.hosts import Hosts, hosts
from tests.chaos.witness import Witness
from tests.guest.beats import BEAT

NAMES = ["tokyo", "virginia", "oslo", "lima", "cairo"]
BETWEEN_KILLS = 4.0
PATIENCE = 120.0
SETTLE = 120.0
MOST_LABS = 3


def lab_file(name: str) -> str:
    """Two guests that say that they run, and a link between them."""
    node = {"image": "mini", "memory": "40M", "exec": [BEAT]}
    links = [{"endpoints": ["a:eth1", "b:eth1"], "subnet": "10.77.0.0/24"}]
    return json.dumps({"name": name, "topology": {"nodes": {"a": node, "b": node}, "links": links}})


class Run:
    """One run, and what was acknowledged in it."""

    def __init__(self, mesh: Hosts, seconds: float, seed: int) -> None:
        self._mesh = mesh
        self._end = time.monotonic() + seconds
        self._seed = seed
        self.kills = 0
        self.tokens: list[str] = []
        self.labs: set[str] = set()
        self.taken_down: set[str] = set()
        self.moves = 0
        self.refused: list[str] = []
        self.unanswered: list[str] = []
        self.trouble: list[str] = []

    def run(self) -> None:
        """Kill and work until the time is over."""
        works = (self._kill, self._make_tokens, self._deploy, self._move)
        threads = [threading.Thread(target=self._guarded, args=(work,), name=work.__name__) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._mesh.up_all()

    def _guarded(self, work: Callable[[random.Random], None]) -> None:
        rng = random.Random(f"{self._seed} {work.__name__}")
        while time.monotonic() < self._end and not self.trouble:
            try:
                work(rng)
            except Unanswered as error:
                self.unanswered.append(str(error))
            except OperationError as error:
                self.refused.append(f"{work.__name__}: {error.message}")
                time.sleep(1.0)
            except Exception as error:  # noqa: BLE001 - a broken thread must end the run, in words
                self.trouble.append(f"{work.__name__}: {error!r}")

    def _ask(self, rng: random.Random, op: str, **args: Any) -> Any:
        return ask_anyone(self._mesh, rng, op, PATIENCE, lambda: NAMES, **args)

    def _kill(self, rng: random.Random) -> None:
        time.sleep(BETWEEN_KILLS * (0.5 + rng.random()))
        leader = self._mesh.wait_for_leader(NAMES)
        self._mesh.kill(leader)
        self.kills += 1
        self._mesh.wait_for_leader([name for name in NAMES if name != leader])
        self._mesh.up_all()

    def _make_tokens(self, rng: random.Random) -> None:
        made = self._ask(rng, "peer.token.new", ttl=86400.0, uses=1, role="viewer")
        self.tokens.append(made["id"])
        time.sleep(0.05)

    def _deploy(self, rng: random.Random) -> None:
        if len(self.labs) >= MOST_LABS:
            lab = rng.choice(sorted(self.labs))
            self.labs.discard(lab)
            self._take_down(rng, lab)
            self.taken_down.add(lab)
        name = f"lab{len(self.taken_down) + len(self.labs) + len(self.refused)}-{rng.randrange(10**6)}"
        self._ask(rng, "lab.up", lab=lab_file(name), source=f"{name}.yaml")
        self.labs.add(name)

    def _take_down(self, rng: random.Random, lab: str) -> None:
        try:
            self._ask(rng, "lab.down", lab=lab)
        except OperationError as error:
            if error.code == "conflict":
                self.labs.add(lab)  # a guest of it is being moved: another time
            raise

    def _move(self, rng: random.Random) -> None:
        time.sleep(1.0)
        guests = self._ask(rng, "vm.ls")
        running = [row for row in guests if row["state"] == "running"]
        if running:
            row = rng.choice(running)
            to = rng.choice([name for name in NAMES if name != row["peer"]])
            record = self._ask(rng, "vm.migrate", vm=f"{row['lab']}/{row['vm']}", to=to)
            self.moves += bool(record["ok"])

    def check(self) -> None:
        """After the faults: all that was acknowledged is there, and everything runs."""
        leader = self._mesh.wait_for_leader(NAMES)
        known = {token["id"] for token in self._mesh.ask(leader, "peer.token.ls")}
        self._must_be_empty("acknowledged tokens are not there", set(self.tokens) - known)
        there = {row["lab"] for row in self._mesh.ask(leader, "lab.ls")}
        self._must_be_empty("acknowledged labs are not there", self.labs - there)
        self._must_be_empty("labs taken down are there", self.taken_down & there)
        deadline = time.monotonic() + SETTLE
        while late := self._not_running(leader):
            if time.monotonic() > deadline:
                self.trouble.append(f"guests do not run: {late}")
                return
            time.sleep(0.5)

    def _must_be_empty(self, what: str, these: set[str]) -> None:
        if these:
            self.trouble.append(f"{what}: {', '.join(sorted(these)[:5])} ({len(these)})")

    def _not_running(self, leader: str) -> list[str]:
        rows = self._mesh.ask(leader, "vm.ls")
        return [
            f"{r['lab']}/{r['vm']} is {r['state']}"
            for r in rows
            if r["lab"] in self.labs and r["state"] != "running"
        ]

    def result(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        return {
            "kills": self.kills,
            "tokens": len(self.tokens),
            "labs": len(self.labs) + len(self.taken_down),
            "migrations": self.moves,
            "refused": len(self.refused),
            "unanswered": len(self.unanswered),
            "trouble": self.trouble,
        }


def chaos(seconds: float, seed: int) -> Run:
    """One run with everything checked; its `trouble` is empty if all was well."""
    with hosts(NAMES, built_helper()) as mesh, Witness(mesh.directories()) as witness:
        mesh.wait_for_leader(NAMES, voters=5)
        run = Run(mesh, seconds, seed)
        run.run()
        run.check()
        run.trouble += witness.wrong()
        return run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests.chaos.leader", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if gone := missing():
        print(f"chaos: {gone}", file=sys.stderr)
        return 2
    run = chaos(options.seconds, options.seed)
    for sentence in [*run.refused[:20], *run.unanswered[:20]]:
        print(f"chaos: {sentence}", file=sys.stderr)
    print(json.dumps(run.result()))
    return 1 if run.trouble else 0


if __name__ == "__main__":
    sys.exit(main())
