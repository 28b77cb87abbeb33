# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.fuzz --seconds T [NAME…]`: run targets, or `--replay NAME FILE`: run one on one input.

Every target is a process of its own, one after the other. The exit status is 0 only if nothing was found and
every target has run. The last line is `{"targets": {NAME: {"runs", "seconds", "found"}}, "found"}`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz.helper import C_TARGETS, build, program
from tests.fuzz.registry import TARGETS

ROOT = Path(__file__).parents[2]
FINDINGS = ("crash-", "timeout-", "oom-", "leak-")
"""How libFuzzer names what it found."""

MEMORY = Path("/dev/shm")
"""Where a target's own files are quick."""

PATIENCE = 30
"""Seconds after which one input is a finding, since a parser answers at once."""


@dataclass
class Outcome:
    """What a target did; `found` counts inputs, and a target that could not run."""

    runs: int
    seconds: float
    found: int


def command(name: str) -> list[str]:
    """The process of a target, up to libFuzzer's options."""
    if name in C_TARGETS:
        return [str(program(name)), f"-max_len={C_TARGETS[name].longest}"]
    return [sys.executable, "-m", "tests.fuzz.python", name]


def prepare(name: str, room: Path) -> Path:
    """The directory of inputs to begin with: the start corpus, earlier runs', and what they found."""
    corpus = room / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    start = C_TARGETS[name].start if name in C_TARGETS else TARGETS[name].start
    for number, data in enumerate(start()):
        (corpus / f"start-{number}").write_bytes(data)
    for finding in room.glob("crash-*"):
        finding.rename(corpus / finding.name)
    return corpus


def findings(room: Path) -> list[Path]:
    """What libFuzzer has left, each renamed to crash-…"""
    left = [path for path in sorted(room.iterdir()) if path.name.startswith(FINDINGS)]
    return [
        path if path.name.startswith("crash-") else path.rename(room / f"crash-{path.name}") for path in left
    ]


def execute(name: str, seconds: int, room: Path) -> tuple[int | None, int]:
    """Run the process of a target: its exit status (None: it was killed), and how many inputs it ran."""
    options = [f"-max_total_time={seconds}", f"-timeout={PATIENCE}", "-print_final_stats=1"]
    options += [f"-artifact_prefix={room}/", str(prepare(name, room))]
    status: int | None = None
    memory = tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None)
    with memory as own, (room / "log").open("wb") as log, suppress(subprocess.TimeoutExpired):
        status = subprocess.run(
            [*command(name), *options],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=os.environ | {"UBSAN_OPTIONS": "print_stacktrace=1", "TMPDIR": own},
            timeout=seconds + 10 * PATIENCE,
            check=False,
        ).returncode
    told = re.findall(r"stat::number_of_executed_units: (\d+)", (room / "log").read_text(errors="replace"))
    return status, int(told[-1]) if told else 0


def run(name: str, seconds: int, room: Path) -> Outcome:
    """Run one target; says on stdout what came of it."""
    began = time.monotonic()
    status, runs = execute(name, seconds, room)
    outcome = Outcome(runs, round(time.monotonic() - began, 1), 0)
    for path in findings(room):
        outcome.found += 1
        replay = f"{near(Path(sys.executable))} -m tests.fuzz --replay {name} {near(path)}"
        print(f"fuzz: {name}: found {near(path)}; replay it: {replay}", flush=True)
    if not outcome.found and (status or status is None or not runs):
        outcome.found = 1
        print(f"fuzz: {name}: did not run to its end (status {status}), see {near(room / 'log')}", flush=True)
    print(f"fuzz: {name}: {runs:,} runs in {outcome.seconds:.0f} s, {outcome.found} found", flush=True)
    return outcome


def near(path: Path) -> Path:
    """The path as it is seen from the checkout."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def replay(name: str, path: Path) -> int:
    """Run one input: 0 if all is well with it, else 1 after the traceback or the sanitizer's report."""
    if name in C_TARGETS:
        build()
        return 1 if subprocess.run([program(name), path], check=False).returncode else 0
    try:
        TARGETS[name].run(path.read_bytes())
    except Exception:  # noqa: BLE001 - whatever it is, it is what was found
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    every = [name for name in (*TARGETS, *C_TARGETS) if name != "planted"]
    parser = argparse.ArgumentParser(prog="tests.fuzz", description="Fuzz the parsers.")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument(
        "--into", type=Path, default=ROOT / "build" / "fuzz", help="directory for corpora, findings"
    )
    parser.add_argument("--replay", nargs=2, metavar=("NAME", "FILE"))
    parser.add_argument(
        "names", nargs="*", choices=[*every, "planted", []], metavar="NAME", help=", ".join(every)
    )
    chosen = parser.parse_args()
    if chosen.replay:
        return replay(chosen.replay[0], Path(chosen.replay[1]))
    names = chosen.names or every
    if any(name in C_TARGETS for name in names):
        build()
    outcomes = {name: run(name, chosen.seconds, chosen.into.resolve() / name) for name in names}
    found = sum(outcome.found for outcome in outcomes.values())
    print(json.dumps({"targets": {name: asdict(o) for name, o in outcomes.items()}, "found": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
