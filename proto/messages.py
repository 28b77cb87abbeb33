# SPDX-License-Identifier: Apache-2.0
"""The messages of `proto/peer_events.py` as bytes, and back.

A message is a MessagePack array: the protocol version, the name of its kind, then its fields in the order of
their dataclass. Whoever sends is a member, but may be broken or of another version, so nothing is believed:
every field has a type and a bound, records must follow one another, and what does not fit is one error,
`MessageError`, for which a receiver drops the message. Every machine bears the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_args

from proto import wire
from proto.api import OperationError
from proto.lease_events import Granted, NotGranted, Renew
from proto.log import MAX_PAYLOAD, Record, RecordKind
from proto.peer_events import Forward, Message
from proto.raft import configuration, messages

VERSION = 1

LIMIT = MAX_PAYLOAD + (512 << 10)
"""Bytes of one message: one record of any size fits, or many small ones."""

MAX_RECORDS = 16_384
MAX_PROPOSALS = 4_096
MAX_TEXT = 1_000
MAX_ID = 64
MAX_NUMBER = 2**63

_KINDS: tuple[RecordKind, ...] = get_args(RecordKind)


class MessageError(Exception):
    """The bytes are no message of this version; carries a sentence for the log."""


@dataclass(frozen=True)
class _Field:
    """How a field is written, and read from a value of unknown shape (which raises `MessageError`)."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_NUMBER:
        raise MessageError(f"{_short(value)} is no number")
    return value


def _maybe_number(value: Any) -> int | None:
    return None if value is None else _number(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise MessageError(f"{_short(value)} is no flag")
    return value


def _seconds(value: Any) -> float:
    if type(value) is not float or not 0 <= value < math.inf:
        raise MessageError(f"{_short(value)} is no time")
    return value


def _text(limit: int) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit:
            raise MessageError(f"{_short(value)} is no text of at most {limit} characters")
        return value

    return read


def _data(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise MessageError(f"{_short(value)} is no data")
    return value


def _write_records(records: tuple[Record, ...]) -> list[list[Any]]:
    return [[r.term, r.index, _KINDS.index(r.kind), r.payload] for r in records]


def _records(value: Any) -> tuple[Record, ...]:
    if not isinstance(value, list) or len(value) > MAX_RECORDS:
        raise MessageError("the records are no list, or too many")
    return tuple(_record(item) for item in value)


def _record(value: Any) -> Record:
    match value:
        case [term, index, int(kind), bytes(payload)] if 0 <= kind < len(_KINDS):
            if len(payload) > MAX_PAYLOAD:
                raise MessageError(f"a record has {len(payload)} bytes")
            return Record(_number(term), _number(index), payload, _KINDS[kind])
    raise MessageError("a record is malformed")


def _configuration(value: Any) -> configuration.Configuration:
    try:
        read = configuration.decode(_data(value))
    except OperationError as error:
        raise MessageError(error.message) from None
    for peer in read.replicas:
        _text(MAX_ID)(peer)
    return read


def _proposals(value: Any) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > MAX_PROPOSALS:
        raise MessageError("the proposals are no list, or too many")
    return tuple(_data(item) for item in value)


def _short(value: Any) -> str:
    return repr(value)[:40]


_NUMBER = _Field(_same, _number)
_MAYBE_NUMBER = _Field(_same, _maybe_number)
_FLAG = _Field(_same, _flag)
_SECONDS = _Field(float, _seconds)
_PEER = _Field(_same, _text(MAX_ID))
_TEXT = _Field(lambda text: text[:MAX_TEXT], _text(MAX_TEXT))
_DATA = _Field(_same, _data)
_RECORDS = _Field(_write_records, _records)
_CONFIGURATION = _Field(configuration.encode, _configuration)
_PROPOSALS = _Field(list, _proposals)

_SHAPES: dict[type[Any], tuple[str, tuple[_Field, ...]]] = {
    messages.AskVote: ("ask-vote", (_NUMBER, _NUMBER, _NUMBER, _FLAG, _FLAG)),
    messages.Voted: ("voted", (_NUMBER, _FLAG, _FLAG)),
    messages.Append: ("append", (_NUMBER, _NUMBER, _NUMBER, _RECORDS, _NUMBER, _NUMBER)),
    messages.Appended: ("appended", (_NUMBER, _FLAG, _NUMBER, _NUMBER, _NUMBER, _FLAG)),
    messages.SnapshotPart: (
        "snapshot",
        (_NUMBER, _NUMBER, _NUMBER, _CONFIGURATION, _NUMBER, _NUMBER, _DATA, _NUMBER),
    ),
    messages.SnapshotTaken: ("snapshot-taken", (_NUMBER, _NUMBER, _NUMBER, _NUMBER)),
    messages.Lead: ("lead", (_NUMBER,)),
    messages.AskRead: ("ask-read", (_NUMBER, _FLAG)),
    messages.Readable: ("readable", (_NUMBER, _MAYBE_NUMBER)),
    messages.Follow: ("follow", (_NUMBER, _NUMBER)),
    messages.Feed: ("feed", (_NUMBER, _PEER, _CONFIGURATION, _NUMBER, _NUMBER, _RECORDS, _NUMBER)),
    Renew: ("renew", (_NUMBER, _SECONDS)),
    Granted: ("granted", (_NUMBER, _SECONDS, _NUMBER)),
    NotGranted: ("not-granted", (_NUMBER, _TEXT)),
    Forward: ("forward", (_PROPOSALS,)),
}

_NAMES = {kind: [field.name for field in fields(kind)] for kind in _SHAPES}
_READERS = {name: (kind, shape) for kind, (name, shape) in _SHAPES.items()}


def encode(message: Message) -> bytes:
    """The bytes of a message; raises `OperationError(too-large)` beyond `LIMIT`."""
    kind, shape = _SHAPES[type(message)]
    values = [
        field.write(getattr(message, name)) for name, field in zip(_NAMES[type(message)], shape, strict=True)
    ]
    data = wire.pack([VERSION, kind, *values])
    if len(data) > LIMIT:
        raise OperationError("too-large", f"a message of {len(data)} bytes is larger than {LIMIT}")
    return data


def decode(data: bytes) -> Message:
    """The message in `data`; raises `MessageError` for anything else, and for another version."""
    if len(data) > LIMIT:
        raise MessageError(f"a message of {len(data)} bytes is larger than {LIMIT}")
    try:
        value = wire.unpack(data)
    except wire.WireError as error:
        raise MessageError(str(error)) from None
    if not isinstance(value, list) or len(value) < 2:
        raise MessageError("a message is no list of version, kind and fields")
    version, name, *values = value
    if version != VERSION:
        raise MessageError(f"a message has version {_short(version)}; this peer speaks {VERSION}")
    if not isinstance(name, str) or name not in _READERS:
        raise MessageError(f"there is no message {_short(name)}")
    kind, shape = _READERS[name]
    if len(values) != len(shape):
        raise MessageError(f"{name} has {len(values)} fields instead of {len(shape)}")
    message: Message = kind(*(field.read(one) for field, one in zip(shape, values, strict=True)))
    _check(message)
    return message


def _check(message: Message) -> None:
    """What holds between the fields of a message."""
    match message:
        case messages.Append(_, prev_index, prev_term, records) | messages.Feed(
            _, _, _, prev_index, prev_term, records
        ):
            term = prev_term
            for place, record in enumerate(records):
                if record.index != prev_index + 1 + place or record.term < term:
                    raise MessageError(f"record {record.index} does not follow record {prev_index + place}")
                term = record.term
        case messages.SnapshotPart(size=size, offset=offset, data=part):
            if offset + len(part) > size:
                raise MessageError("a part of a snapshot reaches beyond its end")
