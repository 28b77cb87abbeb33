# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.bench [NAME…]`: run benchmarks; each prints a table and writes build/bench/NAME.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tests.bench import failover, membership, mesh, migration
from tests.bench.report import Row, machine, show, write

BENCHMARKS: dict[str, Callable[[], list[Row]]] = {"mesh": mesh.run, "migration": migration.run}
PARTS: dict[str, Callable[[], list[Row]]] = {"failover": failover.run, "membership": membership.run}
"""What a benchmark includes and can be run alone."""

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.bench", description="Run benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all ({', '.join(BENCHMARKS)})")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "build/bench", help="where the files go")
    options = parser.parse_args()
    known = {**BENCHMARKS, **PARTS}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no benchmark is named {unknown[0]!r} (there are: {', '.join(known)})")
    for name in options.names or BENCHMARKS:
        facts = machine()
        try:
            rows = known[name]()
        except (OSError, RuntimeError) as error:
            print(f"bench {name}: {error}", file=sys.stderr)
            return 1
        show(name, facts, rows)
        print(f"written: {write(options.out, name, facts, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
