# SPDX-License-Identifier: Apache-2.0
"""What a peer must remember of a guest: `guest.json` in its directory.

It is written before each step that a restarted peer would have to know about, and replaced as a whole, so
that whoever reads it sees the state before the step or after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobid.guest_disk import DiskPlan
from proto import entries
from proto.api import OperationError
from proto.jsontext import parse_json

FORMAT = 1

Stage = Literal["made", "booted", "ready"]
"""How far a start came: nothing runs yet, the kernel runs, it has been configured and its commands have run.
"""


@dataclass(frozen=True)
class Record:
    """`guest.json`. `migration` is one that has its hand on the guest, or empty."""

    key: str
    id: str
    epoch: int
    image: str
    image_hash: str
    kernel: str
    init: str
    memory: int
    cpus: int
    disks: tuple[DiskPlan, ...]
    interfaces: tuple[entries.Interface, ...] = ()
    ports: tuple[str, ...] = ()
    """The vhost-user sockets of the interfaces."""
    stage: Stage = "made"
    migration: str = ""
    started: float = 0.0
    lease_bound: bool = False
    """Whether it runs only while this peer has a lease."""
    told: str = ""
    """A digest of what the guest was told of itself and its neighbours (`told_digest`)."""

    def dump(self) -> bytes:
        values = {f: getattr(self, f) for f in self.__dataclass_fields__}
        values["disks"] = [disk.as_dict() for disk in self.disks]
        values["interfaces"] = [interface.model_dump(mode="json") for interface in self.interfaces]
        return json.dumps({"format": FORMAT, **values}, indent=1).encode()

    @classmethod
    def load(cls, directory: Path) -> Record:
        """Read `guest.json`; raises `OperationError` if it cannot be used."""
        path = directory / "guest.json"
        try:
            values = parse_json(path.read_bytes())
            if values.pop("format") != FORMAT:
                raise OperationError("unsupported", f"{path} has a format this version does not read")
            values["disks"] = tuple(DiskPlan.from_dict(directory, disk) for disk in values["disks"])
            values["ports"] = tuple(values["ports"])
            values["interfaces"] = tuple(entries.Interface.model_validate(i) for i in values["interfaces"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OperationError("failed", f"{path} cannot be read: {error}") from error


def told_digest(settings: Mapping[str, Any]) -> str:
    """16 hex digits that differ when the settings do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
