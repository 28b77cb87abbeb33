# SPDX-License-Identifier: Apache-2.0
"""The format of an append-only log that survives a crash at any byte.

A file begins with a magic of 16 bytes; then records follow, each

u32 length of the payload | 16 bytes BLAKE2b of all that follows | u64 term | u64 index | payload

little-endian. A crash while a record is written leaves a *torn tail*: the last record is incomplete or its
checksum is wrong, and nothing valid follows. It was never acknowledged, so it is cut off. Damage anywhere
else is a different matter: if a valid later record is found behind the bad place, records that were
acknowledged are lost, and the log is refused, naming file and offset, rather than quietly shortened.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Literal

from proto.api import OperationError

MAGIC = b"MOBITOPO LOG 1\n\0"
MAX_PAYLOAD = 4 << 20

_HEADER = struct.Struct("<I16sQQ")
_ORDER = struct.Struct("<QQ")


RecordKind = Literal["command", "config", "noop"]


@dataclass(frozen=True)
class Record:
    """One record; `index` counts from 1 without a gap, `term` never falls.

    A `command` is an encoded `entries.Proposal`, a `config` a `raft.configuration.Configuration`; a `noop`
    is empty and begins a leader's term.
    """

    term: int
    index: int
    payload: bytes
    kind: RecordKind = "command"


@dataclass(frozen=True)
class Scan:
    """What a file holds: its records, and the offset at which good data ends (write on from there)."""

    records: list[Record]
    end: int


def encode(record: Record) -> bytes:
    """The bytes to append; raises `OperationError(too-large)`."""
    if len(record.payload) > MAX_PAYLOAD:
        raise OperationError(
            "too-large",
            f"an entry of {len(record.payload)} bytes is larger than the {MAX_PAYLOAD} the log takes",
            "make it in several steps",
        )
    order = _ORDER.pack(record.term, record.index)
    return (
        _HEADER.pack(len(record.payload), _checksum(order, record.payload), record.term, record.index)
        + record.payload
    )


def _checksum(order: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(order + payload, digest_size=16, person=b"mobi-log").digest()


def scan(data: bytes, file: str) -> Scan:
    """Read a whole log; raises `OperationError(failed)` if it is damaged elsewhere than at its tail.

    `file` is only for messages. A file shorter than the magic is an empty log that was torn at its making.
    """
    if len(data) < len(MAGIC) and MAGIC.startswith(data):
        return Scan([], 0)
    if not data.startswith(MAGIC):
        raise OperationError(
            "unsupported",
            f"{file} is no log of this version: it does not begin with {MAGIC[:14].decode()!r}",
            "use the version of Mobitopolo that wrote it",
        )
    records: list[Record] = []
    offset = len(MAGIC)
    while offset < len(data):
        record = _record_at(data, offset)
        expected = records[-1].index + 1 if records else 1
        if record is None or record.index != expected or (records and record.term < records[-1].term):
            _check_torn(data, offset, expected, file)
            break
        records.append(record)
        offset += _HEADER.size + len(record.payload)
    return Scan(records, offset)


def _record_at(data: bytes, offset: int) -> Record | None:
    if offset + _HEADER.size > len(data):
        return None
    length, checksum, term, index = _HEADER.unpack_from(data, offset)
    start = offset + _HEADER.size
    if length > MAX_PAYLOAD or start + length > len(data):
        return None
    payload = data[start : start + length]
    if checksum != _checksum(_ORDER.pack(term, index), payload):
        return None
    return Record(term, index, payload)


def _check_torn(data: bytes, offset: int, expected: int, file: str) -> None:
    """Raise unless nothing valid follows `offset`.

    A valid record can only begin where its index is a plausible successor, which eight bytes tell before any
    hash is computed; so this is one pass over what is left.
    """
    for place in range(offset, len(data) - _HEADER.size + 1):
        index = int.from_bytes(data[place + 28 : place + 36], "little")
        if not expected <= index <= expected + len(data):
            continue
        record = _record_at(data, place)
        if record is not None:
            raise OperationError(
                "failed",
                f"{file} is damaged at byte {offset}: record {expected} cannot be read, "
                f"but record {record.index} follows at byte {place}",
                "restore the file from a copy, or let this peer join anew from an empty directory",
            )
