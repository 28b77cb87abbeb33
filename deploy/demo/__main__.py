# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the main job, end to end, by the documented commands.

Three peers named tokyo, virginia and amsterdam on this machine, joined by an emulated WAN. The Unified
File Server lab comes up; the client reads without a pause, the protocol handler moves tokyo → virginia →
amsterdam → tokyo, live; what every place is worth is measured as in the Mobitopolo paper. Everything seen
is in `report.json`, and `report.html` draws it. The exit status is 0 only if every check holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.demo import measure, report
from deploy.demo.command import Background, DemoError, background, in_guest, mobictl

HERE = Path(__file__).resolve().parent.parent
WAN = HERE / "examples" / "wan.yaml"
LAB = HERE / "examples" / "unified-file-server.yaml"
SITES = ("tokyo", "virginia", "amsterdam")
ROUTE = ("virginia", "amsterdam", "tokyo")
STAY = 6.0  # seconds of undisturbed reading before and after each move
TICK = 0.1
Json = dict[str, Any]


BEGAN = time.monotonic()


def say(sentence: str) -> None:
    print(f"demo: {time.monotonic() - BEGAN:5.1f} s  {sentence}", flush=True)


@contextlib.contextmanager
def mesh(directory: Path) -> Iterator[None]:
    """Three peers that are gone afterwards, whatever happened."""
    if directory.exists():
        with contextlib.suppress(DemoError):
            mobictl(directory, "down")
        shutil.rmtree(directory)
    say("starting three peers and the WAN between them")
    mobictl(directory, "up", "--peers", "3", "--wan", str(WAN))
    try:
        yield
    finally:
        say("stopping everything")
        mobictl(directory, "down")


class Demo:
    """One run: collects what the report needs as it goes."""

    def __init__(self, directory: Path, out: Path) -> None:
        self.directory = directory
        self.out = out
        self.started = time.time()
        self.migrations: list[Json] = []
        self.sweeps: list[list[list[float]]] = []
        self.placements: dict[str, dict[str, float]] = {}
        self.pauses: list[tuple[float, float]] = []
        self.connections: list[str] = []
        self.reconnected = 0
        self.reader: Background | None = None

    def run(self) -> Json:
        say("bringing up the lab: content, protocol, client")
        mobictl(self.directory, "lab", "up", str(LAB), timeout=600)
        for guest in (measure.CONTENT, measure.CLIENT):
            in_guest(self.directory, guest, "iperf3", "--server", "--daemon")
        reading = ("mobi-files", "read", "/mnt/ufs")
        with background(self.directory, measure.CLIENT, self.out / "reader.ndjson", *reading) as self.reader:
            self.reader.wait_for(5, timeout=60)
            self.started = time.time()
            self.connections.append(measure.connection(self.directory))
            time.sleep(STAY)
            self.measure_placement("tokyo")
            for to in ROUTE:
                self.move(to)
                if to not in self.placements:
                    self.measure_placement(to)
            self.reconnected = measure.reconnects(self.directory)
            lines = self.reader.lines()
        return self.report(lines)

    def measure_placement(self, peer: str) -> None:
        say(f"measuring what it is worth to be at {peer}")
        start = time.time()
        in_guest(self.directory, measure.CLIENT, "pkill", "-STOP", "mobi-files")
        try:
            self.placements[peer] = measure.placement(self.directory)
        finally:
            with contextlib.suppress(DemoError):  # a reader that stays stopped fails the checks
                in_guest(self.directory, measure.CLIENT, "pkill", "-CONT", "mobi-files")
        self.pauses.append((start - self.started, time.time() - self.started))

    def move(self, to: str) -> None:
        interval = str(measure.PROBE_INTERVAL)
        probing = ("ping", "-n", "-D", "-i", interval, "protocol")
        with background(self.directory, measure.CLIENT, self.out / f"prober-{to}.txt", *probing) as prober:
            prober.wait_for(20, timeout=30)
            time.sleep(STAY)
            start = time.time()
            record: Json = mobictl(self.directory, "vm", "migrate", measure.PROTOCOL, "--to", to, timeout=600)
            time.sleep(STAY)
            gap = measure.largest_gap_ms(prober.lines(), start, time.time() - STAY / 2)
        record["downtime_ms"]["network"] = gap
        clock = record.pop("guest_clock", None) or []
        self.sweeps.append([[t / 1e9, gap / 1e9] for t, gap in clock])
        self.migrations.append(record)
        self.connections.append(measure.connection(self.directory))
        down = {k: v for k, v in record["downtime_ms"].items() if v is not None}
        say(f"moved {record['from']} → {to} in {record['total_s']:.1f} s, downtime ms: {down}")

    def checks(self, reads: int, bad: int) -> list[Json]:
        downtimes = [m["downtime_ms"].get(k) for m in self.migrations for k in ("host", "guest", "network")]
        at = {f"{g['lab']}/{g['vm']}": g["peer"] for g in mobictl(self.directory, "vm", "ls")}
        same = len(set(self.connections)) == 1 and self.reconnected == 0
        found = [
            ("every file read is right", reads > 0 and bad == 0, f"{reads} files read, {bad} wrong"),
            ("one TCP connection throughout", same, f"{self.connections[0]}, {self.reconnected} reconnects"),
            (
                "every migration succeeded",
                all(m["ok"] for m in self.migrations),
                f"{len(self.migrations)} moves",
            ),
            ("three downtimes each", all(d is not None for d in downtimes), "host, guest, network"),
            ("memory verified", all(m["verified"] == "ok" for m in self.migrations), "roots compared"),
            (
                "no frame lost",
                all(m["frames_lost"] == 0 for m in self.migrations),
                "held frames all delivered",
            ),
            ("it is back in tokyo", at.get(measure.PROTOCOL) == "tokyo", f"at {at.get(measure.PROTOCOL)}"),
            ("every place measured", set(self.placements) == {"tokyo", *ROUTE}, ", ".join(self.placements)),
        ]
        return [{"name": name, "ok": bool(ok), "detail": detail} for name, ok, detail in found]

    def report(self, lines: list[str]) -> Json:
        ticks, reads, bad = measure.reader_results(lines)
        checks = self.checks(reads, bad)
        return {
            "peers": sorted(mobictl(self.directory, "peer", "ls"), key=lambda p: SITES.index(p["name"])),
            "guests": mobictl(self.directory, "vm", "ls"),
            "paths": paths(mobictl(self.directory, "wan", "show")),
            "migrations": self.migrations,
            "reads": {"count": reads, "bad": bad},
            "connection_survived": checks[1]["ok"],
            "placements": self.placements,
            "started": self.started,
            "duration": time.time() - self.started,
            "moved": measure.PROTOCOL,
            "tick": TICK,
            "throughput": [[t - self.started, n] for t, n in ticks if t >= self.started],
            "pauses": self.pauses,
            "sweeps": self.sweeps,
            "checks": checks,
        }


def paths(wan: Json) -> list[Json]:
    """The emulated paths with labels for the picture, from `wan show --json`."""
    drawn = []
    for path in wan["paths"]:
        parts = [f"{1000 * path['rtt']:.0f} ms"]
        if path.get("rate"):
            parts.append(f"{8 * path['rate'] / 1e6:.0f} Mbit/s")
        if path.get("loss"):
            parts.append(f"{100 * path['loss']:g} % loss")
        drawn.append({"a": path["a"], "b": path["b"], "label": " · ".join(parts)})
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description="Run the main job and write its report.")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where the report goes")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    directory = out / "state"
    try:
        with mesh(directory):
            seen = Demo(directory, out).run()
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; everything it started has been stopped", file=sys.stderr)
        return 1
    (out / "report.json").write_text(json.dumps(seen, indent=1) + "\n")
    (out / "report.html").write_text(report.render(seen))
    failed = [check for check in seen["checks"] if not check["ok"]]
    for check in seen["checks"]:
        say(f"{'holds' if check['ok'] else 'FAILS'}: {check['name']} ({check['detail']})")
    say(f"report: {out / 'report.html'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
