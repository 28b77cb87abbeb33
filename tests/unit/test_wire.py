# SPDX-License-Identifier: Apache-2.0
"""Frames: whatever arrives, in whatever pieces, is a message or a refusal, and never too large."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import api, wire
from proto.api import OperationError

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
maps = st.dictionaries(st.text(max_size=10), values, max_size=4)
ids = st.integers(0, 2**64 - 1)
keys = st.just("") | st.text("0123456789abcdef", min_size=16, max_size=16)
errors = st.builds(OperationError, st.sampled_from(["not-found", "failed"]), st.text(), st.text())
messages = st.one_of(
    st.builds(wire.Request, ids, st.text(min_size=1, max_size=64), maps, st.integers(0, 255), keys),
    st.builds(wire.Item, ids, maps),
    st.builds(wire.Input, ids, maps),
    st.builds(wire.Cancel, ids),
    st.builds(wire.Result, ids, values, st.text(max_size=20)),
    st.builds(wire.Failure, ids, errors),
)


@given(st.lists(messages, max_size=4), st.integers(1, 50))
def test_messages_survive_any_fragmentation(sent: list[wire.Message], step: int) -> None:
    stream = b"".join(wire.encode(message) for message in sent)
    decoder = wire.Decoder()
    got: list[wire.Message] = []
    for start in range(0, len(stream), step):
        got += decoder.feed(stream[start : start + step])
    assert got == sent
    assert not decoder.pending


@given(st.binary(max_size=200))
def test_rubbish_is_refused_or_incomplete_but_never_crashes(data: bytes) -> None:
    decoder = wire.Decoder(wire.LIMIT_UNAUTHENTICATED)
    with suppress(wire.WireError):
        assert all(isinstance(message, wire.Message) for message in decoder.feed(data))


@given(st.binary(max_size=100))
def test_a_frame_of_rubbish_is_refused(body: bytes) -> None:
    decoder = wire.Decoder()
    try:
        found = list(decoder.feed(len(body).to_bytes(4, "big") + body))
    except wire.WireError:
        return
    assert len(found) == 1


def test_a_stranger_gets_no_room_for_a_large_frame() -> None:
    decoder = wire.Decoder(wire.LIMIT_UNAUTHENTICATED)
    with pytest.raises(wire.WireError, match="larger than the 16384"):
        list(decoder.feed((wire.LIMIT_UNAUTHENTICATED + 1).to_bytes(4, "big")))


def test_a_frame_at_the_limit_passes() -> None:
    message = wire.Request(1, "x", {"data": b""})
    room = 100 - len(wire.encode(message)) + 4
    full = wire.Request(1, "x", {"data": b"a" * room})
    assert list(wire.Decoder(100).feed(wire.encode(full))) == [full]
    with pytest.raises(OperationError) as caught:
        wire.encode(wire.Request(1, "x", {"data": b"a" * (room + 1)}), limit=100)
    assert caught.value.code == "too-large"


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"op": "x"},
        {"id": -1, "op": "x"},
        {"id": True, "op": "x"},
        {"id": 1},
        {"id": 1, "op": ""},
        {"id": 1, "op": "x" * 65},
        {"id": 1, "op": "x", "args": []},
        {"id": 1, "op": "x", "args": {1: 2}},
        {"id": 1, "op": "x", "more": 1},
        {"id": 1, "op": "x", "hops": -1},
        {"id": 1, "op": "x", "key": "0123"},
        {"id": 1, "cancel": False},
        {"id": 1, "item": []},
        {"id": 1, "item": {}, "result": 1},
        {"id": 1, "error": {"code": "x"}},
    ],
)
def test_malformed_messages_are_refused(value: Any) -> None:
    body = wire.pack(value)
    with pytest.raises(wire.WireError):
        list(wire.Decoder().feed(len(body).to_bytes(4, "big") + body))


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(wire.WireError):
        wire.unpack(b"\x91" * 5000 + b"\xc0")


def test_arguments_name_each_wrong_key() -> None:
    with pytest.raises(OperationError) as caught:
        api.parse(api.VmForce, {"vm": "a", "force": "yes", "forse": True}, "vm.stop")
    assert caught.value.code == "bad-argument"
    assert "force" in caught.value.message
    assert "forse" in caught.value.message
    assert caught.value.hint == "its arguments are: vm, force"


@pytest.mark.parametrize("text", ["", "../x", "a b", "<b>", "-x", "a" * 64, "a/b"])
def test_what_cannot_be_a_name(text: str) -> None:
    with pytest.raises(OperationError):
        api.check_name(text, "--name")
