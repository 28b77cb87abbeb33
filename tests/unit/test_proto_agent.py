# SPDX-License-Identifier: Apache-2.0
"""The agent channel's framing and sessions, with everything a serial line can do to them."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.agent import (
    CREDIT,
    MAX_PAYLOAD,
    MAX_SESSIONS,
    WINDOW,
    AgentError,
    AgentMachine,
    Finished,
    Frame,
    FrameReader,
    FrameType,
    Hello,
    Output,
    Violation,
    Writable,
    encode,
    pack_map,
    unpack_map,
)

frames = st.builds(
    Frame,
    st.sampled_from(list(FrameType)),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=300) | st.just(b"\xa5\x5a" * 20) | st.just(b"\xa5"),
)
# Garbage may hold the magic number, but no header that asks for more bytes than the test sends afterwards.
garbage = st.binary(max_size=40).map(lambda data: data.replace(b"\xa5", b"\x00")) | st.sampled_from(
    [b"\xa5", b"\xa5\x5a", b"\xa5\xa5\x5a\xff", b"\xa5\x5a\x00", b"\xa5\x5a\x01\x01" + bytes(8)]
)


@given(st.lists(st.tuples(garbage, frames), max_size=8), garbage, st.lists(st.integers(1, 50), min_size=1))
def test_frames_are_found_between_garbage_however_the_stream_is_cut(
    parts: list[tuple[bytes, Frame]], tail: bytes, cuts: list[int]
) -> None:
    stream = b"".join(junk + encode(frame) for junk, frame in parts) + tail
    reader = FrameReader()
    found: list[Frame] = []
    at = turn = 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        found += reader.feed(stream[at : at + size])
        at += size
        turn += 1
    while reader.pending:
        found += reader.skip()
    assert found == [frame for _, frame in parts]
    assert reader.garbage == sum(len(junk) for junk, _ in parts) + len(tail)


@given(frames, frames)
def test_a_frame_arrives_when_its_last_byte_does(first: Frame, second: Frame) -> None:
    stream = encode(first) + encode(second)
    for cut in range(len(stream) + 1):
        reader = FrameReader()
        before = reader.feed(stream[:cut])
        assert before == [first, second][: (cut >= len(encode(first))) + (cut >= len(stream))]
        assert before + reader.feed(stream[cut:]) == [first, second]
        assert reader.pending == 0


@given(frames, frames, st.data())
def test_a_truncated_frame_costs_only_itself(first: Frame, second: Frame, data: st.DataObject) -> None:
    whole = encode(first)
    kept = data.draw(st.integers(1, len(whole) - 1))
    reader = FrameReader()
    found = reader.feed(whole[:kept] + encode(second))
    while reader.pending:
        found += reader.skip()
    assert second in found
    assert first not in found or first == second


@given(frames, st.data())
def test_a_changed_bit_is_noticed(frame: Frame, data: st.DataObject) -> None:
    whole = bytearray(encode(frame))
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    reader = FrameReader()
    found = reader.feed(bytes(whole))
    while reader.pending:
        found += reader.skip()
    assert frame not in found


@given(st.binary(max_size=3000))
@settings(max_examples=200)
def test_the_reader_keeps_at_most_one_frame_of_anything(data: bytes) -> None:
    reader = FrameReader()
    for at in range(0, len(data), 7):
        reader.feed(data[at : at + 7])
        assert reader.pending <= 12 + MAX_PAYLOAD + 4


def test_a_payload_that_is_too_large_is_refused_and_never_waited_for() -> None:
    with pytest.raises(AgentError, match="at most 65536"):
        encode(Frame(FrameType.STREAM, 1, bytes(MAX_PAYLOAD + 1)))
    reader = FrameReader()
    header = b"\xa5\x5a\x05\x00" + (1).to_bytes(4, "little") + (MAX_PAYLOAD + 1).to_bytes(4, "little")
    good = Frame(FrameType.HELLO, 0, b"\x80")
    assert reader.feed(header + encode(good)) == [good]


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x90", b"\x81\x01\x02", b"\x81", b"\xdf\xff\xff\xff\xff", b"\x91" * 2000]
)
def test_payloads_that_are_no_map_are_refused(payload: bytes) -> None:
    with pytest.raises(AgentError):
        unpack_map(payload)


def hello(machine: AgentMachine) -> None:
    [frame] = sent(machine.reset())
    facts, back = machine.receive(encode(Frame(FrameType.HELLO, frame.session, pack_map({"version": 1}))))
    assert facts == [Hello({"version": 1})]
    assert back == b""
    assert machine.ready


def stream(session: int, channel: int, data: bytes) -> bytes:
    return encode(Frame(FrameType.STREAM, session, bytes((channel,)) + data))


def sent(data: bytes) -> list[Frame]:
    return FrameReader().feed(data)


def test_a_session_from_request_to_result() -> None:
    machine = AgentMachine()
    hello(machine)
    session, request = machine.open(FrameType.EXEC, {"argv": ["true"]})
    [frame] = sent(request)
    assert (frame.type, frame.session, msgpack.unpackb(frame.payload)) == (
        FrameType.EXEC,
        session,
        {"argv": ["true"]},
    )
    facts, _ = machine.receive(
        stream(session, 1, b"out") + stream(session, 2, b"err") + stream(session, 1, b"")
    )
    assert facts == [Output(session, 1, b"out"), Output(session, 2, b"err"), Output(session, 1, b"")]
    facts, _ = machine.receive(encode(Frame(FrameType.RESULT, session, pack_map({"ok": True, "code": 3}))))
    assert facts == [Finished(session, {"ok": True, "code": 3}, None, "")]
    assert machine.sessions == frozenset()
    assert machine.receive(stream(session, 1, b"late")) == ([], b"")
    assert machine.send(session, b"late") == b""


def test_an_error_of_the_agent_is_told_with_its_words() -> None:
    machine = AgentMachine()
    session, _ = machine.open(FrameType.GET, {"path": "/none"})
    refusal = pack_map({"ok": False, "error": "not-found", "message": "no such file"})
    facts, _ = machine.receive(encode(Frame(FrameType.RESULT, session, refusal)))
    assert isinstance(facts[0], Finished)
    assert (facts[0].error, facts[0].message) == ("not-found", "no such file")


def test_credit_bounds_what_is_sent() -> None:
    machine = AgentMachine()
    session, _ = machine.open(FrameType.PUT, {"path": "/x", "mode": 0o644, "size": 0})
    assert machine.writable(session) == WINDOW
    data = b"".join(frame.payload[1:] for frame in sent(machine.send(session, bytes(range(256)) * 256)))
    assert data == bytes(range(256)) * 256
    assert machine.writable(session) == 0
    with pytest.raises(ValueError, match="credit"):
        machine.send(session, b"x")
    facts, _ = machine.receive(encode(Frame(FrameType.CREDIT, session, CREDIT.pack(0, 100))))
    assert facts == [Writable(session)]
    assert machine.writable(session) == 100
    machine.receive(encode(Frame(FrameType.CREDIT, session, CREDIT.pack(0, 2**32 - 1))))
    assert machine.writable(session) == WINDOW


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_consumed_bytes_are_credited_before_the_window_is_used_up(sizes: list[int]) -> None:
    machine = AgentMachine()
    session, _ = machine.open(FrameType.EXEC, {"argv": ["cat"]})
    credited = received = 0
    for size in sizes:
        facts, _ = machine.receive(stream(session, 1, bytes(size)))
        assert facts == [Output(session, 1, bytes(size))]
        received += size
        for frame in sent(machine.consumed(session, 1, size)):
            assert frame.type == FrameType.CREDIT
            credited += CREDIT.unpack(frame.payload)[1]
        assert 0 <= received - credited < WINDOW // 4


def test_a_guest_that_ignores_its_credit_loses_its_session() -> None:
    machine = AgentMachine()
    session, _ = machine.open(FrameType.EXEC, {"argv": ["yes"]})
    facts, _ = machine.receive(stream(session, 1, bytes(60_000)) + stream(session, 2, bytes(60_000)))
    assert [type(fact) for fact in facts] == [Output, Output]
    facts, back = machine.receive(stream(session, 1, bytes(10_000)))
    assert isinstance(facts[-1], Violation)
    assert [frame.type for frame in sent(back)] == [FrameType.SIGNAL]
    assert session not in machine.sessions


def test_nothing_may_follow_the_end_of_a_channel() -> None:
    machine = AgentMachine()
    session, _ = machine.open(FrameType.EXEC, {"argv": ["true"]})
    facts, _ = machine.receive(stream(session, 1, b"") + stream(session, 2, b"x") + stream(session, 1, b""))
    assert facts[:2] == [Output(session, 1, b""), Output(session, 2, b"x")]
    assert isinstance(facts[2], Violation)


def test_an_abandoned_session_is_killed_and_drained() -> None:
    machine = AgentMachine()
    session, _ = machine.open(FrameType.EXEC, {"argv": ["yes"]})
    assert [frame.type for frame in sent(machine.abandon(session))] == [FrameType.SIGNAL]
    facts, back = machine.receive(stream(session, 1, b"x" * 100))
    assert facts == []
    assert [CREDIT.unpack(frame.payload) for frame in sent(back)] == [(1, 100)]
    facts, _ = machine.receive(encode(Frame(FrameType.RESULT, session, pack_map({"ok": True, "signal": 9}))))
    assert facts == []
    assert machine.abandon(session) == b""


def test_lost_bytes_end_sessions_rather_than_leave_a_hole() -> None:
    machine = AgentMachine()
    machine.receive(b"boot messages")
    hello(machine)
    session, _ = machine.open(FrameType.GET, {"path": "/x"})
    whole = stream(session, 1, b"first") + stream(session, 1, b"second") + stream(session, 1, b"third")
    facts, back = machine.receive(whole[:30] + whole[31:])
    assert isinstance(facts[0], Violation)
    assert "lost" in facts[0].message
    assert [frame.type for frame in sent(back)] == [FrameType.SIGNAL, FrameType.CREDIT, FrameType.CREDIT]
    assert machine.sessions == frozenset()


def test_the_number_of_sessions_is_bounded() -> None:
    machine = AgentMachine()
    for _ in range(MAX_SESSIONS):
        machine.open(FrameType.PROBE, {})
    with pytest.raises(AgentError, match="open already"):
        machine.open(FrameType.PROBE, {})
    machine.reset()
    machine.open(FrameType.PROBE, {})


def test_a_restarted_agent_ends_the_sessions_it_does_not_know() -> None:
    machine = AgentMachine()
    hello(machine)
    session, _ = machine.open(FrameType.EXEC, {"argv": ["sleep"]})
    facts, _ = machine.receive(encode(Frame(FrameType.HELLO, 0, pack_map({"version": 1}))))
    assert facts == [Violation(session, "the guest's agent was started anew"), Hello({"version": 1})]
    machine.reset()
    [current] = sent(machine.reset())
    late = encode(Frame(FrameType.HELLO, current.session - 1, pack_map({})))
    assert machine.receive(late) == ([], b"")
    assert not machine.ready
    machine.receive(encode(Frame(FrameType.HELLO, current.session, pack_map({}))))
    assert machine.ready


@given(st.lists(st.binary(max_size=200) | frames.map(encode), max_size=20))
def test_nothing_the_guest_sends_raises(pieces: list[bytes]) -> None:
    machine = AgentMachine()
    for _ in range(3):
        machine.open(FrameType.EXEC, {"argv": ["true"]})
    for piece in pieces:
        machine.receive(piece)
