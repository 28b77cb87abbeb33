# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: T201 - a command whose output is its result
"""`python -m tests.sim.run --seeds N --start K`: the simulations over seeds K…K+N-1.

Each simulation is a function of a seed that raises `AssertionError` when something is that must not be, with
the trace as the exception's notes. A seed that fails is told with the command that replays it; a single seed
with the end of its trace, or all of it with `--trace`. Seeds are spread over `--jobs` processes. The last
line is `N seeds, V violations`; exit 0 only if V is 0.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from tests.sim import handover_world, mesh_world, raft_world, swim_faults

LAST_LINES = 150


def handover(seed: int) -> None:
    """One guest's right to run moves, or not, through crashes, cuts and losses."""
    world = handover_world.World(seed)
    try:
        world.run()
    except Exception as error:
        error.add_note("\n".join(world.trace))
        raise


def mesh(seed: int) -> None:
    """A whole mesh: everything that peers decide, whatever fails."""
    world = mesh_world.World(seed)
    try:
        world.run()
    except Exception as error:
        error.add_note(world.trace())
        raise


def membership(seed: int) -> None:
    """Members come, go, stand still and are cut off; what others see of them follows."""
    trial = swim_faults.Trial(seed)
    try:
        trial.settle()
    except Exception as error:
        error.add_note("\n".join(trial.trace))
        raise


def raft(seed: int) -> None:
    """Replicas of a log crash, stand still and are cut off; they never disagree, and go on when they can."""
    world = raft_world.World(seed)
    try:
        world.run()
    except Exception as error:
        error.add_note("\n".join(world.lines()))
        raise


SIMULATIONS: dict[str, Callable[[int], None]] = {
    "handover": handover,
    "membership": membership,
    "mesh": mesh,
    "raft": raft,
}


@dataclass(frozen=True)
class Failure:
    """What a seed has found."""

    seed: int
    what: str
    trace: str


def replay_command(name: str, seed: int) -> str:
    return f"python -m tests.sim.run --only {name} --seeds 1 --start {seed} --trace"


def _try(name: str, seed: int) -> Failure | None:
    try:
        SIMULATIONS[name](seed)
    except Exception as error:  # noqa: BLE001 - a machine that raises is a finding like any other
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Failure(seed, f"{kind}{error}", "\n".join(getattr(error, "__notes__", [])))
    return None


def failures(name: str, seeds: range, jobs: int) -> Iterator[Failure]:
    """What the seeds find, as it is found."""
    one = partial(_try, name)
    if jobs == 1 or len(seeds) == 1:
        yield from filter(None, map(one, seeds))
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from filter(None, pool.imap_unordered(one, seeds, chunksize=max(1, min(20, len(seeds) // 20))))


def _tell(name: str, failure: Failure, trace: bool, alone: bool) -> None:
    if trace or alone:
        lines = failure.trace.splitlines()
        print("\n".join(lines if trace else lines[-LAST_LINES:]))
    print(f"{name}: seed {failure.seed}: {failure.what}")
    print(f"  replay: {replay_command(name, failure.seed)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="run the simulations")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", choices=sorted(SIMULATIONS), help="one simulation")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    parser.add_argument(
        "--trace", action="store_true", help="print all of what happened in a seed that fails"
    )
    arguments = parser.parse_args()
    violations = 0
    for name in [arguments.only] if arguments.only else sorted(SIMULATIONS):
        began = time.monotonic()
        seeds = range(arguments.start, arguments.start + arguments.seeds)
        for failure in failures(name, seeds, arguments.jobs):
            violations += 1
            _tell(name, failure, arguments.trace, alone=arguments.seeds == 1)
        print(f"{name}: {arguments.seeds} seeds in {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(f"{arguments.seeds} seeds, {violations} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
