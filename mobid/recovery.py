# SPDX-License-Identifier: Apache-2.0
"""What a peer knew of its mesh, and what it does when its catalog is damaged or gone.

`mesh.json` has the members, as of the last time this peer heard of a change. It is written when a peer joins,
so that a crash before the catalog has come costs nothing; and it is kept up to date, because a replica that
is started does not know yet what of its log is committed, and one whose catalog is damaged knows nothing.
It also has the times of the mesh, which never change: a founder keeps them before the mesh is there, so
nobody can be let in, or told others, before they are.

A replica that lost what it had acknowledged must not vote as if nothing had happened: it could help to elect
a coordinator that lacks an acknowledged entry. It moves what is left aside, begins with an empty store marked
as recovering, and gets everything from the others. But these must be able to decide meanwhile, first of all
that this peer's vote does not count any more (`proto/raft/recovery.py`). So `mesh.json` has the voters too,
and a peer without whom the others are no quorum, as the only voter of a small mesh, refuses to start: what
can be saved must be saved by hand.

A key that joins again begins as recovering too: it may be a voter still by the log of some, and what it
acknowledged before it left is gone with its old directory.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog

from mobid.config import Times, sync_directory, unwritable, write_durably
from mobid.store import Store, surviving_ballot
from proto import entries
from proto.api import OperationError
from proto.jsontext import parse_json
from proto.log import DamagedError
from proto.raft.configuration import Configuration
from proto.raft.events import Ballot
from proto.state import State

log = structlog.get_logger()


@dataclass(frozen=True)
class Known:
    """What `mesh.json` says.

    `fresh`: this peer has joined, and had no catalog of the mesh yet; `returning`: it may have been a member
    before. `times` is None, and `configuration` empty, in a directory of an earlier version and until they
    are known.
    """

    mesh: str
    members: tuple[entries.Member, ...]
    fresh: bool = False
    times: Times | None = None
    returning: bool = False
    configuration: Configuration = field(default_factory=Configuration)
    """Who votes; learners are left out."""

    def can_spare(self, peer: str) -> bool:
        """Whether the others can decide without this peer, as far as is known."""
        voters = self.configuration
        if not voters.voters:
            return any(member.id != peer for member in self.members)
        return voters.quorum(voters.deciding - {peer})

    @property
    def state(self) -> State:
        """As a state to begin with."""
        return State(mesh=self.mesh, members={member.id: member for member in self.members})


def read_known(path: Path) -> Known | None:
    """What was kept; None if nothing was. Raises `OperationError` for a damaged file."""
    if not path.exists():
        return None
    try:
        value = parse_json(path.read_text())
        members = tuple(
            entries.Member(**{**member, "certificate": bytes.fromhex(member["certificate"])})
            for member in value["members"]
        )
        times = Times.of(value["times"]) if value.get("times") else None
        voters = Configuration(frozenset(value.get("voters", ())), frozenset(value.get("outgoing", ())))
        fresh, returning = value.get("fresh", False), value.get("returning", False)
        return Known(value["mesh"], members, fresh, times, returning, voters)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise OperationError(
            "failed",
            f"{path} is damaged: {error}",
            "restore it from a copy or another peer's directory; it lists the members of the mesh",
        ) from None


def write_known(path: Path, known: Known) -> None:
    """Keep it, durably; raises `OperationError`."""
    members = [
        {**member.model_dump(mode="python"), "certificate": member.certificate.hex()}
        for member in known.members
    ]
    times = asdict(known.times) if known.times else None
    value = {
        "mesh": known.mesh,
        "fresh": known.fresh,
        "returning": known.returning,
        "times": times,
        "voters": sorted(known.configuration.voters),
        "outgoing": sorted(known.configuration.outgoing),
        "members": members,
    }
    write_durably(path, json.dumps(value, indent=1).encode())


def present(members: Iterable[entries.Member]) -> tuple[entries.Member, ...]:
    """Those that have not left, in one order."""
    return tuple(sorted((m for m in members if m.status == "member"), key=lambda member: member.id))


def open_store(directory: Path, known: Known | None, own: str) -> Store:
    """The store of this peer; an empty recovering one if its own is damaged and others have the catalog.

    Raises `OperationError`, naming file and byte, if there is nobody else, or the others cannot decide alone.
    """
    damage = DamagedError("failed", f"{directory} is damaged at byte 0: the directory is missing")
    if known is not None and known.fresh:
        store = _fresh_store(directory)
        if known.returning:
            log.info("catalog.returning")
            store.mark_recovering(Ballot())
        return store
    if known is None or directory.exists():
        try:
            return Store(directory)
        except DamagedError as error:
            damage = error
    if known is None or not known.can_spare(own):
        others = known is not None and any(member.id != own for member in known.members)
        why = "the other peers cannot decide without this one" if others else "no other peer has this catalog"
        hint = f"{why}: restore {directory} from a copy, or found a new mesh in an empty --dir"
        raise OperationError("failed", damage.message, hint)
    aside = directory.with_name(f"{directory.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    log.error("catalog.damaged", reason=damage.message, aside=str(aside))
    return _replace(directory, aside)


def _fresh_store(directory: Path) -> Store:
    """For a peer that has just joined: what it had was the catalog of a mesh of its own."""
    made = Store(directory)
    if made.empty:
        return made
    made.close()
    aside = directory.with_name(f"{directory.name}.before-join")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)
        sync_directory(directory.parent)
    except OSError as error:
        raise unwritable(directory, error) from None
    return Store(directory)


def _replace(directory: Path, aside: Path) -> Store:
    """An empty store that is marked before it is at its place."""
    ballot = surviving_ballot(directory)
    fresh = directory.with_name(f".{directory.name}.new")
    try:
        if directory.exists():
            directory.rename(aside)
        for left in fresh.iterdir() if fresh.exists() else ():
            left.unlink()
        made = Store(fresh)
        made.mark_recovering(ballot)
        made.close()
        fresh.rename(directory)
        sync_directory(directory.parent)
    except OSError as error:
        raise unwritable(directory, error) from None
    return Store(directory)
