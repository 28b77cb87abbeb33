# SPDX-License-Identifier: Apache-2.0
"""The one shape of a benchmark's results: a table for people, and a file for programs.

A row is one case: what it is, its unit, whether less or more is better, our figures, those of others in the
same run, and a floor below which nobody can go on this machine. A figure is `{min, median, max}` of a few
runs. Something that could not be measured is never left out: it is `{"error": why}`. How busy others kept the
machine meanwhile stands beside the machine's description, since a figure means nothing without it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

BUSY_SECONDS = 1.0

Figure = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One case. Figures as of `figure`; `floor` is None where there is none."""

    case: str
    unit: str
    better: Literal["lower", "higher"]
    ours: Figure
    peers: Mapping[str, Figure] = field(default_factory=dict)
    floor: Figure | None = None


def figure(values: Sequence[float], why_not: str = "it was not measured") -> Figure:
    """`{min, median, max}` of the values of several runs, or `{"error"}` without any."""
    if not values:
        return {"error": why_not}
    ordered = sorted(values)
    three = (ordered[0], statistics.median(ordered), ordered[-1])
    return {name: round(value, 4) for name, value in zip(("min", "median", "max"), three, strict=True)}


def machine() -> dict[str, Any]:
    """This machine, and how busy it is with other things. Takes a second; call it before the benchmark."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "foreign_load": {"loadavg": list(os.getloadavg()), "busy": round(_busy(), 3)},
    }


def _busy() -> float:
    """The share of all processors that is in use, 0 to 1."""
    total, idle = _ticks()
    time.sleep(BUSY_SECONDS)
    later, idle_later = _ticks()
    return 1 - (idle_later - idle) / max(1, later - total)


def _ticks() -> tuple[int, int]:
    first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    numbers = [int(word) for word in first]
    return sum(numbers[:8]), numbers[3] + numbers[4]


def write(directory: Path, name: str, facts: Mapping[str, Any], rows: Sequence[Row]) -> Path:
    """Write `NAME.json` into `directory`; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    content = {"name": name, "machine": dict(facts), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def show(name: str, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Print the table, and below it why something is not in it."""
    others = sorted({peer for row in rows for peer in row.peers})
    load = facts["foreign_load"]
    title = f"{name}: {facts['processor']}, {facts['cpus']} processors, {load['busy']:.0%} busy before"
    table = Table(title=title, title_justify="left")
    for heading in ("case", "unit", "ours: median (min to max)", *others, "floor"):
        table.add_column(heading)
    for row in rows:
        cells = [_cell(row.peers.get(other)) for other in others]
        table.add_row(row.case, row.unit, _cell(row.ours), *cells, _cell(row.floor))
    console = Console(width=None if os.isatty(1) else 120)
    console.print(table)
    for other in others:
        for why in sorted({row.peers[other]["error"] for row in rows if "error" in row.peers.get(other, {})}):
            console.print(f"{other}: {why}")


def _cell(found: Figure | None) -> str:
    if found is None:
        return "–"
    if "error" in found:
        return "none"
    median, least, most = (_number(found[name]) for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
