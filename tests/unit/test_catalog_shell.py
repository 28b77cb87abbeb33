# SPDX-License-Identifier: Apache-2.0
"""The catalog as the other parts of a peer see it: real stores, messages straight from one to the other."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from mobid.catalog import Catalog
from mobid.store import Store
from mobid.tasks import background
from proto import entries
from proto.api import OperationError
from proto.peer import found
from proto.peer_events import Settings
from proto.raft.events import Ballot, Durable
from proto.state import State
from tests.unit.identities import Known, known

A, B = known("a"), known("b")
MESH = "m" * 16
MEMBERS = {A.id: A.member("tokyo")}


def token(id: str) -> entries.AddToken:
    return entries.AddToken(token=entries.Token(id=id, secret_hash=b"", role="peer", uses=9, expires=4e9))


def nowhere(_peer: str, _data: bytes) -> None:
    """Nobody else is there."""


class Pair:
    """Catalogs that hear one another as long as they run."""

    def __init__(self, base: Path, settings: Settings) -> None:
        self.base = base
        self.settings = settings
        self.running: dict[str, Catalog] = {}

    def store(self, directory: str, *, recovering: bool = False) -> Store:
        made = Store(self.base / directory)
        if recovering:
            made.mark_recovering(Ballot())
        return made

    @asynccontextmanager
    async def run(self, who: Known, store: Store) -> AsyncGenerator[Catalog, None]:
        def send(peer: str, data: bytes) -> None:
            if peer in self.running:
                self.running[peer].receive(who.id, data)

        catalog = Catalog(store, who.id, send, self.settings, bootstrap=State(mesh=MESH, members=MEMBERS))
        if who is A:
            catalog = Catalog(store, who.id, send, self.settings)
            catalog.found(MESH, MEMBERS[A.id])
        catalog.begin()
        self.running[who.id] = catalog
        try:
            with trio.fail_after(30):
                async with background(catalog.run):
                    yield catalog
        finally:
            del self.running[who.id]
            catalog.close()


async def test_the_only_voter_without_its_log_says_why_nobody_coordinates(tmp_path: Path) -> None:
    store = Store(tmp_path / "catalog")
    store.mark_recovering(Ballot(1, A.id))
    first = found(A.id, MEMBERS[A.id], MESH, 1e9)
    store.write([Durable(records=tuple(first.records))])
    store.note_commit(first.commit)
    store.close()
    catalog = Catalog(Store(tmp_path / "catalog"), A.id, nowhere, Settings())
    catalog.begin()
    error = catalog.quorum.no_leader()
    assert error.message.startswith("no coordinator: 0 of 1 voters answer; missing: tokyo (this peer, ")
    assert "restore its catalog from a copy" in error.hint
    catalog.close()


@pytest.mark.parametrize("snapshot", [False, True], ids=["records", "snapshot"])
async def test_what_a_peer_proposes_after_its_log_and_its_clock_were_lost_becomes_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: bool
) -> None:
    """Its number of this start is below that of its last one, which only the others know."""
    settings = Settings()
    if snapshot:
        settings = replace(settings, compact_records=10, keep_records=1)
    pair = Pair(tmp_path, settings)
    async with pair.run(A, pair.store("a")) as tokyo:
        await tokyo.propose(token("t"))
        await tokyo.propose(entries.AddPeer(member=B.member("virginia", "t")))
        async with pair.run(B, pair.store("b")) as virginia:
            for number in range(20):
                await virginia.propose(token(f"before-{number}"))
            before = virginia.state.sessions[B.id].boot
        monkeypatch.setattr(time, "time_ns", lambda: before - 10**9)
        for again in ("once", "twice"):
            async with pair.run(B, pair.store(again, recovering=True)) as virginia:
                # One is under way before anything is known, and the rest comes after.
                unsure = pytest.raises(
                    OperationError, match="does not tell whether the change has become true"
                )
                with unsure if snapshot else nullcontext():
                    await virginia.propose(token(f"early-{again}"))
                for number in range(3):
                    await virginia.propose(token(f"{again}-{number}"))
                    assert f"{again}-{number}" in virginia.state.tokens
                assert virginia.state.sessions[B.id].boot > before
                before = virginia.state.sessions[B.id].boot
        early = {id for id in tokyo.state.tokens if id.startswith("early")}
        assert early == (set() if snapshot else {"early-once", "early-twice"})
        assert tokyo.state.tokens.keys() == virginia.state.tokens.keys()
