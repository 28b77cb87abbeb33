# SPDX-License-Identifier: Apache-2.0
"""Stop every process of a host for 30 seconds and let it go on: nothing that its stale guest says is taken.

    python -m tests.chaos.stopped --seconds 30

A lease-bound guest tells another one, at a second host, its beats, each over a TCP connection of its own.
Its own host stands still; the guest is started anew elsewhere and goes on telling; then the host goes on,
with a copy of the guest that believes no time has passed. After the first beat of the new copy was heard,
none of the old one must be. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from tests.built import built_helper, missing
from tests.chaos.hosts import Hosts, hosts
from tests.guest.beats import HEARD, PORT, READ_CLOCK, Beat, parse

NAMES = ["tokyo", "virginia", "oslo"]
LAB = "stopped"
SPEAKER = f"{LAB}/speaker"
HEARER = f"{LAB}/hearer"
SAY = f"set -- {READ_CLOCK}; echo beat $boot $n $1 $2 | nc -w 1 hearer {PORT}; n=$((n+1)); usleep 100000"
LOOP = f"boot=$(cat /proc/sys/kernel/random/boot_id); n=0; while :; do {SAY}; done"
SPEAK = f"( {LOOP} ) </dev/null >/dev/null 2>&1 &"
HEAR = f"( while :; do nc -l -p {PORT}; done ) </dev/null >{HEARD} 2>/dev/null &"
ENOUGH = 20
AFTERWARDS = 10.0
"""Seconds for which the woken host may try."""


def lab_file() -> str:
    """A guest that speaks, bound to its peer's lease, and one that hears."""
    small = {"image": "mini", "memory": "40M"}
    nodes = {
        "speaker": {**small, "place": "virginia", "on-partition": "freeze", "exec": [SPEAK]},
        "hearer": {**small, "place": "oslo", "exec": [HEAR]},
    }
    links = [{"endpoints": ["speaker:eth1", "hearer:eth1"], "subnet": "10.78.0.0/24"}]
    return json.dumps({"name": LAB, "topology": {"nodes": nodes, "links": links}})


class Stopped:
    """One run; `trouble` is what was not as it must be."""

    def __init__(self, mesh: Hosts, seconds: float) -> None:
        self._mesh = mesh
        self._seconds = seconds
        self.trouble: list[str] = []
        self.heard: dict[str, int] = {}

    def run(self) -> None:
        """The whole story."""
        mesh = self._mesh
        mesh.wait_for_leader(mesh.names, voters=3)
        mesh.ask("tokyo", "lab.up", timeout=120, lab=lab_file(), source="stopped.yaml")
        self._mesh.soon("the speaker is heard", lambda: len(self._heard()) >= ENOUGH)
        with mesh.stopped("virginia"):
            until = time.monotonic() + self._seconds
            self._mesh.soon("a second copy is heard", lambda: len({beat.boot for beat in self._heard()}) == 2)
            time.sleep(max(0.0, until - time.monotonic()))
        time.sleep(AFTERWARDS)
        self._judge(self._heard())

    def _heard(self) -> list[Beat]:
        """The beats which reached the hearer, in the order of their arrival."""
        return parse(self._mesh.read("oslo", HEARER, HEARD))

    def _judge(self, beats: list[Beat]) -> None:
        order = list(dict.fromkeys(beat.boot for beat in beats))
        for beat in beats:
            self.heard[beat.boot] = self.heard.get(beat.boot, 0) + 1
        if len(order) != 2:
            self.trouble.append(f"{len(order)} copies were heard, not two")
            return
        first_of_new = next(place for place, beat in enumerate(beats) if beat.boot == order[1])
        stale = [beat.number for beat in beats[first_of_new:] if beat.boot == order[0]]
        if stale:
            self.trouble.append(f"{len(stale)} beats of the stale copy were taken, from {stale[0]} on")
        rows = self._mesh.ask("virginia", "vm.ls")
        places = [row["peer"] for row in rows if row["vm"] == "speaker"]
        if not places or places == ["virginia"]:
            self.trouble.append(f"the speaker is at {places} in the eyes of the woken host")

    def result(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        return {"heard": self.heard, "trouble": self.trouble}


def chaos(seconds: float) -> Stopped:
    """One run."""
    with hosts(NAMES, built_helper()) as mesh:
        stopped = Stopped(mesh, seconds)
        stopped.run()
        return stopped


def main() -> int:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="tests.chaos.stopped", description=summary)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    if gone := missing():
        print(f"chaos: {gone}", file=sys.stderr)
        return 2
    stopped = chaos(options.seconds)
    print(json.dumps(stopped.result()))
    return 1 if stopped.trouble else 0


if __name__ == "__main__":
    sys.exit(main())
