# SPDX-License-Identifier: Apache-2.0
"""A lab as a picture: Graphviz text, Mermaid text, or SVG with a layout of our own.

All three are drawn from one `Graph`, which comes from a lab file or from a running lab. A link is an edge
with its two interfaces; a network of more guests is a small node of its own. The layout is Fruchterman
and Reingold's spring model (1991), started from a circle in the order of the names: so it needs no
randomness, and the same lab always looks the same.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from proto.addresses import segments
from proto.lab import Lab, guests
from proto.scale import scaled

ROUNDS: Final = 300
CELL: Final = 190
COLOURS: Final = {"running": "#2e8540", "paused": "#b58900", "frozen": "#b58900", "migrating": "#0b7285"}
WRONG: Final = frozenset({"failed", "lost", "fenced"})


@dataclass(frozen=True)
class Vertex:
    """A guest; `peer` and `state` are empty for a lab that does not run."""

    name: str
    image: str = ""
    peer: str = ""
    state: str = ""


@dataclass(frozen=True)
class Edge:
    """A network: its ends as (guest, interface)."""

    name: str
    ends: tuple[tuple[str, str], ...]
    subnet: str = ""


@dataclass
class Graph:
    """Guests and networks of one lab."""

    lab: str
    vertices: list[Vertex] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)


def from_lab(lab: Lab) -> Graph:
    """The picture of a lab file."""
    lab = scaled(lab).lab
    vertices = [Vertex(g.name, g.image, str(g.place) if g.place else "") for g in guests(lab)]
    edges = [
        Edge(s.name, tuple((p.guest, p.interface) for p in s.ports), str(s.subnet or ""))
        for s in segments(lab)
    ]
    return Graph(lab.name, vertices, edges)


def from_document(document: Mapping[str, Any]) -> Graph:
    """The picture of a running lab: the result of the operation `lab.graph`."""
    vertices = [
        Vertex(str(n["name"]), str(n.get("image") or ""), str(n.get("peer") or ""), str(n.get("state") or ""))
        for n in document["nodes"]
    ]
    edges = [
        Edge(str(n["name"]), tuple(_end(str(m)) for m in n["members"]), str(n.get("subnet") or ""))
        for n in document["networks"]
    ]
    return Graph(str(document["lab"]), vertices, edges)


def _end(text: str) -> tuple[str, str]:
    guest, _, interface = text.partition(":")
    return guest, interface


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _under(vertex: Vertex) -> list[str]:
    """What stands below a guest's name."""
    return [part for part in (vertex.image, f"@ {vertex.peer}" if vertex.peer else "", vertex.state) if part]


def dot(graph: Graph) -> str:
    """Graphviz: `mobictl lab graph L --format dot | dot -Tpdf > l.pdf`."""
    lines = [f"graph {_quoted(graph.lab)} {{", "  node [shape=box, style=rounded, fontname=sans];"]
    for vertex in graph.vertices:
        label = _quoted("\n".join([vertex.name, *_under(vertex)])).replace("\n", "\\n")
        lines.append(f"  {_quoted(vertex.name)} [label={label}];")
    for edge in graph.edges:
        if len(edge.ends) == 2:
            (a, a_port), (b, b_port) = edge.ends
            ports = f"taillabel={_quoted(a_port)}, headlabel={_quoted(b_port)}"
            lines.append(f"  {_quoted(a)} -- {_quoted(b)} [label={_quoted(edge.subnet)}, {ports}];")
            continue
        name = _quoted(f"net {edge.name}")
        lines.append(f"  {name} [label={_quoted(edge.name)}, shape=ellipse];")
        lines += [f"  {_quoted(guest)} -- {name} [taillabel={_quoted(port)}];" for guest, port in edge.ends]
    return "\n".join([*lines, "}"])


def mermaid(graph: Graph) -> str:
    """Mermaid, as Markdown pages show it."""
    ids = {vertex.name: f"g{n}" for n, vertex in enumerate(graph.vertices)}
    lines = ["graph LR"]
    for vertex in graph.vertices:
        label = "<br/>".join(html.escape(part) for part in [vertex.name, *_under(vertex)])
        lines.append(f'  {ids[vertex.name]}["{label}"]')
    for number, edge in enumerate(graph.edges):
        if len(edge.ends) == 2:
            (a, a_port), (b, b_port) = edge.ends
            label = html.escape(" ".join(part for part in (f"{a_port} – {b_port}", edge.subnet) if part))
            lines.append(f'  {ids[a]} ---|"{label}"| {ids[b]}')
            continue
        lines.append(f'  n{number}(("{html.escape(edge.name)}"))')
        lines += [f'  {ids[guest]} ---|"{html.escape(port)}"| n{number}' for guest, port in edge.ends]
    return "\n".join(lines)


Point = tuple[float, float]


def layout(names: list[str], pairs: Iterable[tuple[str, str]]) -> dict[str, Point]:
    """Places in the unit square for the vertices of a graph, neighbours near one another."""
    count = len(names)
    if count == 1:
        return {names[0]: (0.5, 0.5)}
    turn = 2 * math.pi / count
    at = {name: [math.cos(n * turn), math.sin(n * turn)] for n, name in enumerate(names)}
    ideal = 2.0 / math.sqrt(count)
    edges = list(pairs)
    for step in range(ROUNDS):
        push = {name: [0.0, 0.0] for name in names}
        for n, a in enumerate(names):
            for b in names[n + 1 :]:
                _force(at, push, a, b, lambda distance: ideal * ideal / distance)
        for a, b in edges:
            _force(at, push, a, b, lambda distance: -distance * distance / ideal)
        heat = 0.1 * (1 - step / ROUNDS)
        for name in names:
            length = math.hypot(*push[name]) or 1.0
            for axis in (0, 1):
                at[name][axis] += push[name][axis] / length * min(length, heat)
    return _into_square(at)


def _force(at: dict[str, list[float]], push: dict[str, list[float]], a: str, b: str, strength: Any) -> None:
    x, y = at[a][0] - at[b][0], at[a][1] - at[b][1]
    distance = max(math.hypot(x, y), 0.01)
    force = strength(distance) / distance
    push[a][0] += x * force
    push[a][1] += y * force
    push[b][0] -= x * force
    push[b][1] -= y * force


def _into_square(at: dict[str, list[float]]) -> dict[str, Point]:
    spans = []
    for axis in (0, 1):
        low, high = min(p[axis] for p in at.values()), max(p[axis] for p in at.values())
        spans.append((low, high - low if high - low > 1e-6 else 0.0))
    return {
        name: tuple((p[axis] - low) / span if span else 0.5 for axis, (low, span) in enumerate(spans))  # type: ignore[misc]
        for name, p in at.items()
    }


def svg(graph: Graph) -> str:
    """One self-contained picture."""
    hubs = {f"net {edge.name}": edge for edge in graph.edges if len(edge.ends) != 2}
    names = [vertex.name for vertex in graph.vertices] + list(hubs)
    pairs = [(e.ends[0][0], e.ends[1][0]) for e in graph.edges if len(e.ends) == 2]
    pairs += [(guest, hub) for hub, edge in hubs.items() for guest, _ in edge.ends]
    side = CELL * max(2, math.ceil(math.sqrt(len(names))))
    width, height, margin = side * 1.4, side * 0.8, 90
    at = {n: (margin + x * width, margin + y * height) for n, (x, y) in layout(names, pairs).items()}
    box = f"0 0 {width + 2 * margin:.0f} {height + 2 * margin:.0f}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" '
        'font-family="sans-serif" font-size="12" text-anchor="middle">',
        f"<title>{html.escape(graph.lab)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for edge in graph.edges:
        parts += _svg_edge(edge, at)
    for hub, edge in hubs.items():
        x, y = at[hub]
        parts.append(f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="42" ry="16" fill="#eef2f7" stroke="#8795a8"/>')
        parts.append(_text(x, y + 4, edge.name))
    for vertex in graph.vertices:
        parts += _svg_vertex(vertex, at[vertex.name])
    return "\n".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{html.escape(text)}</text>'


def _svg_edge(edge: Edge, at: Mapping[str, Point]) -> list[str]:
    if len(edge.ends) == 2:
        lines = [(at[edge.ends[0][0]], at[edge.ends[1][0]], edge.ends[0][1], edge.ends[1][1])]
    else:
        lines = [(at[guest], at[f"net {edge.name}"], port, "") for guest, port in edge.ends]
    grey = ' fill="#5f6b7a" font-size="10"'
    parts = []
    for (ax, ay), (bx, by), a_port, b_port in lines:
        ends = f'x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{by:.1f}"'
        parts.append(f'<line {ends} stroke="#8795a8" stroke-width="2"/>')
        for share, label in ((0.36, a_port), (0.64, b_port), (0.5, edge.subnet if b_port else "")):
            if label:
                x, y = ax + (bx - ax) * share, ay + (by - ay) * share
                parts.append(_text(x, y - 5 if label != edge.subnet else y + 14, label, grey))
    return parts


def _svg_vertex(vertex: Vertex, place: Point) -> list[str]:
    x, y = place
    under = _under(vertex)
    height = 26 + 14 * len(under)
    colour = "#c92a2a" if vertex.state in WRONG else COLOURS.get(vertex.state, "#34495e")
    top = y - height / 2
    box = f'x="{x - 62:.1f}" y="{top:.1f}" width="124" height="{height}" rx="8"'
    lines = [f'<rect {box} fill="white" stroke="{colour}" stroke-width="2"/>']
    lines.append(_text(x, top + 18, vertex.name, f' font-weight="bold" fill="{colour}"'))
    grey = ' fill="#5f6b7a" font-size="11"'
    return lines + [_text(x, top + 32 + 14 * n, text, grey) for n, text in enumerate(under)]
