# SPDX-License-Identifier: Apache-2.0
"""The shape of a benchmark's file, which other programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.report import Row, figure, machine, show, write


def test_a_figure_has_three_values_or_says_why_not() -> None:
    assert figure([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert figure([], "the other was not installed") == {"error": "the other was not installed"}


def test_the_file_is_as_the_contract_says(tmp_path: Path) -> None:
    rows = [Row("downtime host, idle", "ms", "lower", figure([1.0]), {"qemu": {"error": "why"}})]
    facts = {"processor": "x", "foreign_load": {"loadavg": [0.0, 0.0, 0.0], "busy": 0.0}}
    content = json.loads(write(tmp_path / "bench", "migration", facts, rows).read_text())
    assert content == {
        "name": "migration",
        "machine": facts,
        "rows": [
            {
                "case": "downtime host, idle",
                "unit": "ms",
                "better": "lower",
                "ours": {"min": 1.0, "median": 1.0, "max": 1.0},
                "peers": {"qemu": {"error": "why"}},
                "floor": None,
            }
        ],
    }


def test_the_table_says_why_a_peer_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("total", "s", "lower", figure([1234.5]), {"qemu": {"error": "it is not here"}})]
    show("migration", machine(), rows)
    out = capsys.readouterr().out
    assert "1,234 (1,234 to 1,234)" in out
    assert "qemu: it is not here" in out
