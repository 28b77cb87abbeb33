# SPDX-License-Identifier: Apache-2.0
"""Try out every step of a protocol with every fault, on real peers and guests.

    python -m tests.faults migration

Every case is tried with the coordinator as the source and as the destination. A line per case goes to stderr;
the last line on stdout is one JSON object `{cases, passed, failed}`, and exit is 0 only if none failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from tests.built import missing
from tests.guest.faults import CASES, Case, laboratory
from tests.guest.witness import run_to_end

Attempt = tuple[Case, str]


class Trial:
    """The attempts that are still to be made, and those that failed."""

    def __init__(self, attempts: list[Attempt]) -> None:
        self.todo = attempts
        self.passed = 0
        self.failed: list[str] = []

    async def _some(self) -> None:
        """As many as go well in one laboratory: after a failure nothing in it can be relied on."""
        async with laboratory() as room:
            while self.todo:
                case, source = self.todo.pop(0)
                began = time.monotonic()
                try:
                    await room.try_out(case, source)
                except Exception as error:
                    self._note(f"{case} (from {source})", f"FAILED: {error!r}", began)
                    raise
                self.passed += 1
                self._note(f"{case} (from {source})", "passed", began)

    def _note(self, attempt: str, outcome: str, began: float) -> None:
        if outcome != "passed":
            self.failed.append(attempt)
        print(f"{time.monotonic() - began:5.1f} s  {attempt}: {outcome}", file=sys.stderr, flush=True)

    def run(self) -> None:
        """Make all attempts."""
        while self.todo:
            before = len(self.todo)
            if (failure := run_to_end(self._some)) and len(self.todo) == before:
                case, source = self.todo.pop(0)
                self._note(f"{case} (from {source})", f"FAILED: {failure}", time.monotonic())


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=["migration"], help="which table of steps and faults")
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    options = parser.parse_args()
    if gone := missing():
        print(f"faults: {gone}", file=sys.stderr)
        return 2
    cases = [case for case in CASES if options.only in str(case)]
    attempts = [(case, source) for source in ("tokyo", "virginia") for case in cases]
    trial = Trial(list(attempts))
    trial.run()
    print(json.dumps({"cases": len(attempts), "passed": trial.passed, "failed": trial.failed}))
    return 1 if trial.failed else 0


if __name__ == "__main__":
    sys.exit(main())
