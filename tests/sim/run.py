# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: T201 - a command whose output is its result
"""`python -m tests.sim.run --seeds N --start K`: the simulations over seeds K…K+N-1.

Each simulation is a function of a seed that raises `AssertionError` when something is that must not be, with
the trace as the exception's notes. The last line is `N seeds, V violations`; exit 0 only if V is 0.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from tests.sim.handover_world import World
from tests.sim.raft_world import World as RaftWorld
from tests.sim.swim_faults import Trial


def handover(seed: int) -> None:
    """One guest's right to run moves, or not, through crashes, cuts and losses."""
    world = World(seed)
    try:
        world.run()
    except Exception as error:
        error.add_note("\n".join(world.trace))
        raise


def membership(seed: int) -> None:
    """Members come, go, stand still and are cut off; what others see of them follows."""
    trial = Trial(seed)
    try:
        trial.settle()
    except Exception as error:
        error.add_note("\n".join(trial.trace))
        raise


def raft(seed: int) -> None:
    """Replicas of a log crash, stand still and are cut off; they never disagree, and go on when they can."""
    world = RaftWorld(seed)
    try:
        world.run()
    except Exception as error:
        error.add_note("\n".join(world.lines()))
        raise


SIMULATIONS: dict[str, Callable[[int], None]] = {"handover": handover, "raft": raft, "membership": membership}


def replay_command(name: str, seed: int) -> str:
    return f"python -m tests.sim.run --only {name} --seeds 1 --start {seed}"


def main() -> int:
    parser = argparse.ArgumentParser(description="run the simulations")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--only", choices=sorted(SIMULATIONS), help="one simulation")
    arguments = parser.parse_args()
    chosen = [arguments.only] if arguments.only else sorted(SIMULATIONS)
    violations = 0
    for name in chosen:
        began = time.monotonic()
        for seed in range(arguments.start, arguments.start + arguments.seeds):
            try:
                SIMULATIONS[name](seed)
            except AssertionError as error:
                violations += 1
                print(f"{name}: seed {seed}: {error}")
                if arguments.seeds == 1:
                    print("\n".join(getattr(error, "__notes__", [])))
                else:
                    print(f"  replay: {replay_command(name, seed)}")
        print(f"{name}: {arguments.seeds} seeds in {time.monotonic() - began:.1f} s", file=sys.stderr)
    print(f"{arguments.seeds} seeds, {violations} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
