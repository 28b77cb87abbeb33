# SPDX-License-Identifier: Apache-2.0
"""The state as bytes: whatever the log made of it comes back the same, and damage is told in words."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import entries as e
from proto import state_codec, wire
from proto.api import OperationError
from proto.catalog import Refused, apply, skip
from proto.state import State
from tests.unit.test_catalog import FOUND, A, B, C, guest, token

USER = e.User(id=C.id, name="ann", role="viewer", certificate=C.certificate, token="u")
NET = e.Network(key="lab:net", lab="lab", kind="network")
LINK = NET.model_copy(update={"key": "lab:link", "members": (("lab/x", "eth0"),)})
POOL: list[e.Entry] = [
    token(),
    token("u", role="viewer"),
    token("more"),
    e.RevokeToken(token="more"),
    e.AddPeer(member=B.member("virginia", "t")),
    e.AddUser(user=USER),
    e.UpdatePeer(peer=A.id, address="h:2", site="x", facts=e.Facts(cpu_features=("a", "b"), memory=7)),
    e.DrainPeer(peer=B.id, draining=True),
    e.SetLease(peer=B.id, duration=1.5),
    e.RemovePeer(peer=B.id, force=True),
    e.PutLab(lab=e.Lab(name="lab", model={"z": [1, {"b": None, "a": 1.5}]}), replace=True),
    e.PutNetwork(network=NET),
    e.PutNetwork(network=LINK),
    e.SetImpairments(network="lab:link", impairments=(e.Impairment(delay=0.1),)),
    e.AddGuest(guest=guest(env={"Z": "1", "A": "2"}, on_partition="freeze")),
    e.AddGuest(guest=guest("lab/other", B.id)),
    e.Report(guest="lab/vm", owner=A.id, epoch=1, state="running", started=3.0),
    e.Handover(migration="1" * 32, guest="lab/vm", epoch=1, source=A.id, destination=B.id, timeout=50.0),
    e.Done(migration="1" * 32),
    e.Cancel(migration="1" * 32, by=A.id, reason="why"),
    e.FailOverGuest(guest="lab/vm", epoch=1, owner=B.id),
    e.RemoveGuest(guest="lab/none"),
]

steps = st.lists(
    st.tuples(
        st.sampled_from(POOL),
        st.sampled_from(["", A.id, B.id]),
        st.integers(1, 3),
        st.integers(0, 400),
        st.sampled_from(["", "key#1", "key#2"]),
        st.floats(0.0, 99.0),
    ),
    max_size=40,
)


def replay(log: list[Any], state: State) -> State:
    for entry, client, boot, sequence, request, time in log:
        proposal = e.Proposal(
            entry=entry, client=client, boot=boot, sequence=sequence, request=request, time=time
        )
        try:
            state = apply(state, state.index + 1, proposal)
        except Refused as error:
            state = skip(state, state.index + 1, proposal, error)
    return state


FOUNDED = apply(State(), 1, e.Proposal(entry=FOUND, time=5.0))


@settings(max_examples=150)
@given(steps, steps)
def test_a_state_comes_back_and_goes_on_as_if_it_had_never_been_away(before: Any, after: Any) -> None:
    state = replay(before, FOUNDED)
    data = state_codec.encode(state)
    back = state_codec.decode(data)
    assert back == state
    assert state_codec.encode(back) == data
    for name in ("members", "guests", "sessions", "labs"):
        assert list(getattr(back, name)) == list(getattr(state, name))
    assert state_codec.encode(replay(after, back)) == state_codec.encode(replay(after, state))


def test_the_whole_state_is_in_it() -> None:
    value = wire.unpack(state_codec.encode(State()))
    assert set(value) == {field.name for field in fields(State)} | {"format"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xc1", "cannot be read"),
        (wire.pack([1]), "it is not a map"),
        (wire.pack({"format": 2}), "reads format 1"),
        (wire.pack({"format": 1, "colour": 3}), "colour is unknown"),
        (wire.pack({"format": 1, "members": [["x", {"id": 5}]]}), "malformed at members"),
        (wire.pack({"format": 1, "members": [1, 2]}), "cannot be read"),
        (wire.pack({"format": 1, "sessions": [["x", 5]]}), "cannot be read"),
        (wire.pack({"format": 1, "index": "many"}), "malformed at index"),
    ],
)
def test_damage_is_told_in_words(data: bytes, words: str) -> None:
    with pytest.raises(OperationError, match=words):
        state_codec.decode(data)
