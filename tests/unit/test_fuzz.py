# SPDX-License-Identifier: Apache-2.0
"""The fuzzers' targets: they hold for what they start from, and a mistake is found and can be replayed."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fuzz.helper import C_TARGETS
from tests.fuzz.registry import TARGETS
from tests.fuzz.target import Target, altered

ROOT = Path(__file__).parents[2]
SOUND = [target for target in TARGETS.values() if target.name != "planted"]


@pytest.mark.parametrize("target", SOUND, ids=lambda target: target.name)
def test_a_target_holds_for_its_start_corpus_and_inputs_near_it(target: Target) -> None:
    start = list(target.start())
    assert start
    rng = random.Random(1)
    for data in start:
        assert len(data) <= target.longest
        target.run(data)
        cut = bytearray(data[: rng.randrange(len(data) + 1)])
        target.run(bytes(cut))
        with suppress(IndexError):  # nothing is left of it
            cut[rng.randrange(len(cut) or 1)] = rng.randrange(256)
        target.run(bytes(cut))
        if target.form:
            target.run(altered(target.form, data, rng) or data)


def test_every_target_of_the_helper_is_built_and_has_inputs_to_start_from() -> None:
    folder = ROOT / "kernel" / "helper" / "fuzz"
    assert {path.stem for path in folder.glob("*.c")} == set(C_TARGETS)
    built = (folder / "meson.build").read_text()
    for name, target in C_TARGETS.items():
        assert f"'{name}'" in built
        lengths = [len(data) for data in target.start()]
        assert 0 < max(lengths) <= target.longest


def test_a_planted_mistake_is_found_told_and_replayed(tmp_path: Path) -> None:
    fuzz = [sys.executable, "-m", "tests.fuzz", "--seconds", "60", "--into", str(tmp_path), "planted"]
    done = subprocess.run(fuzz, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 1, done.stderr
    *told, last = done.stdout.splitlines()
    report = json.loads(last)
    assert report["found"] == report["targets"]["planted"]["found"] == 1
    assert report["targets"]["planted"]["runs"] > 0
    replay = shlex.split(told[0].partition("replay it: ")[2])
    assert Path(replay[-1]).parent == tmp_path / "planted"
    again = subprocess.run(replay, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert again.returncode == 1
    assert "IndexError" in again.stderr
