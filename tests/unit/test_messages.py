# SPDX-License-Identifier: Apache-2.0
"""Messages between peers: they come back as they were, and nothing else does any harm."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import messages, wire
from proto.api import OperationError
from proto.lease_events import Granted, NotGranted, Renew
from proto.log import MAX_PAYLOAD, Record, RecordKind
from proto.messages import MessageError, decode, encode
from proto.peer_events import Forward, Message
from proto.raft import messages as m
from proto.raft.configuration import Configuration

numbers = st.integers(0, messages.MAX_NUMBER - 1)
peers = st.text(max_size=16)
seconds = st.floats(0, 1e9)
groups = st.frozensets(peers, max_size=3)
configurations = st.builds(Configuration, groups, groups, groups)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, tuple[Record, ...]]:
    """Index and term of a record, and some that follow it."""
    index, term = draw(st.integers(0, 2**40)), draw(st.integers(0, 2**40))
    records, at = [], term
    for place in range(draw(st.integers(0, 4))):
        at += draw(st.integers(0, 2))
        kind = draw(st.sampled_from(get_args(RecordKind)))
        records.append(Record(at, index + 1 + place, draw(st.binary(max_size=20)), kind))
    return index, term, tuple(records)


any_message: st.SearchStrategy[Any] = st.one_of(
    st.builds(m.AskVote, numbers, numbers, numbers, st.booleans(), st.booleans()),
    st.builds(m.Voted, numbers, st.booleans(), st.booleans()),
    st.builds(lambda run, term, commit, round: m.Append(term, *run, commit, round), runs(), *[numbers] * 3),
    st.builds(m.Appended, numbers, st.booleans(), numbers, numbers, numbers, st.booleans()),
    st.builds(
        lambda index, settled, data, rest: m.SnapshotPart(
            index, index, index, settled, len(data) + 2 * rest, rest, data, rest
        ),
        numbers, configurations, st.binary(max_size=30), st.integers(0, 2**40),
    ),
    st.builds(m.SnapshotTaken, numbers, numbers, numbers, numbers),
    st.builds(m.Lead, numbers),
    st.builds(m.AskRead, numbers, st.booleans()),
    st.builds(m.Readable, numbers, st.none() | numbers),
    st.builds(m.Follow, numbers, numbers),
    st.builds(
        lambda run, term, leader, settled, commit: m.Feed(term, leader, settled, *run, commit),
        runs(), numbers, peers, configurations, numbers,
    ),
    st.builds(Renew, numbers, seconds),
    st.builds(Granted, numbers, seconds, numbers),
    st.builds(NotGranted, numbers, peers),
    st.builds(Forward, st.lists(st.binary(max_size=30), max_size=3).map(tuple)),
)  # fmt: skip


@settings(max_examples=300)
@given(any_message)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert decode(encode(message)) == message


def test_every_message_has_a_shape() -> None:
    assert set(messages._SHAPES) == set(get_args(Message))


@given(st.binary(max_size=200))
def test_random_bytes_are_one_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode(data)


plain: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | peers
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(peers, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(any_message, st.data())
def test_a_message_with_anything_in_its_place_is_a_message_or_one_error(
    message: Message, draw: st.DataObject
) -> None:
    value = wire.unpack(encode(message))
    place = draw.draw(st.integers(0, len(value)))
    value[place : place + draw.draw(st.integers(0, 2))] = draw.draw(st.lists(plain, max_size=2))
    _decode_or_refuse(wire.pack(value))


@settings(max_examples=300)
@given(any_message, st.data())
def test_a_message_with_flipped_bytes_is_a_message_or_one_error(
    message: Message, draw: st.DataObject
) -> None:
    data = bytearray(encode(message))
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    _decode_or_refuse(bytes(data[: draw.draw(st.integers(0, len(data)))]))


def _decode_or_refuse(data: bytes) -> None:
    try:
        read = decode(data)
    except MessageError:
        return
    assert decode(encode(read)) == read


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([2, "lead", 1], "has version 2"),
        ([1, "dance", 1], "there is no message 'dance'"),
        ([1, "lead"], "0 fields instead of 1"),
        ([1, "lead", -1], "-1 is no number"),
        ([1, "lead", True], "True is no number"),
        ([1, "append", 1, 5, 1, [[1, 7, 0, b""]], 0, 0], "record 7 does not follow record 5"),
        ([1, "append", 1, 5, 1, [[0, 6, 0, b""]], 0, 0], "record 6 does not follow record 5"),
        ([1, "append", 1, 5, 1, [[1, 6, 9, b""]], 0, 0], "a record is malformed"),
        ([1, "renew", 1, float("nan")], "nan is no time"),
        ([1, "not-granted", 1, "x" * 2000], "no text of at most 1000"),
        ([1, "forward", [b""] * 5000], "too many"),
        ({"version": 1}, "no list"),
    ],
)
def test_what_is_wrong_is_said(value: Any, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        decode(wire.pack(value))


def test_sizes_are_bounded() -> None:
    largest = m.Append(1, 0, 0, (Record(1, 1, bytes(MAX_PAYLOAD)),), 0, 0)
    assert decode(encode(largest)) == largest
    with pytest.raises(OperationError, match="larger than"):
        encode(Forward((bytes(messages.LIMIT),)))
    with pytest.raises(MessageError, match="larger than"):
        decode(bytes(messages.LIMIT + 1))
    long = decode(encode(NotGranted(1, "x" * 5000)))
    assert isinstance(long, NotGranted)
    assert len(long.reason) == messages.MAX_TEXT
