# SPDX-License-Identifier: Apache-2.0
"""What a peer durably remembers of migrations: one small file each, in `migrations/` of its directory.

A note outlives the guest's own directory: a destination that has refused a guest and removed it must still
know that it refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import structlog

from mobid.config import sync_directory, write_durably
from proto.handover_events import Note
from proto.jsontext import parse_json

FORMAT = 1

log = structlog.get_logger()


class Notes:
    """The notes of one peer, by migration id."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)

    def all(self) -> dict[str, Note]:
        """Every note on disk; a file that cannot be read is left out, and said so."""
        found: dict[str, Note] = {}
        for path in sorted(self._directory.glob("*.json")):
            try:
                values = parse_json(path.read_bytes())
                if values["format"] != FORMAT or values["note"] not in ("releasing", "incoming", "refused"):
                    raise ValueError("it has another format")
                found[path.stem] = values["note"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("migration.note.unreadable", path=str(path), reason=str(error))
        return found

    def put(self, migration: str, note: Note | None) -> None:
        """Make a note durable, or its absence. Blocks for an fsync."""
        path = self._directory / f"{migration}.json"
        if note is None:
            path.unlink(missing_ok=True)
            sync_directory(self._directory)
        else:
            write_durably(path, json.dumps({"format": FORMAT, "note": note}).encode())
