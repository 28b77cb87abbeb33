# SPDX-License-Identifier: Apache-2.0
"""Versions of the protocol: what a mesh of different versions may write, and who may come in."""

from __future__ import annotations

import pytest

from proto import entries as e
from proto import versions
from proto.api import OperationError
from proto.catalog import Refused, State, apply
from tests.unit.identities import known

A, B, C = known("a"), known("b"), known("c")


def facts(newest: int) -> e.Facts:
    return e.Facts(newest_protocol=newest)


def run(state: State, *steps: e.Entry) -> State:
    for entry in steps:
        state = apply(state, state.index + 1, e.Proposal(entry=entry))
    return state


def update(peer: str, newest: int) -> e.UpdatePeer:
    return e.UpdatePeer(peer=peer, address="h:1", site="", facts=facts(newest))


@pytest.fixture
def mesh() -> State:
    """Two peers that speak versions 2 and 1."""
    token = e.AddToken(token=e.Token(id="t", secret_hash=b"h", role="peer", uses=9, expires=9.0))
    found = e.Found(mesh="m" * 16, member=A.member("tokyo"))
    return run(State(), found, token, e.AddPeer(member=B.member("virginia", "t")), update(A.id, 2))


def test_the_best_version_comes_first() -> None:
    assert versions.names(1, 3) == ["mobi/3", "mobi/2", "mobi/1"]


def test_a_mesh_speaks_what_all_its_members_do(mesh: State) -> None:
    assert mesh.protocol == 1
    upgraded = run(mesh, update(B.id, 3))
    assert upgraded.protocol == 2
    assert run(mesh, e.RemovePeer(peer=B.id)).protocol == 2


def test_new_kinds_of_entries_wait_for_the_last_peer(mesh: State) -> None:
    introduced = {"drain-peer": 2}
    drain = e.DrainPeer(peer=A.id, draining=True)
    for entry in (drain, e.Batch(entries=(drain,))):
        with pytest.raises(OperationError, match="too new for virginia") as caught:
            versions.check_entry(mesh, entry, introduced)
        assert caught.value.code == "unsupported"
        versions.check_entry(run(mesh, update(B.id, 2)), entry, introduced)
    versions.check_entry(mesh, e.RemovePeer(peer=B.id), introduced)


def test_nobody_comes_in_who_would_not_understand_the_log(mesh: State) -> None:
    upgraded = run(mesh, update(B.id, 2))
    late = C.member("amsterdam", "t")
    with pytest.raises(Refused, match="speaks version 1 of the protocol at most, this mesh version 2"):
        run(upgraded, e.AddPeer(member=late))
    with pytest.raises(Refused, match="virginia speaks version 1"):
        run(upgraded, update(B.id, 1))
    run(upgraded, e.AddPeer(member=late.model_copy(update={"facts": facts(5)})))
