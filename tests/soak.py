# SPDX-License-Identifier: Apache-2.0
"""Move a guest that checks itself again and again, under load, between two peers on this machine.

    python -m tests.soak --moves 200

Says how it goes on stderr. The last line on stdout is one JSON object; exit 0 only if every move succeeded,
no witness saw anything wrong, no frame was lost and the TCP connection of the beginning is still the one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.built import missing
from tests.guest.witness import FAULTS, Load, Witnesses, run_to_end, spread, two_peers

LOAD = Load(memory=16, threads=2)
EVERY = 10
"""How many moves there are between two lines about them."""


class Soak:
    """One soak, and what is known of it so far."""

    def __init__(self, moves: int) -> None:
        self.moves = moves
        self.records: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.trouble: list[str] = []
        self._began = time.monotonic()

    async def run(self) -> None:
        """Start everything, move, and end everything."""
        with tempfile.TemporaryDirectory(prefix="mobi-soak-") as base:
            async with two_peers(Path(base)) as peers:
                witnesses = Witnesses(*peers)
                self.records = witnesses.records
                await witnesses.start(LOAD)
                for number in range(1, self.moves + 1):
                    if not await self._move(witnesses, number):
                        break
                await witnesses.working()
                self.trouble += await witnesses.wrong()
                self.reports = list((await witnesses.reports()).values())

    async def _move(self, witnesses: Witnesses, number: int) -> bool:
        record = await witnesses.move()
        if not record["ok"] or record["verified"] != "ok":
            self.trouble.append(f"move {number}: {record['reason'] or record['verified']}")
            return False
        if number % EVERY == 0 or number == self.moves:
            self.trouble += await witnesses.wrong()
            print(f"{time.monotonic() - self._began:6.0f} s: {number} moves", file=sys.stderr, flush=True)
        return not self.trouble

    def result(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        good = [record for record in self.records if record["ok"]]
        hosts = [r["downtime_ms"]["host"] for r in good if r["downtime_ms"]["host"] is not None]
        return {
            "migrations": len(good),
            "bad_words": sum(report[key] for report in self.reports for key in FAULTS if key != "bad"),
            "frames_lost": sum(record["frames_lost"] for record in self.records),
            "connection_survived": bool(self.reports)
            and all(r["tcp_connections"] == 1 and not r["tcp_errors"] for r in self.reports),
            "downtime_ms": spread(hosts),
        }

    @property
    def passed(self) -> bool:
        result = self.result()
        return (
            not self.trouble
            and result["migrations"] == self.moves
            and not result["bad_words"]
            and not result["frames_lost"]
            and result["connection_survived"]
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moves", type=int, default=200, help="how many migrations (default 200)")
    moves = parser.parse_args().moves
    if gone := missing():
        print(f"soak: {gone}", file=sys.stderr)
        return 2
    soak = Soak(moves)
    if failure := run_to_end(soak.run):
        soak.trouble.append(failure)
    for sentence in soak.trouble:
        print(f"soak: {sentence}", file=sys.stderr)
    print(json.dumps(soak.result()))
    return 0 if soak.passed else 1


if __name__ == "__main__":
    sys.exit(main())
