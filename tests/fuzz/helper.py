# SPDX-License-Identifier: Apache-2.0
"""The targets of the C helper (`kernel/helper/fuzz/`): how they are built, and what each of them starts from.

What an input means to a target stands at the top of its source. Numbers are little-endian there; what is
inside a packet of the tunnel is big-endian.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgpack

_ROOT = Path(__file__).parents[2]
_BUILD = _ROOT / "build" / "fuzz" / "helper"

_READ, _WRITE, _INDIRECT = 0, 2, 4
_NEXT = 1


def _memory(*chain: tuple[int, int, int], data: dict[int, bytes], indirect: bool = False) -> bytes:
    """A guest's memory (`fuzz/guest.h`) with one chain of (address, length, flags) in its queue."""
    table = b"".join(
        struct.pack("<QIHH", address, length, flags | (_NEXT if number + 1 < len(chain) else 0), number + 1)
        for number, (address, length, flags) in enumerate(chain)
    )
    memory = bytearray(0x1000)
    if indirect:
        memory[0x400 : 0x400 + len(table)] = table
        table = struct.pack("<QIHH", 0x400, len(table), _INDIRECT, 0)
    memory[: len(table)] = table
    memory[0x100:0x108] = struct.pack("<HHHH", 0, 2, 0, 0)
    for address, content in data.items():
        memory[address : address + len(content)] = content
    return bytes(memory).rstrip(b"\0")


def _virtqueue() -> Iterator[bytes]:
    turns = bytes((3, 3, 0, 3)) + bytes(12)
    chain = ((0x800, 64, _READ), (0x7FF0, 64, _WRITE), (0x100000, 512, _WRITE))
    for flags in range(4):
        yield bytes((flags,)) + turns + _memory(*chain, data={0x800: b"read"}, indirect=flags >= 2)


def _blk() -> Iterator[bytes]:
    """A read, a write, a flush, the identity, a discard, zeros."""
    ranges = struct.pack("<QII", 8, 16, 0) + struct.pack("<QII", 0, 8, 1)
    for kind, flags, length in ((0, _WRITE, 1024), (1, _READ, 4096), (4, _READ, 1), (8, _WRITE, 20),
                                (11, _READ, 16), (13, _READ, 32)):  # fmt: skip
        header = struct.pack("<IIQ", kind, 0, 8)
        parts = ((0x300, 16, _READ), (0x800, length, flags), (0x320, 1, _WRITE))
        memory = _memory(*parts, data={0x300: header, 0x800: ranges[-length:]})
        yield b"\0" + memory
        yield b"\x83" + memory


def _piece(data: bytes) -> bytes:
    return struct.pack("<H", len(data)) + data


def _vhost_user() -> Iterator[bytes]:
    def say(request: int, payload: bytes = b"", how: int = 0) -> bytes:
        return bytes((request, how)) + _piece(payload)

    table = struct.pack("<II" + 2 * "QQQQ", 2, 0, 0, 0x8000, 0, 0, 0x8000, 0x8000, 0x8000, 0x8000)
    rings = say(8, struct.pack("<II", 0, 16)) + say(10, struct.pack("<II", 0, 0))
    rings += say(9, struct.pack("<IIQQQQ", 0, 0, 0x4000, 0x4200, 0x4100, 0))
    start = say(13, bytes(8), 1) + say(12, bytes(8), 1) + say(18, struct.pack("<II", 0, 1))
    begin = say(1) + say(3) + say(2, struct.pack("<Q", 1 << 32 | 1 << 30 | 3 << 28), 32) + say(15) + say(17)
    begin += say(16, struct.pack("<Q", 1 << 3 | 1 << 9)) + say(5, table, 32 | 16 | 2)
    config = say(24, struct.pack("<III", 4, 8, 0) + bytes(8)) + say(25, struct.pack("<III", 4, 2, 0) + b"ab")
    yield begin + rings + start + say(11, struct.pack("<II", 0, 0))
    yield begin + rings + start + say(5, table, 16 | 2) + config + say(14, bytes(8), 1)
    yield begin + config


def _frames() -> Iterator[bytes]:
    """Whole frames: to all, to each guest, to one far away."""
    for to in (b"\xff" * 6, *(bytes((2, 0, 0, 0, 0, n)) for n in range(1, 5))):
        yield to + b"\2\0\0\0\0\1" + b"\x08\0" + bytes(40)


def _frame() -> Iterator[bytes]:
    for frame in _frames():
        yield bytes((0, 0, 0, 0)) + frame
        yield bytes((1, 0, 34, 6)) + frame


def _net() -> Iterator[bytes]:
    sums = struct.pack("<BBHHHH", 1, 0, 0, 0, 34, 6)
    yield b"".join(b"\0\x20" + _piece(bytes(10) + frame) for frame in _frames())
    yield b"".join(bytes((port, 10)) + _piece(sums + frame) for port in range(3) for frame in _frames())


def _tunnel() -> Iterator[bytes]:
    def packet(kind: int, plain: bytes, how: int = 0) -> bytes:
        return bytes((how, kind, 7)) + _piece(plain)

    frames = [bytes(4) + to[:11] + b"\4" + to[12:] for to in _frames()]
    yield b"".join(packet(0, frame, how) for how in (0, 1, 4, 8, 16, 32, 64) for frame in frames)
    yield b"".join(packet(1, bytes(4) + b"\2\0\0\0\0\3" + frame[4:]) for frame in frames)
    for what in range(1, 5):
        for mac, how in ((2, 16), (3, 32), (3, 0), (4, 0)):
            marker = struct.pack(">BB5sBQQ", what, 0, b"\2\0\0\0\0", mac, 2, 101)
            yield packet(2, bytes(4) + marker, how) * 2
    half = len(frames[0]) // 2
    for count, cut in ((2, half), (3, 20)):
        parts = [frames[0][at : at + cut] for at in range(0, len(frames[0]), cut)][:count]
        yield b"".join(packet(16, struct.pack(">IBBH", 9, i, count, cut) + p) for i, p in enumerate(parts))
    yield b"\2\0\0" + _piece(struct.pack(">IIQ", 7, 11, 1) + bytes(40))


def _pages() -> Iterator[bytes]:
    def record(kind: int, head: tuple[int, int, int], body: bytes, mode: int = 0) -> bytes:
        """`head` is detail, count, and region or pass."""
        return bytes((mode,)) + _piece(struct.pack("<BBHI", kind, *head) + body)

    greeting = b"\2\0\0"
    page = bytes(range(256)) * 16
    raw = record(2, (0, 1, 1), struct.pack("<I", 3) + page)
    packed = record(2, (1, 1, 2), struct.pack("<I", 5) + page, mode=3)
    zeros = record(3, (0, 2, 1), struct.pack("<IIII", 0, 2, 8, 4))
    zeros += record(3, (0, 1, 2), struct.pack("<II", 6, 3))
    passed = record(4, (0, 0, 1), struct.pack("<QQ", 1, 9))
    done = passed + record(5, (0, 0, 1), bytes(16)) + record(6, (0, 0, 0), bytes(16))
    yield greeting + packed + zeros + done
    yield greeting + raw
    yield record(1, (1, 2, 0), bytes(64)) + raw
    yield greeting + b"\1" + _piece(struct.pack("<I", 100) + bytes(100))


def _control() -> Iterator[bytes]:
    scalars = {"n": 5, "o": 2**63, "b": True, "f": None, "s": "text", "c": "two", "k": b"1234"}
    lists = {"maps": [{"n": 1, "s": "x"}, {"n": 2, "s": ""}], "numbers": [1, 9], "texts": ["a", "b"]}
    for request in ({"op": "scalars", **scalars}, {"op": "lists", **lists}, {"op": "hello"}, {"op": "quit"}):
        yield msgpack.packb({"id": 1, **request})
    yield msgpack.packb({"id": 1, "op": "scalars", "n": -1, "x": [[[1.5]]]})


def _report() -> Iterator[bytes]:
    """Booted, frozen and thawed; a freeze that failed; last words."""

    def say(what: int, kind: int, error: int = 0) -> bytes:
        return bytes((what,)) + _piece(struct.pack("<IIiI4Q80s", kind, 0, error, 0, 1, 2, 3, 4, b"text"))

    for kind in range(1, 9):
        yield say(0, 4) + say(2, kind) + say(3, kind)
    yield say(0, 4) + say(2, 3, -(2**31))


@dataclass(frozen=True)
class CTarget:
    """`start` makes the first inputs; `longest` is the largest input in bytes."""

    start: Callable[[], Iterator[bytes]]
    longest: int = 4096


C_TARGETS = {
    "blk": CTarget(_blk),
    "control": CTarget(_control),
    "frame": CTarget(_frame),
    "net": CTarget(_net),
    "pages": CTarget(_pages, 8192),  # no more, or the answers fill the socket that nobody reads
    "report": CTarget(_report),
    "tunnel": CTarget(_tunnel),
    "vhost_user": CTarget(_vhost_user),
    "virtqueue": CTarget(_virtqueue),
}


def program(name: str) -> Path:
    """The executable of a target, once it is built."""
    return _BUILD / "kernel" / "helper" / "fuzz" / f"fuzz-{name}"


def build() -> None:
    """Compile what has changed; raises `CalledProcessError` after the compiler's words."""
    tools = Path(sys.executable).parent
    if not (_BUILD / "build.ninja").is_file():
        options = ["-Dfuzz=true", "--buildtype=debugoptimized"]
        setup = [str(tools / "meson"), "setup", *options, str(_BUILD), str(_ROOT)]
        subprocess.run(setup, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"CC": "clang"})
    subprocess.run([tools / "ninja", "--quiet", "-C", _BUILD, "fuzz-targets"], check=True)
