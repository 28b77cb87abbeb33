# SPDX-License-Identifier: Apache-2.0
"""Which peers a command may be asked of: the one it was asked of first, and where it goes on when that dies.

Peers of this machine are found by their directory, as ever. A user who has logged in may speak to any member
over TCP, so the members that a peer last told are remembered in `doors.json`, beside the credentials: when
all known peers are gone, those that have joined since are still found. It is only a cache, and never more is
trusted because of it than the mesh itself has said over a connection with a pinned key.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mobictl import places
from mobictl.files import replace_file
from proto.jsontext import parse_json

FORMAT: Final = 1
FRESH: Final = 60.0
"""Seconds after which the members are asked for again, with the next command."""


@dataclass
class Known:
    """What peers told: members by mesh, and the mesh of a place (a directory of peers, or an address)."""

    path: Path
    meshes: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Known:
        """What is there; nothing if it cannot be read."""
        path = directory / "doors.json"
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            data = parse_json(path.read_text())
            if data["format"] == FORMAT:
                found = cls(path, dict(data["meshes"]), dict(data["places"]))
                for mesh in found.meshes:
                    found.members(mesh)
                return found
        return cls(path)

    def members(self, mesh: str) -> list[dict[str, str]]:
        """`{name, address, key}` of each member that was told last; nothing of an unknown mesh."""
        told = self.meshes.get(mesh, {"members": []})["members"]
        return [{name: str(member[name]) for name in ("name", "address", "key")} for member in told]

    def addresses(self, place: str) -> list[str]:
        """Where the members of the mesh at `place` listen; `place` may be one of them."""
        meshes = [self.places[place]] if place in self.places else list(self.meshes)
        for mesh in meshes:
            found = [member["address"] for member in self.members(mesh)]
            if place in self.places or place in found:
                return found
        return []

    def stale(self, place: str) -> bool:
        """Whether the members at `place` should be asked for."""
        told = self.meshes.get(self.places.get(place, ""), {}).get("time", 0.0)
        return not 0 <= time.time() - told < FRESH

    def remember(self, place: str, answer: dict[str, Any]) -> None:
        """Keep the answer of `mesh.doors`."""
        members = [
            {"name": str(m["name"]), "address": str(m["address"]), "key": bytes(m["key"]).hex()}
            for m in answer["members"]
        ]
        self.places[place] = str(answer["mesh"])
        self.put(str(answer["mesh"]), members)

    def put(self, mesh: str, members: list[dict[str, str]]) -> None:
        """Keep the members of a mesh; a cache that cannot be written is none."""
        self.meshes[mesh] = {"time": time.time(), "members": members}
        document = {"format": FORMAT, "meshes": self.meshes, "places": self.places}
        with suppress(OSError):
            replace_file(self.path, json.dumps(document, indent=1).encode())


@dataclass
class Doors:
    """The peers for one command. `named` is the one that the user asked for with --peer, if any."""

    root: Path
    named: str | None = None

    @property
    def place(self) -> str:
        """What `Known` calls the place at which this command asks."""
        return self.named if self.named is not None and not self._local(self.named) else str(self.root)

    def first(self) -> str:
        """The peer to ask first: `unix:PATH` or `HOST:PORT`. Raises OperationError(unreachable)."""
        if self.named is None:
            return places.find_peer(self.root).target
        if self.named.startswith("unix:") or ":" in self.named:
            return self.named
        return places.find_peer(self.root, self.named).target

    def others(self, tried: str, known: Known) -> list[str]:
        """Where to go on when `tried` has died: first the peers of this machine that answer."""
        found = []
        if self.named is None or self._local(self.named):
            found = [peer.target for peer in places.local_peers(self.root) if peer.answers()]
        found += known.addresses(self.place)
        return [target for target in dict.fromkeys(found) if target != tried]

    def _local(self, named: str) -> bool:
        return any(named in (peer.name, peer.target) for peer in places.local_peers(self.root))
