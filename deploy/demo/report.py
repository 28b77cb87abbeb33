# SPDX-License-Identifier: Apache-2.0
"""`report.html`: what the demo saw, as one self-contained page, made from `report.json` alone.

python -m deploy.demo.report build/demo/report.json     writes report.html beside it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from deploy.demo import charts

Json = dict[str, Any]
HERE = Path(__file__).resolve().parent

# From the Mobitopolo paper's table (Potter and Nakao): host of the protocol VM, ms and Mbit/s to the
# contents and to the client between VMs, file copy Mbit/s cold and cached.
PAPER = (
    ("with the contents (Koganei)", 0.71, 117.96, 204.00, 2.13, 0.12, 0.12),
    ("in between (Texas)", 178.00, 1.91, 29.00, 7.90, 0.49, 0.91),
    ("with the client (Florida)", 203.00, 1.18, 0.32, 117.17, 0.79, 19.00),
)


def number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def moves_of(report: Json) -> list[charts.Move]:
    """The migrations as drawn, in seconds since the demo began."""
    moves = []
    for record in report["migrations"]:
        start = record["started"] - report["started"]
        passes = tuple(
            (start + one["start_s"], start + one["start_s"] + one["duration"], one["sent_bytes"])
            for one in record["passes"]
        )
        label = f"{record['from']} → {record['to']}"
        downtime = (record["downtime_ms"]["host"] or 0.0) / 1000
        frozen = start + (record["frozen_s"] or 0.0)
        moves.append(charts.Move(label, start, start + record["total_s"], frozen, downtime, passes))
    return moves


def stays_of(report: Json, moves: Sequence[charts.Move]) -> list[charts.Stay]:
    records = report["migrations"]
    edges = [0.0, *(m.frozen for m in moves), float(report["duration"])]
    places = ([records[0]["from"]] if records else []) + [r["to"] for r in records]
    return [charts.Stay(p, a, b) for p, a, b in zip(places, edges, edges[1:], strict=False)]


def smoothed(samples: Sequence[tuple[float, float]], width: int = 10) -> list[tuple[float, float]]:
    """Means over `width` ticks: a read of a block far away ends in one tick and took several."""
    return [
        (samples[i][0], sum(v for _, v in samples[i : i + width]) / width)
        for i in range(0, len(samples) - width + 1, width // 2)
    ]


def tiles(report: Json) -> str:
    worst = max((r["downtime_ms"]["host"] or 0 for r in report["migrations"]), default=0)
    shown = [
        (str(len(report["migrations"])), "live moves across the emulated WAN"),
        (f"{worst:.0f} ms", "longest freeze"),
        (f"{report['reads']['count']}", f"files read, {report['reads']['bad']} wrong"),
        ("1" if report["connection_survived"] else "broken", "TCP connection, start to end"),
    ]
    return "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in shown)


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """`rows`: (class of the row, cells)."""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join(
        f'<tr class="{kind}">{"".join(f"<td>{escape(c)}</td>" for c in cells)}</tr>' for kind, cells in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def migration_table(report: Json) -> str:
    head = [
        "move",
        "total",
        "passes",
        "sent",
        "last difference",
        "host",
        "guest",
        "network",
        "frames held/lost",
        "memory",
    ]
    rows = []
    for r in report["migrations"]:
        down = r["downtime_ms"]
        rows.append(
            (
                "",
                [
                    f"{r['from']} → {r['to']}",
                    f"{r['total_s']:.1f} s",
                    str(len(r["passes"])),
                    charts.megabytes(r["sent_bytes"]),
                    charts.megabytes(r["residue_bytes"]),
                    f"{number(down['host'])} ms",
                    f"{number(down['guest'])} ms",
                    f"{number(down['network'])} ms",
                    f"{r['frames_held']}/{r['frames_lost']}",
                    r["verified"],
                ],
            )
        )
    return table(head, rows)


def placement_table(report: Json) -> str:
    head = [
        "protocol handler runs",
        "to contents ms",
        "Mbit/s",
        "to client ms",
        "Mbit/s",
        "file, cold Mbit/s",
        "file, cached Mbit/s",
    ]
    keys = ("content_ms", "content_mbps", "client_ms", "client_mbps", "file_cold_mbps", "file_cached_mbps")
    rows = [
        ("", [f"at {peer}", *(number(p.get(k), 2) for k in keys)]) for peer, p in report["placements"].items()
    ]
    rows += [("paper", [f"paper: {where}", *(number(v, 2) for v in values)]) for where, *values in PAPER]
    return table(head, rows)


def sweeps(report: Json) -> str:
    window = 2.0
    drawn = []
    for record, sweep in zip(report["migrations"], report["sweeps"], strict=False):
        samples = [(float(t), float(gap)) for t, gap in sweep]
        if not samples:
            continue
        at, longest = max(samples, key=lambda s: s[1])
        origin = at - longest / 2 - window / 4
        turn = [(t - origin, gap) for t, gap in samples if 0 <= t - origin <= window]
        caption = f"{record['from']} → {record['to']}: {1000 * longest:.0f} ms missing"
        drawn.append(charts.radar(turn, window, caption))
    return "".join(drawn) or '<p class="note">The guest gave no clock samples.</p>'


def check_list(report: Json) -> str:
    rows = []
    for check in report["checks"]:
        verdict = '<td class="ok">holds</td>' if check["ok"] else '<td class="bad">FAILS</td>'
        rows.append(
            f"<tr>{verdict}<td>{escape(check['name'])}</td><td>{escape(str(check['detail']))}</td></tr>"
        )
    return f'<table class="checks">{"".join(rows)}</table>'


def render(report: Json) -> str:
    """The whole page. Raises KeyError when the report lacks a key of the contract."""
    moves = moves_of(report)
    stays = stays_of(report, moves)
    peers = [p["name"] for p in report["peers"]]
    paths = [(p["a"], p["b"], p["label"]) for p in report["paths"]]
    stayed = {g["vm"]: g["peer"] for g in report["guests"] if f"{g['lab']}/{g['vm']}" != report["moved"]}
    samples = smoothed([(t, 8 * b / report["tick"] / 1e6) for t, b in report["throughput"]])
    pauses = [(float(a), float(b)) for a, b in report["pauses"]]
    lines = "".join(
        f"<p>{escape(m.label)}</p>{charts.timeline(m, charts.colour_of(r['from'], peers))}"
        for m, r in zip(moves, report["migrations"], strict=True)
    )
    return Template((HERE / "page.html").read_text()).substitute(
        style=(HERE / "style.css").read_text(),
        moves=len(moves),
        tiles=tiles(report),
        topology=charts.topology(peers, paths, stays, stayed),
        throughput=charts.throughput(samples, pauses, stays, moves, peers),
        timelines=lines,
        migrations=migration_table(report),
        sweeps=sweeps(report),
        placements=placement_table(report),
        checks=check_list(report),
    )


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m deploy.demo.report REPORT.json", file=sys.stderr)
        return 2
    source = Path(sys.argv[1])
    source.with_suffix(".html").write_text(render(json.loads(source.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
