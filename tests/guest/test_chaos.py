# SPDX-License-Identifier: Apache-2.0
"""The runs with faults of `make chaos`, in short: split, stopped, robbed of its coordinator."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import leader, split, stopped

pytestmark = [pytest.mark.guest, pytest.mark.timeout(420)]


def test_a_split_mesh_decides_on_one_side_and_runs_no_guest_twice(helper_binary: Path) -> None:
    run = split.chaos()
    assert run.trouble == []
    assert len(run.refusals) == 3


def test_nothing_of_a_stopped_host_is_taken(helper_binary: Path) -> None:
    run = stopped.chaos(seconds=5.0)
    assert run.trouble == []


def test_what_was_acknowledged_survives_the_death_of_coordinators(helper_binary: Path) -> None:
    run = leader.chaos(seconds=25.0, seed=1)
    assert run.trouble == []
    assert run.kills > 0
    assert run.tokens
