# SPDX-License-Identifier: Apache-2.0
"""Split five peers into two and three; ask both sides to start, move and delete guests; heal; look.

    python -m tests.chaos.split

The side with three decides: it starts, moves and removes guests, and starts a lease-bound guest of the other
side anew from its image. The side with two keeps its `run` guests going and refuses everything that needs a
decision, saying who is missing. After the heal there is one truth again: left-over copies are ended. No guest
ever ran twice (`witness.py`). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from proto.api import OperationError
from tests.built import built_helper, missing
from tests.chaos.hosts import Hosts, hosts
from tests.chaos.witness import Witness
from tests.guest.beats import BEAT

FEW = ["tokyo", "virginia"]
MANY = ["oslo", "lima", "cairo"]
LAB = "split"
LONG_ENOUGH = 3.0
"""Seconds in which a guest that runs has printed some lines."""


def lab_file() -> str:
    """A lease-bound guest and two free ones on each side."""

    def node(place: str, policy: str) -> dict[str, Any]:
        return {"image": "mini", "memory": "40M", "exec": [BEAT], "place": place, "on-partition": policy}

    nodes = {
        "few-free": node("tokyo", "run"),
        "few-removed": node("tokyo", "run"),
        "few-bound": node("virginia", "freeze"),
        "many-free": node("oslo", "run"),
        "many-bound": node("lima", "freeze"),
    }
    return json.dumps({"name": LAB, "topology": {"nodes": nodes}})


class Split:
    """One run; `trouble` is what was not as it must be."""

    def __init__(self, mesh: Hosts, witness: Witness) -> None:
        self._mesh = mesh
        self._witness = witness
        self.trouble: list[str] = []
        self.refusals: list[str] = []
        self.failover_s: float | None = None

    def run(self) -> None:
        """The whole story."""
        mesh = self._mesh
        mesh.wait_for_leader(mesh.names, voters=5)
        mesh.ask("tokyo", "lab.up", timeout=120, lab=lab_file(), source="split.yaml")
        self._mesh.soon(
            "all guests have begun", lambda: all(self._witness.count(f"{LAB}/{n}") for n in _names())
        )
        mesh.cut(FEW, MANY)
        cut = time.monotonic()
        mesh.wait_for_leader(MANY)
        self._mesh.soon("the bound guest of the few runs at the many", self._failed_over)
        self.failover_s = round(time.monotonic() - cut, 2)
        self._ask_the_few()
        self._ask_the_many()
        self._still_free()
        mesh.heal()
        self._healed()

    def _failed_over(self) -> bool:
        row = self._guest("cairo", "few-bound")
        return row is not None and row["state"] == "running" and row["peer"] in MANY

    def _guest(self, asked: str, name: str) -> dict[str, Any] | None:
        rows = self._mesh.ask(asked, "vm.ls")
        return next((row for row in rows if row["vm"] == name), None)

    def _ask_the_few(self) -> None:
        commands: dict[str, dict[str, Any]] = {
            "vm.run": {"image": "mini", "name": "new-few", "memory": 40 << 20},
            "vm.migrate": {"vm": f"{LAB}/few-free", "to": "virginia"},
            "vm.rm": {"vm": f"{LAB}/few-removed", "force": True},
        }
        for op, args in commands.items():
            try:
                self._mesh.ask("virginia", op, timeout=60, **args)
                self.trouble.append(f"the minority did {op}")
            except OperationError as error:
                self.refusals.append(f"{op}: {error.message}")
                if error.code != "no-majority" or not any(name in error.message for name in MANY):
                    self.trouble.append(
                        f"the minority's refusal of {op} does not say who is missing: {error}"
                    )

    def _ask_the_many(self) -> None:
        ask = self._mesh.ask
        ask("lima", "vm.run", timeout=60, image="mini", name="new-many", memory=40 << 20)
        moved = ask("cairo", "vm.migrate", timeout=60, vm=f"{LAB}/many-free", to="cairo")
        if not moved["ok"]:
            self.trouble.append(f"the majority could not move a guest: {moved['reason']}")
        ask("oslo", "vm.rm", timeout=90, vm=f"{LAB}/few-removed", force=True)

    def _still_free(self) -> None:
        before = self._witness.count(f"{LAB}/few-free")
        time.sleep(LONG_ENOUGH)
        if self._witness.count(f"{LAB}/few-free") == before:
            self.trouble.append("the free guest of the minority stood still")

    def _healed(self) -> None:
        mesh = self._mesh
        mesh.wait_for_leader(FEW)
        wanted = {"few-free", "few-bound", "many-free", "many-bound", "new-many"}

        def settled() -> bool:
            for peer in mesh.names:
                rows = mesh.ask(peer, "vm.ls")
                if {row["vm"] for row in rows} != wanted or any(row["state"] != "running" for row in rows):
                    return False
            return True

        self._mesh.soon("one truth everywhere", settled)
        self._mesh.soon("left-over copies are ended", lambda: self._directories() == len(wanted))
        before = {name: self._witness.count(f"{LAB}/{name}") for name in _names() if name != "few-removed"}
        time.sleep(LONG_ENOUGH)
        for name, count in before.items():
            if self._witness.count(f"{LAB}/{name}") == count:
                self.trouble.append(f"{name} does not run after the heal")
        self.trouble += self._witness.wrong()

    def _directories(self) -> int:
        return sum(1 for _ in self._mesh.cli.dir.glob("*/guests/*/guest.json"))

    def result(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        return {"failover_s": self.failover_s, "refusals": self.refusals, "trouble": self.trouble}


def _names() -> list[str]:
    return list(json.loads(lab_file())["topology"]["nodes"])


def chaos() -> Split:
    """One run."""
    with hosts([*FEW, *MANY], built_helper()) as mesh, Witness(mesh.directories()) as witness:
        split = Split(mesh, witness)
        split.run()
        return split


def main() -> int:
    summary = (__doc__ or "").partition("\n")[0]
    argparse.ArgumentParser(prog="tests.chaos.split", description=summary).parse_args()
    if gone := missing():
        print(f"chaos: {gone}", file=sys.stderr)
        return 2
    split = chaos()
    print(json.dumps(split.result()))
    return 1 if split.trouble else 0


if __name__ == "__main__":
    sys.exit(main())
