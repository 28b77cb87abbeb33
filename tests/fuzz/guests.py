# SPDX-License-Identifier: Apache-2.0
"""Targets: what a guest sends over its serial line, and what the helper says that speaks with guests."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import msgpack

from mobid.helpers import Helper, HelperError, _Call
from proto import agent
from proto.agent import AgentMachine, Frame, FrameReader, FrameType, pack_map
from tests.fuzz.target import MESSAGEPACK, same, target

_LARGEST = agent.HEADER.size + agent.MAX_PAYLOAD + agent.TRAILER.size


def _lines() -> Iterator[bytes]:
    hello = Frame(FrameType.HELLO, 1, pack_map({"version": 1}))
    output = Frame(FrameType.STREAM, 1, b"\1hello\n")
    credit = Frame(FrameType.CREDIT, 1, agent.CREDIT.pack(0, 5000))
    end = Frame(FrameType.STREAM, 1, b"\1")
    result = Frame(FrameType.RESULT, 1, pack_map({"ok": True, "code": 0}))
    parts = [agent.encode(frame) for frame in (hello, output, credit, end, result)]
    yield b"".join(parts)
    yield b"Linux version 6\n" + b"".join(parts[:2]) + b"\xa5\x5a" + b"".join(parts[2:])
    yield from (parts[0] + part for part in parts)


def _mended(data: bytes) -> bytes:
    """The line with the right checksum behind every header whose payload is there."""
    out, at = bytearray(data), 0
    while (at := out.find(agent.MAGIC, at)) >= 0 and at + agent.HEADER.size <= len(out):
        end = at + agent.HEADER.size + int.from_bytes(out[at + 8 : at + 12], "little")
        if end + 4 <= len(out):
            struct.pack_into("<I", out, end, zlib.crc32(bytes(out[at:end])))
        at += 2
    return bytes(out)


@target(_lines)
def agent_line(data: bytes) -> None:
    """Frames are found however the line is cut; no fact has more than its window; little is kept."""
    for line in (data, _mended(data)):
        whole, cut = FrameReader(), FrameReader()
        frames = whole.feed(line)
        same([f for at in range(0, len(line), 5) for f in cut.feed(line[at : at + 5])], frames)
        same((cut.pending, cut.garbage), (whole.pending, whole.garbage))
        same(FrameReader().feed(b"".join(map(agent.encode, frames))), frames)
        assert whole.pending <= _LARGEST
        machine = AgentMachine()
        machine.reset()
        number, _ = machine.open(FrameType.EXEC, {"argv": ["true"]})
        facts = machine.receive(line)[0] + machine.skip()[0]
        output = sum(len(fact.data) for fact in facts if isinstance(fact, agent.Output))
        assert output <= 2 * agent.WINDOW
        assert machine.writable(number) <= agent.WINDOW


def _told() -> Iterator[bytes]:
    for message in ({"id": 1, "ok": True, "size": 5}, {"id": 1, "ok": False, "error": "io", "message": "x"},
                    {"event": "state", "state": "running"}):  # fmt: skip
        yield msgpack.packb(message)


@target(_told, form=MESSAGEPACK)
def helper_messages(data: bytes) -> None:
    """What a helper says, which speaks with a guest: an answer to call 1, an event, or nothing of use."""
    helper = Helper("guest", Path("control"), cast(Any, None), -1, 1)
    call = helper._calls[1] = _Call()
    helper._dispatch(data, [])
    if call.reply is not None:
        with suppress(HelperError):
            assert helper._checked("op", call.reply)["ok"] is True
