# SPDX-License-Identifier: Apache-2.0
"""What a peer does at its start with a catalog that is damaged, gone, or of another mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mobid.config import Times, agreed
from mobid.recovery import Known, open_store, read_known, write_known
from mobid.store import Store
from proto.api import OperationError
from proto.log import Record
from proto.raft.configuration import Configuration
from proto.raft.events import Ballot, Durable
from tests.unit.identities import known

A, B = known("a"), known("b")
ALONE = Known("m", (A.member("tokyo"),))
PAIR = Known("m", (A.member("tokyo"), B.member("virginia")), times=Times(0.05, 0.5))


def filled(directory: Path) -> None:
    store = Store(directory)
    for index in (1, 2, 3):
        store.write([Durable(ballot=Ballot(4, "x"), records=(Record(1, index, b"data"),))])
    store.close()


def damaged(directory: Path) -> None:
    filled(directory)
    data = bytearray((directory / "log").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "log").write_bytes(data)


def test_what_is_known_of_the_mesh_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "mesh.json"
    assert read_known(path) is None
    joint = Configuration(frozenset({A.id, B.id}), frozenset({A.id}))
    for what in (PAIR, replace(PAIR, configuration=joint)):
        write_known(path, what)
        assert read_known(path) == what
    path.write_text('{"mesh": "m", "members": []}')
    assert read_known(path) == Known("m", ())
    for damaged in ("{", "[" * 3000):
        path.write_text(damaged)
        with pytest.raises(OperationError, match=r"mesh\.json is damaged"):
            read_known(path)


def test_with_others_a_damaged_catalog_is_put_aside_and_the_vote_is_remembered(tmp_path: Path) -> None:
    directory = tmp_path / "catalog"
    damaged(directory)
    store = open_store(directory, PAIR, A.id)
    assert store.stored.recovering
    assert store.stored.ballot == Ballot(4, "x")
    assert not store.stored.records
    store.close()
    assert len(list(tmp_path.glob("catalog.damaged-*/log"))) == 1
    again = open_store(directory, PAIR, A.id)
    assert again.stored.recovering
    again.close()


def test_a_lost_record_that_was_committed_makes_the_peer_recover(tmp_path: Path) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    store = Store(directory)
    store.note_commit(3)
    store.close()
    data = (directory / "log").read_bytes()
    (directory / "log").write_bytes(data[:-1])
    store = open_store(directory, PAIR, A.id)
    assert store.stored.recovering
    store.close()


def test_a_catalog_that_is_gone_was_lost(tmp_path: Path) -> None:
    store = open_store(tmp_path / "catalog", PAIR, A.id)
    assert store.stored.recovering
    store.close()


@pytest.mark.parametrize("nobody", [None, ALONE])
def test_a_peer_without_others_refuses_and_touches_nothing(tmp_path: Path, nobody: Known | None) -> None:
    directory = tmp_path / "catalog"
    damaged(directory)
    before = (directory / "log").read_bytes()
    with pytest.raises(OperationError, match=r"catalog/log is damaged at byte \d+") as caught:
        open_store(directory, nobody, A.id)
    assert "no other peer has this catalog" in caught.value.hint
    assert (directory / "log").read_bytes() == before


BOTH = frozenset({A.id, B.id})


@pytest.mark.parametrize(
    "voters",
    [
        Configuration(frozenset({A.id})),
        Configuration(BOTH),
        Configuration(BOTH | {"c"}, frozenset({A.id})),
        Configuration(frozenset({B.id}), frozenset({A.id})),
    ],
    ids=["only", "one of two", "it was the only one", "it is leaving"],
)
def test_a_peer_without_whom_nobody_can_decide_refuses_too(tmp_path: Path, voters: Configuration) -> None:
    directory = tmp_path / "catalog"
    damaged(directory)
    before = (directory / "log").read_bytes()
    with pytest.raises(OperationError, match=r"catalog/log is damaged at byte \d+") as caught:
        open_store(directory, replace(PAIR, configuration=voters), A.id)
    assert "the other peers cannot decide without this one" in caught.value.hint
    assert (directory / "log").read_bytes() == before
    spare = replace(PAIR, configuration=Configuration(BOTH | {"c"}))
    store = open_store(directory, spare, A.id)
    assert store.stored.recovering
    store.close()


def test_who_does_not_vote_recovers_though_another_is_the_only_voter(tmp_path: Path) -> None:
    directory = tmp_path / "catalog"
    damaged(directory)
    store = open_store(directory, replace(PAIR, configuration=Configuration(frozenset({A.id}))), B.id)
    assert store.stored.recovering
    store.close()


def test_a_newcomer_begins_empty_and_keeps_what_it_had_aside(tmp_path: Path) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    newcomer = Known("m", (B.member("virginia"),), fresh=True)
    store = open_store(directory, newcomer, A.id)
    assert store.empty
    assert not store.stored.recovering
    store.close()
    assert (tmp_path / "catalog.before-join" / "log").exists()
    open_store(directory, newcomer, A.id).close()
    assert (tmp_path / "catalog.before-join" / "log").exists()


def test_the_times_are_the_mesh_s_and_nobody_can_have_others() -> None:
    quick = Times(0.02, 0.2)
    assert agreed(None, None) == Times()
    assert agreed(quick, None) == quick
    assert agreed(None, quick) == agreed(quick, quick) == quick
    with pytest.raises(OperationError) as caught:
        agreed(Times(0.02, 2.0), quick)
    assert caught.value.code == "bad-argument"
    assert caught.value.message == (
        "--heartbeat 20ms --election 2000ms is not what this mesh was founded with: "
        "--heartbeat 20ms --election 200ms"
    )
    assert "leave both options out" in caught.value.hint


def test_a_key_that_joins_again_must_be_believed_first(tmp_path: Path) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    returning = Known("m", (B.member("virginia"),), fresh=True, returning=True)
    write_known(tmp_path / "mesh.json", returning)
    for known_by_then in (returning, read_known(tmp_path / "mesh.json"), PAIR):
        store = open_store(directory, known_by_then, A.id)
        assert store.empty
        assert store.stored.recovering
        assert store.stored.ballot == Ballot()
        store.close()
