# SPDX-License-Identifier: Apache-2.0
"""The report's pictures, as SVG text.

Each function takes plain numbers and returns one `<svg>` element that scales with the page. They are
drawn here, not by a plotting library, so that the report stays one small file with text that can be
selected and searched, and so that the radar sweep can be what it is: no library draws those.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

INK = "#1c2733"
MUTED = "#7b8794"
GRID = "#e4e8ec"
HOLE = "#d64545"
PEER_COLOURS = ("#2a78c2", "#d98613", "#3b9a6c", "#8b5fbf", "#b8475f")


@dataclass(frozen=True)
class Stay:
    """The moved guest was at `peer` from `start` to `end` (seconds since the demo began)."""

    peer: str
    start: float
    end: float


@dataclass(frozen=True)
class Move:
    """One migration: seconds since the demo began; `passes` as (start, end, bytes)."""

    label: str
    start: float
    end: float
    frozen: float
    downtime: float
    passes: tuple[tuple[float, float, int], ...]


def colour_of(peer: str, peers: Sequence[str]) -> str:
    return PEER_COLOURS[list(peers).index(peer) % len(PEER_COLOURS)] if peer in peers else MUTED


def svg(width: int, height: int, body: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>{"".join(body)}</svg>'
    )


def text(
    x: float, y: float, content: str, *, anchor: str = "start", colour: str = INK, size: int = 13
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">'
        f"{escape(content)}</text>"
    )


def nice_step(span: float, count: int) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides `span` into about `count` parts."""
    raw = max(span, 1e-9) / max(count, 1)
    power = 10 ** math.floor(math.log10(raw))
    return float(next((m * power for m in (1, 2, 5, 10) if m * power >= raw), 10 * power))


def ticks(low: float, high: float, count: int) -> list[float]:
    step = nice_step(high - low, count)
    first = math.ceil(low / step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-6) + 1)]


def topology(
    peers: Sequence[str], paths: Sequence[tuple[str, str, str]], stays: Sequence[Stay], guests: dict[str, str]
) -> str:
    """The sites on a circle, the emulated paths between them, and the moved guest's way as numbered arrows.

    `paths`: (site, site, label such as "160 ms · 200 Mbit/s"); `guests`: name → site of those that stayed.
    """
    width, height, radius = 860, 360, 140
    centre = (width / 2, height / 2 + 28)
    place = {
        peer: (
            centre[0] + 2.1 * radius * math.sin(2 * math.pi * i / len(peers)),
            centre[1] - radius * math.cos(2 * math.pi * i / len(peers)) * 0.92,
        )
        for i, peer in enumerate(peers)
    }
    body = [
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{HOLE}"/></marker></defs>'
    ]
    for a, b, label in paths:
        (ax, ay), (bx, by) = place[a], place[b]
        body.append(f'<line x1="{ax}" y1="{ay}" x2="{bx}" y2="{by}" stroke="{GRID}" stroke-width="6"/>')
        mx, my = (ax + bx) / 2, (ay + by) / 2
        inwards = 0.3 if abs(mx - centre[0]) > 20 else 0.0
        across = mx + inwards * (centre[0] - mx)
        body.append(
            text(across, my - 10 if inwards == 0 else my + 30, label, anchor="middle", colour=MUTED, size=11)
        )
    body += [arrow(place[a.peer], place[b.peer], i + 1) for i, (a, b) in enumerate(itertools.pairwise(stays))]
    for peer, (x, y) in place.items():
        colour = colour_of(peer, peers)
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="38" fill="white" stroke="{colour}" stroke-width="4"/>'
        )
        body.append(text(x, y + 4, peer, anchor="middle", size=12))
        here = [name for name, site in guests.items() if site == peer]
        if here:
            body.append(text(x, y + 54, " · ".join(here), anchor="middle", colour=colour))
    return svg(width, height, body, "Sites, paths and the way of the protocol handler")


def arrow(start: tuple[float, float], end: tuple[float, float], number: int) -> str:
    """A curved arrow between two sites, numbered, beside the straight path."""
    (ax, ay), (bx, by) = start, end
    length = math.hypot(bx - ax, by - ay) or 1
    ux, uy = (bx - ax) / length, (by - ay) / length
    nx, ny = uy, -ux
    x1, y1 = ax + ux * 42 + nx * 14, ay + uy * 42 + ny * 14
    x2, y2 = bx - ux * 44 + nx * 14, by - uy * 44 + ny * 14
    cx, cy = (x1 + x2) / 2 + nx * 26, (y1 + y2) / 2 + ny * 26
    mx, my = (x1 + 2 * cx + x2) / 4, (y1 + 2 * cy + y2) / 4
    return (
        f'<path d="M{x1:.1f} {y1:.1f}Q{cx:.1f} {cy:.1f} {x2:.1f} {y2:.1f}" fill="none" stroke="{HOLE}" '
        f'stroke-width="2.5" marker-end="url(#tip)"/>'
        f'<circle cx="{mx:.1f}" cy="{my:.1f}" r="11" fill="{HOLE}"/>'
        + text(mx, my + 4.5, str(number), anchor="middle", colour="white", size=12)
    )


def unbroken(
    samples: Sequence[tuple[float, float]], pauses: Sequence[tuple[float, float]]
) -> list[list[tuple[float, float]]]:
    """The samples outside the pauses, cut where a pause lies between two of them."""
    runs: list[list[tuple[float, float]]] = [[]]
    for t, value in samples:
        if any(start <= t <= end for start, end in pauses):
            if runs[-1]:
                runs.append([])
        else:
            runs[-1].append((t, value))
    return [run for run in runs if run]


def throughput(
    samples: Sequence[tuple[float, float]],
    pauses: Sequence[tuple[float, float]],
    stays: Sequence[Stay],
    moves: Sequence[Move],
    peers: Sequence[str],
) -> str:
    """Client throughput over time (seconds, Mbit/s on a logarithmic scale), stays as bands, moves marked.

    During `pauses` (start, end) the reader stood still because a placement was measured: a grey foot,
    no line.
    """
    width, height, left, right, top, bottom = 1000, 330, 58, 12, 34, 36
    end = max([s.end for s in stays] + [t for t, _ in samples] + [1.0])
    peak = max([v for _, v in samples] + [10.0]) * 1.5
    floor = 0.1

    def x(t: float) -> float:
        return left + (width - left - right) * t / end

    def y(v: float) -> float:
        share = math.log(max(v, floor) / floor) / math.log(peak / floor)
        return height - bottom - (height - top - bottom) * share

    body = []
    for stay in stays:
        colour = colour_of(stay.peer, peers)
        body.append(
            f'<rect x="{x(stay.start):.1f}" y="{top}" width="{x(stay.end) - x(stay.start):.1f}" '
            f'height="{height - top - bottom}" fill="{colour}" opacity="0.10"/>'
        )
        if x(stay.end) - x(stay.start) > 50:
            body.append(
                text((x(stay.start) + x(stay.end)) / 2, top - 10, stay.peer, anchor="middle", colour=colour)
            )
    decades = [10.0**e for e in range(-1, 6) if floor <= 10.0**e <= peak]
    body += y_axis(decades, y, left, width - right, "Mbit/s")
    for t in ticks(0, end, 10):
        anchor = "end" if x(t) > width - right - 12 else "middle"
        body.append(text(x(t), height - 14, f"{t:.0f} s", anchor=anchor, colour=MUTED, size=12))
    base = height - bottom
    for run in unbroken(samples, pauses):
        line = "L".join(f"{x(t):.1f} {y(v):.1f}" for t, v in run)
        area = f"M{x(run[0][0]):.1f} {base}L{line}L{x(run[-1][0]):.1f} {base}z"
        body.append(
            f'<path d="{area}" fill="{INK}" opacity="0.16"/>'
            f'<path d="M{line}" fill="none" stroke="{INK}" stroke-width="1.3"/>'
        )
    for start, stop in pauses:
        wide = max(x(stop) - x(start), 1)
        shape = f'x="{x(start):.1f}" y="{base - 7}" width="{wide:.1f}" height="7"'
        body.append(f'<rect {shape} fill="{MUTED}"/>')
    for i, move in enumerate(moves):
        body.append(
            f'<line x1="{x(move.frozen):.1f}" y1="{top}" x2="{x(move.frozen):.1f}" y2="{height - bottom}" '
            f'stroke="{HOLE}" stroke-width="1.6" stroke-dasharray="4 3"/>'
            f'<circle cx="{x(move.frozen):.1f}" cy="{top + 12}" r="10" fill="{HOLE}"/>'
        )
        body.append(text(x(move.frozen), top + 16, str(i + 1), anchor="middle", colour="white", size=12))
    return svg(width, height, body, "Client throughput over time, moves marked")


def y_axis(
    values: Sequence[float], y: Callable[[float], float], left: float, right: float, unit: str
) -> list[str]:
    body = []
    for value in values:
        body.append(
            f'<line x1="{left}" y1="{y(value):.1f}" x2="{right}" y2="{y(value):.1f}" stroke="{GRID}"/>'
        )
        body.append(text(left - 6, y(value) + 4, f"{value:g}", anchor="end", colour=MUTED, size=12))
    body.append(
        text(left - 6, y(values[-1]) - 10 if values else 12, unit, anchor="end", colour=MUTED, size=12)
    )
    return body


def timeline(move: Move, colour: str) -> str:
    """Passes of one migration as bars on a common time axis, with the downtime at the end."""
    width, height, left, right = 1000, 92, 12, 12
    span = max(move.end - move.start, 1e-3)

    def x(t: float) -> float:
        return left + (width - left - right) * (t - move.start) / span

    body = [f'<line x1="{left}" y1="58" x2="{width - right}" y2="58" stroke="{GRID}"/>']
    for number, (start, end, size) in enumerate(move.passes, 1):
        wide = max(x(end) - x(start) - 1, 1.5)
        shape = f'x="{x(start):.1f}" y="24" width="{wide:.1f}" height="30" rx="3"'
        body.append(f'<rect {shape} fill="{colour}" opacity="0.8"/>')
        if wide > 90:
            label = f"pass {number} · {megabytes(size)}"
            body.append(text(x(start) + wide / 2, 43, label, anchor="middle", colour="white", size=12))
    down = max(x(move.frozen + move.downtime) - x(move.frozen), 2.5)
    body.append(
        f'<rect x="{x(move.frozen):.1f}" y="16" width="{down:.1f}" height="46" rx="2" fill="{HOLE}"/>'
    )
    anchor = "end" if x(move.frozen) > width / 2 else "start"
    body.append(
        text(x(move.frozen), 11, f"frozen {1000 * move.downtime:.1f} ms", anchor=anchor, colour=HOLE, size=12)
    )
    body += [
        text(x(move.start + t), 76, f"{t:g} s", anchor="middle", colour=MUTED, size=11)
        for t in ticks(0, span, 8)
        if left + 8 < x(move.start + t) < width - right - 8
    ]
    return svg(width, height, body, f"Passes and downtime of the move {move.label}")


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def radar(gaps: Sequence[tuple[float, float]], window: float, caption: str) -> str:
    """A radar sweep of `window` seconds a turn, painted by the guest's own clock loop.

    `gaps`: (seconds into the turn at which a hole ended, its length in seconds). While the guest runs
    its beam paints the disc; a hole in its time is a sector that nobody painted. The idea is that of
    the VM Turntable's authors, who wished they had shown their downtime that way (VM Turntable,
    section 7).
    """
    size, radius = 260, 104
    cx = cy = size / 2 - 6

    def point(t: float, r: float) -> str:
        angle = 2 * math.pi * t / window
        return f"{cx + r * math.sin(angle):.2f} {cy - r * math.cos(angle):.2f}"

    def sector(start: float, end: float, fill: str, opacity: float) -> str:
        large = 1 if end - start > window / 2 else 0
        arc = f"A{radius} {radius} 0 {large} 1 {point(end, radius)}z"
        path = f"M{cx} {cy}L{point(start, radius)}{arc}"
        return f'<path d="{path}" fill="{fill}" opacity="{opacity:.2f}"/>'

    holes = sorted((max(0.0, end - length), min(window, end)) for end, length in gaps if length > 0)
    body = [f'<circle cx="{cx}" cy="{cy}" r="{radius}" fill="#0d1b16"/>']
    steps = 180
    for i in range(steps):
        start, end = window * i / steps, window * (i + 1) / steps
        for low, high in free_parts(start, end, holes):
            body.append(sector(low, high, "#39d98a", 0.18 + 0.72 * i / steps))
    for share in (0.33, 0.66, 1.0):
        ring = f'cx="{cx}" cy="{cy}" r="{radius * share:.1f}"'
        body.append(f'<circle {ring} fill="none" stroke="#8fe3bd" opacity="0.35"/>')
    body += [
        f'<path d="M{cx} {cy}L{point(t, radius + 6)}" stroke="{HOLE}" stroke-width="1.5"/>'
        for hole in holes
        if hole[1] - hole[0] > window / 400
        for t in hole
    ]
    body.append(text(cx, size - 10, caption, anchor="middle", size=12))
    return svg(size, size + 2, body, caption)


def free_parts(start: float, end: float, holes: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The parts of [start, end) that no hole covers; holes sorted by start."""
    parts = []
    for low, high in holes:
        if high <= start or low >= end:
            continue
        if low > start:
            parts.append((start, low))
        start = max(start, high)
    if start < end:
        parts.append((start, end))
    return parts
