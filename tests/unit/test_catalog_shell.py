# SPDX-License-Identifier: Apache-2.0
"""The catalog as the other parts of a peer see it: real stores, messages straight from one to the other."""

from __future__ import annotations

from pathlib import Path

from mobid.catalog import Catalog
from mobid.store import Store
from proto.peer import found
from proto.peer_events import Settings
from proto.raft.events import Ballot, Durable
from tests.unit.identities import known

A = known("a")
MESH = "m" * 16


def nowhere(_peer: str, _data: bytes) -> None:
    """Nobody else is there."""


async def test_the_only_voter_without_its_log_says_why_nobody_coordinates(tmp_path: Path) -> None:
    store = Store(tmp_path / "catalog")
    store.mark_recovering(Ballot(1, A.id))
    first = found(A.id, A.member("tokyo"), MESH, 1e9)
    store.write([Durable(records=tuple(first.records))])
    store.note_commit(first.commit)
    store.close()
    catalog = Catalog(Store(tmp_path / "catalog"), A.id, nowhere, Settings())
    catalog.begin()
    error = catalog.no_leader()
    assert error.message.startswith("no coordinator: 0 of 1 voters answer; missing: tokyo (this peer, ")
    assert "restore its catalog from a copy" in error.hint
    catalog.close()
