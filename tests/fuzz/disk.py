# SPDX-License-Identifier: Apache-2.0
"""Targets: what a replica reads from its disk after a crash, with checksums that are right.

No change that a fuzzer makes would get past a checksum, so these targets put the right one into each input
before they give it to the parser.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgpack

from mobid import store
from proto import log
from proto.api import OperationError
from proto.raft import configuration
from proto.raft.configuration import Configuration
from tests.fuzz.target import Form, examples, room, same, target
from tests.unit.test_log import file_of, writes

_HEAD = 45
"""Bytes of a record before its payload."""


def _logs() -> Iterator[bytes]:
    return (file_of(contents)[0] for contents in examples(writes, 30))


def _mended(data: bytes) -> bytes:
    """The log with right checksums in its header and in all records up to one that does not fit."""
    head = data[len(log.MAGIC) : len(log.MAGIC) + 16].ljust(16, b"\0")
    out = bytearray(log.header(*struct.unpack("<QQ", head)) + data[log.HEADER_SIZE :])
    at = log.HEADER_SIZE
    while at + _HEAD <= len(out):
        end = at + _HEAD + int.from_bytes(out[at : at + 4], "little")
        if end > len(out) or out[at + 4] == 0:  # a zero there leaves the record torn
            break
        out[at + 4 : at + 20] = log._digest(bytes(out[at + 20 : end]))
        at = end
    return bytes(out)


@target(_logs, OperationError, codes=("failed", "unsupported"))
def log_file(data: bytes) -> None:
    """The log as it is, and mended: what is read is what stands there, up to where the good data ends."""
    for content in (_mended(data), data):
        scan = log.scan(content, "log")
        firsts = [int.from_bytes(content[at + 36 : at + 44], "little") for at in scan.offsets]
        again = b"".join(log.encode(r, first) for r, first in zip(scan.records, firsts, strict=True))
        same(content[log.HEADER_SIZE : scan.end], again)
        same(log.scan(content[: scan.end], "log"), scan)


_FILES = [
    (store.BALLOT_MAGIC, store._read_ballot),
    (store.SNAPSHOT_MAGIC, store._read_snapshot),
    (store.COMMIT_MAGIC, store._read_commit),
]


def _contents() -> Iterator[bytes]:
    settled = configuration.encode(Configuration(frozenset({"a", "b"}), learners=frozenset({"c"})))
    yield b"\0" + msgpack.packb([3, "a" * 16])
    yield b"\1" + msgpack.packb([7, 3, settled, b"state"])
    yield b"\2" + (9).to_bytes(8, "little")


@target(_contents, OperationError, codes=("failed", "unsupported", "bad-argument"),
        form=Form(lambda data: [data[0] % 2, msgpack.unpackb(data[1:])],
                  lambda tree: bytes([int(tree[0]) % 2]) + msgpack.packb(tree[1])))  # fmt: skip
def store_files(data: bytes) -> None:
    """The ballot, the snapshot, the commit index: first byte which, then the content that is sealed."""
    magic, read = _FILES[data[0] % len(_FILES)] if data else _FILES[0]
    path = room() / "file"
    path.write_bytes(log.seal(magic, data[1:]))
    read(path)
