# SPDX-License-Identifier: Apache-2.0
"""`mobictl doctor`: what this host can do. The checks are mobid's own, since it is what needs them."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from rich.text import Text

from mobictl import lifecycle, tables
from mobictl.command import Exit
from mobictl.session import Session
from proto.api import OperationError

TIMEOUT = 120.0
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "missing": ("✗", "red")}


def doctor(session: Session) -> None:
    """Say what this host can do, what is missing, and how to mend it."""
    found = ask()
    session.show(found, *page(found))
    if not found["ok"]:
        raise Exit(1)


def ask() -> dict[str, Any]:
    """The document of `mobid doctor --json`. Raises OperationError."""
    command = [*lifecycle.mobid_command(), "doctor", "--json"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=TIMEOUT,
            env=lifecycle.environment(),
            stdin=subprocess.DEVNULL,
            check=False,
        )
        document = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise OperationError("timeout", f"mobid doctor took more than {TIMEOUT:g} s") from None
    except OSError as error:
        text = f"mobid doctor cannot be run: {error.filename}: {(error.strerror or '').lower()}"
        raise OperationError("failed", text, "make setup, and let this user read what it made") from None
    except ValueError:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise OperationError("failed", f"mobid doctor cannot be run: {said[0]}", "make setup") from None
    return dict(document)


def page(document: dict[str, Any]) -> list[Any]:
    """A line per check: what, how it is, and the mend below what is missing."""
    lines: list[Any] = []
    for check in document.get("checks", []):
        state = "ok" if check["ok"] else "missing" if check["needed"] else "warning"
        mark, style = MARKS[state]
        lines.append(Text.assemble((mark, style), f" {check['name']:<16} {check['detail']}"))
        if check["mend"] and state != "ok":
            lines.append(Text(f"  {'':<16} {check['mend']}", style="dim"))
    facts = {key: value for key, value in document.items() if key not in ("ok", "checks", "cpu_features")}
    verdict = Text("ready for guests" if document["ok"] else "not ready for guests: see the crosses above")
    return [*lines, "", tables.page(facts), "", verdict]
