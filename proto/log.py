# SPDX-License-Identifier: Apache-2.0
"""The formats of what a replica keeps on disk, made to survive a crash at any byte.

The *log* begins with a header, which is written with the file as a whole:

magic of 16 bytes | u64 base index | u64 base term | 16 bytes BLAKE2b of both

The base is the last record that is not in the file any more. The records after it follow, each

u32 length of the payload | 16 bytes BLAKE2b of all that follows | u64 term | u64 index | u64 first | u8 kind
| payload

little-endian, where `first` is the index of the first record of the write it was made with. A crash during a
write leaves a *torn tail*: a record that is incomplete or has a wrong checksum, and nothing valid behind it
but records of the same write, since a disk may finish a write in any order. None of it was ever acknowledged,
so it is cut off. Damage anywhere else is a different matter: if a valid record of a later write is found
behind the bad place, or a record is missing that was known to be durable, records that were acknowledged are
lost, and the log is refused, naming file and offset, rather than quietly shortened.

A small file that is replaced as a whole is *sealed*: magic | 16 bytes BLAKE2b of the content | content.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from proto.api import OperationError

MAGIC = b"MOBITOPO LOG 2\n\0"
MAX_PAYLOAD = 4 << 20

_BASE = struct.Struct("<QQ")
_DIGEST = 16
HEADER_SIZE = len(MAGIC) + _BASE.size + _DIGEST

_RECORD = struct.Struct("<I16sQQQB")
_ORDER = struct.Struct("<QQQB")
_INDEX_AT = 28
_FIRST_AT = 36


RecordKind = Literal["command", "config", "noop"]

_KINDS: tuple[RecordKind, ...] = ("command", "config", "noop")


class DamagedError(OperationError):
    """What was durable and perhaps acknowledged cannot be read any more. The text names file and byte."""


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
    """What a log file holds. `offsets` are the places of the records; good data ends at `end`."""

    base_index: int
    base_term: int
    records: list[Record]
    offsets: list[int]
    end: int


# Writing.


def header(base_index: int, base_term: int) -> bytes:
    """The beginning of a log whose first record will be `base_index` + 1."""
    base = _BASE.pack(base_index, base_term)
    return MAGIC + base + _digest(base)


def encode(record: Record, first: int) -> bytes:
    """The bytes of a record whose write begins with record `first`; raises `OperationError(too-large)`."""
    if len(record.payload) > MAX_PAYLOAD:
        raise OperationError(
            "too-large",
            f"an entry of {len(record.payload)} bytes is larger than the {MAX_PAYLOAD} the log takes",
            "make it in several steps",
        )
    kind = _KINDS.index(record.kind)
    order = _ORDER.pack(record.term, record.index, first, kind)
    return (
        _RECORD.pack(
            len(record.payload), _digest(order + record.payload), record.term, record.index, first, kind
        )
        + record.payload
    )


def encode_all(records: Sequence[Record]) -> list[bytes]:
    """The bytes of records that are written together, one by one; raises `OperationError(too-large)`."""
    return [encode(record, records[0].index) for record in records]


def seal(magic: bytes, content: bytes) -> bytes:
    """The bytes of a file that is replaced as a whole; `magic` has 16 bytes."""
    return magic + _digest(content) + content


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST, person=b"mobi-log").digest()


# Reading.


def unseal(magic: bytes, data: bytes, file: str) -> bytes:
    """The content of a sealed file; raises `DamagedError` or `OperationError(unsupported)`."""
    _check_magic(magic, data, file)
    content = data[len(magic) + _DIGEST :]
    if _digest(content) != data[len(magic) : len(magic) + _DIGEST]:
        raise _damaged(file, len(magic), f"the checksum of its {len(content)} bytes is wrong")
    return content


def _check_magic(magic: bytes, data: bytes, file: str) -> None:
    for place, (found, wanted) in enumerate(zip(data, magic, strict=False)):
        if found != wanted:
            if data[: len(b"MOBITOPO")] == b"MOBITOPO" and data[len(magic) - 2 : len(magic)] == magic[-2:]:
                raise OperationError(
                    "unsupported",
                    f"{file} is of another version: it does not begin with {magic[:14].decode()!r}",
                    "use the version of Mobitopolo that wrote it",
                )
            raise _damaged(file, place, f"it does not begin with {magic[:14].decode()!r}")
    if len(data) < len(magic):
        raise _damaged(file, len(data), "it ends there")


def _damaged(file: str, place: int, what: str) -> DamagedError:
    return DamagedError(
        "failed",
        f"{file} is damaged at byte {place}: {what}",
        "restore the directory it is in from a copy, or let this peer join anew from an empty directory",
    )


def scan(data: bytes, file: str, durable: int = 0) -> Scan:
    """Read a whole log; raises `DamagedError` if it is damaged elsewhere than at its tail, or does not reach
    record `durable`, which was acknowledged.

    `file` is only for messages.
    """
    _check_magic(MAGIC, data, file)
    base = data[len(MAGIC) : len(MAGIC) + _BASE.size]
    if len(data) < HEADER_SIZE or _digest(base) != data[HEADER_SIZE - _DIGEST : HEADER_SIZE]:
        raise _damaged(file, min(len(data), len(MAGIC)), "its header cannot be read")
    base_index, base_term = _BASE.unpack(base)
    term = base_term
    records: list[Record] = []
    offsets: list[int] = []
    offset = HEADER_SIZE
    while offset < len(data):
        record = _record_at(data, offset)
        expected = base_index + len(records) + 1
        if record is None or record.index != expected or record.term < term:
            _check_torn(data, offset, expected, file)
            break
        records.append(record)
        offsets.append(offset)
        term = record.term
        offset += _RECORD.size + len(record.payload)
    last = base_index + len(records)
    if last < durable:
        raise _damaged(
            file, offset, f"record {last + 1} cannot be read, but those up to {durable} were committed"
        )
    return Scan(base_index, base_term, records, offsets, offset)


def _record_at(data: bytes, offset: int) -> Record | None:
    if offset + _RECORD.size > len(data):
        return None
    length, digest, term, index, first, kind = _RECORD.unpack_from(data, offset)
    start = offset + _RECORD.size
    if length > MAX_PAYLOAD or start + length > len(data) or kind >= len(_KINDS) or first > index:
        return None
    payload = data[start : start + length]
    if digest != _digest(_ORDER.pack(term, index, first, kind) + payload):
        return None
    return Record(term, index, payload, _KINDS[kind])


def _check_torn(data: bytes, offset: int, expected: int, file: str) -> None:
    """Raise unless all that is valid behind `offset` belongs to the write that was torn.

    A valid record can only begin where its index is a plausible successor, which eight bytes tell before any
    hash is computed; so this is one pass over what is left.
    """
    for place in range(offset, len(data) - _RECORD.size + 1):
        index = int.from_bytes(data[place + _INDEX_AT : place + _INDEX_AT + 8], "little")
        if not expected <= index <= expected + len(data):
            continue
        record = _record_at(data, place)
        if record is None:
            continue
        first = int.from_bytes(data[place + _FIRST_AT : place + _FIRST_AT + 8], "little")
        if first > expected or place == offset:
            raise _damaged(
                file,
                offset,
                f"record {expected} cannot be read, but record {record.index} follows at byte {place}",
            )
