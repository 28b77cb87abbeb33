# SPDX-License-Identifier: Apache-2.0
"""The conversation between a peer and the agent inside a guest (`kernel/README.md` §9), as a pure machine.

The only way into a guest that needs no network is its serial line. A serial line is a stream of bytes with no
beginning: the kernel may have printed on it, a migration may have cut a frame in half, a newer reader may
have taken some bytes away. So every frame carries a magic number, a length and a checksum, and a reader that
is lost looks for the next place where all three fit. On top of the frames many *sessions* share the line (a
program being run, a file being copied); *credit* keeps any of them from filling the memory of the other side:
at most 64 KiB of a session's bytes may be under way, and the receiver gives more only when it has passed them
on.

`AgentMachine` holds the host's side of that state. Bytes go in by `receive`, facts come out; its other
methods return the bytes to send. It never waits, and what it keeps is bounded whatever the guest sends.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import msgpack

MAGIC = b"\xa5\x5a"
HEADER = struct.Struct("<2sBBII")
"""Magic, type, zero, session, length of the payload."""
TRAILER = struct.Struct("<I")
CREDIT = struct.Struct("<BI")
MAX_PAYLOAD = 65_536
WINDOW = 65_536
"""Bytes that may be unacknowledged in one channel of a session."""
CHUNK = 16_384
"""Largest piece of a stream that this side puts into one frame, so that sessions share the line fairly."""
MAX_SESSIONS = 64

STDIN, STDOUT, STDERR = 0, 1, 2


class AgentError(Exception):
    """Something about the agent's channel or an answer of the agent; the text is a sentence for a person."""


class FrameType(IntEnum):
    """What a frame is (`kernel/README.md` §9)."""

    RESET = 1
    HELLO = 2
    CONFIGURE = 3
    EXEC = 4
    STREAM = 5
    CREDIT = 6
    SIGNAL = 7
    GET = 8
    PUT = 9
    PROBE = 10
    POWEROFF = 11
    RESULT = 12


_KNOWN_TYPES = frozenset(FrameType)
REQUESTS = frozenset(
    {
        FrameType.CONFIGURE,
        FrameType.EXEC,
        FrameType.GET,
        FrameType.PUT,
        FrameType.PROBE,
        FrameType.POWEROFF,
    }
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; `payload` is at most `MAX_PAYLOAD` bytes."""

    type: FrameType
    session: int
    payload: bytes


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Raises `AgentError` if the payload is too large."""
    if len(frame.payload) > MAX_PAYLOAD:
        raise AgentError(
            f"a frame for the agent has {len(frame.payload)} bytes; at most {MAX_PAYLOAD} are possible"
        )
    head = HEADER.pack(MAGIC, frame.type, 0, frame.session, len(frame.payload)) + frame.payload
    return head + TRAILER.pack(zlib.crc32(head))


class FrameReader:
    """Finds frames in a stream of bytes that may begin, or be broken, anywhere.

    A candidate is a header with the magic, a known type, the zero byte and a possible length. If its checksum
    is wrong, only its first byte is given up, so a frame that follows within what looked like its payload is
    still found.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.garbage = 0
        """Bytes thrown away since the beginning because they belonged to no frame."""

    @property
    def pending(self) -> int:
        """Bytes kept because they may be the beginning of a frame; at most one frame's size."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Take more bytes; all frames that are complete now, in order."""
        self._buffer += data
        frames: list[Frame] = []
        start = 0
        while (found := self._next(start)) is not None:
            start, frame = found
            if frame is None:
                break
            frames.append(frame)
        del self._buffer[:start]
        return frames

    def skip(self) -> list[Frame]:
        """Give up the frame that is being waited for (its sender is silent) and look for others in it."""
        if not self._buffer:
            return []
        del self._buffer[:1]
        self.garbage += 1
        return self.feed(b"")

    def _next(self, start: int) -> tuple[int, Frame | None] | None:
        """(where to go on, frame), with frame None when more bytes are needed from there on."""
        buffer = self._buffer
        at = start
        while True:
            candidate = buffer.find(MAGIC, at)
            if candidate < 0:
                candidate = len(buffer) - (1 if buffer.endswith(MAGIC[:1]) and len(buffer) > at else 0)
                self.garbage += candidate - at
                return candidate, None
            self.garbage += candidate - at
            at = candidate
            if len(buffer) - at < HEADER.size:
                return at, None
            _, kind, zero, session, length = HEADER.unpack_from(buffer, at)
            if kind in _KNOWN_TYPES and zero == 0 and length <= MAX_PAYLOAD:
                end = at + HEADER.size + length
                if len(buffer) < end + TRAILER.size:
                    return at, None
                body = bytes(buffer[at:end])
                if zlib.crc32(body) == TRAILER.unpack_from(buffer, end)[0]:
                    return end + TRAILER.size, Frame(FrameType(kind), session, body[HEADER.size :])
            at += 1
            self.garbage += 1


def pack_map(values: Mapping[str, object]) -> bytes:
    """A MessagePack map as the payload of a request or result."""
    packed: bytes = msgpack.packb(dict(values), use_bin_type=True)
    return packed


def unpack_map(payload: bytes) -> dict[str, object]:
    """A payload that must be a MessagePack map with strings as keys. Raises `AgentError`."""
    try:
        value = msgpack.unpackb(payload, raw=False)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise AgentError("the guest's agent sent a message that is not MessagePack") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise AgentError("the guest's agent sent a message that is not a map")
    return value


@dataclass(frozen=True, slots=True)
class Hello:
    """The agent is there, and knows no session that was opened before this.

    It answers a `reset` with the reset's number, and says hello with number 0 when it has just been started.
    """

    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes of a session; no bytes mean the end of this channel. They count until `consumed` is called."""

    session: int
    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Writable:
    """The agent gave credit: the session may send again."""

    session: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The agent's result; the session is over. `error` is None if the result says ok."""

    session: int
    result: Mapping[str, object]
    error: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Violation:
    """The agent broke the rules (too much unacknowledged, not a map); its session is over."""

    session: int
    message: str


Fact = Hello | Output | Writable | Finished | Violation


@dataclass(slots=True)
class _Session:
    credit: int = WINDOW
    unacknowledged: dict[int, int] = field(default_factory=lambda: {STDOUT: 0, STDERR: 0})
    unreported: dict[int, int] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    abandoned: bool = False


class AgentMachine:
    """The host's side of one agent channel. Every method that returns bytes returns what must be sent now."""

    def __init__(self) -> None:
        self.reader = FrameReader()
        self.ready = False
        """Whether a `hello` came since the last `reset`."""
        self._sessions: dict[int, _Session] = {}
        self._last = 0
        self._resets = 0

    @property
    def sessions(self) -> frozenset[int]:
        """Sessions that have no result yet and are wanted by somebody."""
        return frozenset(number for number, session in self._sessions.items() if not session.abandoned)

    def reset(self) -> bytes:
        """Begin (again): all sessions are forgotten on both sides."""
        self.ready = False
        self._sessions.clear()
        self._resets = self._resets % 0xFFFF_FFFF + 1
        return encode(Frame(FrameType.RESET, self._resets, pack_map({})))

    def open(self, kind: FrameType, arguments: Mapping[str, object]) -> tuple[int, bytes]:
        """Begin a session with a request: (its number, bytes). Raises `AgentError` if too many are open."""
        if kind not in REQUESTS:
            raise ValueError(f"{kind.name} does not begin a session")
        if len(self._sessions) >= MAX_SESSIONS:
            raise AgentError(
                f"{MAX_SESSIONS} requests to this guest's agent are open already; wait for one to end"
            )
        frame = encode(Frame(kind, self._next_number(), pack_map(arguments)))
        self._sessions[self._last] = _Session()
        return self._last, frame

    def writable(self, session: int) -> int:
        """How many bytes may be sent to this session now; 0 if it is over."""
        known = self._sessions.get(session)
        return known.credit if known else 0

    def send(self, session: int, data: bytes) -> bytes:
        """Bytes of channel 0; at most `writable(session)`. No bytes mean the end."""
        known = self._sessions.get(session)
        if known is None:
            return b""
        if len(data) > known.credit:
            raise ValueError(f"{len(data)} bytes exceed the session's credit of {known.credit}")
        known.credit -= len(data)
        pieces = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)] or [b""]
        return b"".join(encode(Frame(FrameType.STREAM, session, bytes((STDIN,)) + piece)) for piece in pieces)

    def consumed(self, session: int, channel: int, count: int) -> bytes:
        """`count` bytes of an `Output` were passed on: give credit, in steps of a quarter of the window."""
        known = self._sessions.get(session)
        if known is None:
            return b""
        known.unacknowledged[channel] -= count
        free = known.unreported.get(channel, 0) + count
        if free < WINDOW // 4:
            known.unreported[channel] = free
            return b""
        known.unreported[channel] = 0
        return encode(Frame(FrameType.CREDIT, session, CREDIT.pack(channel, free)))

    def signal(self, session: int, number: int) -> bytes:
        """Send a signal to the session's process group."""
        if session not in self._sessions:
            return b""
        return encode(Frame(FrameType.SIGNAL, session, pack_map({"signal": number})))

    def abandon(self, session: int) -> bytes:
        """Nobody waits for this session any more: kill its program, drop its output until its result."""
        known = self._sessions.get(session)
        if known is None:
            return b""
        known.abandoned = True
        end = self.signal(session, 9)
        for channel, free in known.unreported.items():
            if free:
                end += encode(Frame(FrameType.CREDIT, session, CREDIT.pack(channel, free)))
        known.unreported.clear()
        return end

    def receive(self, data: bytes) -> tuple[list[Fact], bytes]:
        """Take bytes from the guest: (what they mean, bytes to send back)."""
        return self._taken(lambda: self.reader.feed(data))

    def skip(self) -> tuple[list[Fact], bytes]:
        """The rest of a begun frame does not come: see whether there are frames behind its beginning."""
        return self._taken(self.reader.skip)

    def _taken(self, read: Callable[[], list[Frame]]) -> tuple[list[Fact], bytes]:
        """Garbage after the hello means that a frame was lost, and nobody knows whose: a session that ends
        with an error is better than one with a hole.
        """
        garbage, was_ready = self.reader.garbage, self.ready
        frames = read()
        if not was_ready or self.reader.garbage == garbage:
            return self._handle(frames)
        lost: list[Fact] = []
        reply = b""
        for number in sorted(self.sessions):
            fact, end = self._violated(number, "bytes were lost on the line from the guest")
            lost.append(fact)
            reply += end
        facts, back = self._handle(frames)
        return lost + facts, reply + back

    def _handle(self, frames: list[Frame]) -> tuple[list[Fact], bytes]:
        facts: list[Fact] = []
        reply = bytearray()
        for frame in frames:
            if frame.type == FrameType.HELLO:
                facts += self._hello(frame)
            elif (session := self._sessions.get(frame.session)) is not None:
                fact, back = self._of_session(frame, session)
                facts += [fact] if fact is not None else []
                reply += back
        return facts, bytes(reply)

    def _hello(self, frame: Frame) -> list[Fact]:
        try:
            facts = unpack_map(frame.payload)
        except AgentError as error:
            return [Violation(0, str(error))]
        if frame.session not in (0, self._resets):
            return []
        lost: list[Fact] = []
        if frame.session == 0:
            lost = [
                Violation(number, "the guest's agent was started anew") for number in sorted(self.sessions)
            ]
            self._sessions.clear()
        self.ready = True
        return [*lost, Hello(facts)]

    def _of_session(self, frame: Frame, session: _Session) -> tuple[Fact | None, bytes]:
        number = frame.session
        match frame.type:
            case FrameType.STREAM if frame.payload:
                return self._stream(number, session, frame.payload[0], frame.payload[1:])
            case FrameType.CREDIT if len(frame.payload) == CREDIT.size:
                session.credit = min(session.credit + CREDIT.unpack(frame.payload)[1], WINDOW)
                return (None if session.abandoned else Writable(number)), b""
            case FrameType.RESULT:
                del self._sessions[number]
                return (None if session.abandoned else _finished(number, frame.payload)), b""
        return None, b""

    def _stream(self, number: int, session: _Session, channel: int, data: bytes) -> tuple[Fact | None, bytes]:
        if session.abandoned:
            if not data:
                return None, b""
            return None, encode(Frame(FrameType.CREDIT, number, CREDIT.pack(channel, len(data))))
        if channel not in (STDOUT, STDERR):
            return self._violated(number, f"the guest's agent sent bytes on channel {channel}")
        if channel in session.ended:
            return self._violated(number, f"the guest's agent sent bytes behind the end of channel {channel}")
        if not data:
            session.ended.add(channel)
        session.unacknowledged[channel] += len(data)
        if session.unacknowledged[channel] > WINDOW:
            return self._violated(number, "the guest's agent sent more than its credit allows")
        return Output(number, channel, data), b""

    def _violated(self, number: int, message: str) -> tuple[Fact, bytes]:
        end = self.abandon(number)
        return Violation(number, message), end

    def _next_number(self) -> int:
        self._last = self._last % 0xFFFF_FFFF + 1
        while self._last in self._sessions:
            self._last = self._last % 0xFFFF_FFFF + 1
        return self._last


def _finished(number: int, payload: bytes) -> Finished | Violation:
    try:
        result = unpack_map(payload)
    except AgentError as error:
        return Violation(number, str(error))
    if result.get("ok") is True:
        return Finished(number, result, None, "")
    error_code, message = result.get("error"), result.get("message")
    return Finished(
        number,
        result,
        error_code if isinstance(error_code, str) else "failed",
        message if isinstance(message, str) else "the guest's agent gave no reason",
    )
