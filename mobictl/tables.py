# SPDX-License-Identifier: Apache-2.0
"""Tables and key-value pages for people: quiet lines, aligned numbers, a state one can see from afar."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from proto.units import format_percentage, format_rate, format_size, format_time

STATES = {
    "running": "green",
    "alive": "green",
    "up": "green",
    "ok": "green",
    "valid": "green",
    "spent": "dim",
    "expired": "dim",
    "revoked": "dim",
    "migrating": "cyan",
    "restoring": "cyan",
    "starting": "cyan",
    "pending": "cyan",
    "paused": "yellow",
    "frozen": "yellow",
    "suspect": "yellow",
    "stopped": "dim",
    "left": "dim",
    "fenced": "red",
    "lost": "red",
    "failed": "red",
    "dead": "red",
}


@dataclass(frozen=True)
class Column:
    """One column: its heading, the key of the row, how the value is written, and its side."""

    heading: str
    key: str
    write: Callable[[Any], str | Text] = str
    right: bool = False


def state(value: Any) -> Text:
    """A state in its colour."""
    text = str(value)
    return Text(text, style="yellow" if text.endswith("?") else STATES.get(text, ""))


def joined(value: Any) -> str:
    """A list in one line."""
    if isinstance(value, str):
        return value
    return ", ".join(str(item) for item in value) if isinstance(value, Iterable) else str(value)


def size(value: Any) -> str:
    return format_size(value) if isinstance(value, int | float) else str(value)


def seconds(value: Any) -> str:
    return format_time(value) if isinstance(value, int | float) else str(value)


def milliseconds(value: Any) -> str:
    return f"{value:.3g} ms" if isinstance(value, int | float) else "–"


def moment(value: Any) -> str:
    """Seconds since 1970 in the local time zone."""
    if not isinstance(value, int | float) or not value:
        return "–"
    return datetime.datetime.fromtimestamp(value).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def yes(value: Any) -> str:
    return "yes" if value else ""


def _cell(value: Any, write: Callable[[Any], str | Text]) -> Text:
    """What came from a peer is shown as text, never as markup, and without control characters."""
    made = write(value) if value is not None else "–"
    text = made if isinstance(made, Text) else Text(made)
    text.plain = "".join(c if c.isprintable() else "?" for c in text.plain)
    return text


def table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], empty: str = "nothing"
) -> Table | Text:
    """Rows as a table; columns that no row has are left out; a sentence if there is no row."""
    if not rows:
        return Text(empty, style="dim")
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    used = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    for column in used:
        # Names are kept whole; long lists may fold.
        folds = column.write is joined
        made.add_column(
            column.heading,
            justify="right" if column.right else "left",
            no_wrap=not folds,
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(_cell(row.get(column.key), column.write) for column in used))
    return made


FOLDED = 12
"""Lists of plain values longer than this are counted on a page; --json has them whole."""

_FORMS: dict[str, Callable[[Any], str | Text]] = {
    "state": state,
    "memory": size,
    "memory_free": size,
    "disk": size,
    "size": size,
    "uptime": seconds,
    "since": moment,
    "time": moment,
    "expires": moment,
    "created": moment,
    "started": moment,
    "joined": moment,
    "rtt_ms": milliseconds,
    "delay": seconds,
    "jitter": seconds,
    "rate": format_rate,
    "loss": format_percentage,
    "reorder": format_percentage,
    "duplicate": format_percentage,
}


def page(document: Mapping[str, Any]) -> Table:
    """One thing, a line for each of its keys."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold", max_width=100)
    for key, value in document.items():
        if value is None or value in ("", [], {}, ()):
            continue
        made.add_row(Text(key.replace("_", " ")), _cell(value, _FORMS.get(key, _flat)))
    return made


def _flat(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        plain = not any(isinstance(item, Mapping) for item in value)
        if plain and len(value) > FOLDED:
            return f"{len(value)} ({_flat(value[:FOLDED])}, … all with --json)"
        return ", ".join(
            _flat(item) if not isinstance(item, Mapping) else f"({_flat(item)})" for item in value
        )
    return str(value)
