# SPDX-License-Identifier: Apache-2.0
"""Targets: what clients and other peers send over TLS, and the values inside it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgpack

from mobid import mail
from proto import api, entries, messages, state_codec, wire
from proto.api import OperationError
from proto.raft import configuration
from tests.fuzz.target import MESSAGEPACK, Form, examples, same, target
from tests.unit import test_messages, test_state_codec, test_wire


def _frames() -> Iterator[bytes]:
    for message in examples(test_wire.messages):
        yield wire.encode(message)
    yield b"".join(map(wire.encode, examples(test_wire.messages, 4)))


def _framed(value: object) -> bytes:
    body: bytes = msgpack.packb(value)
    return len(body).to_bytes(4, "big") + body


def _fed(data: bytes, step: int) -> tuple[list[wire.Message], str]:
    """The messages in `data` when it comes in pieces, and what ended them."""
    decoder = wire.Decoder(wire.LIMIT_UNAUTHENTICATED)
    found: list[wire.Message] = []
    try:
        for start in range(0, len(data), step):
            for message in decoder.feed(data[start : start + step]):
                found.append(message)
    except wire.WireError as error:
        return found, str(error)
    return found, ""


@target(_frames, form=Form(lambda data: msgpack.unpackb(data[4:]), _framed))
def wire_decoder(data: bytes) -> None:
    """A stranger's bytes are messages or one `WireError`, however they are cut."""
    found, error = _fed(data, max(1, len(data)))
    same(_fed(data, 7), (found, error))
    for message in found:
        same(list(wire.Decoder().feed(wire.encode(message))), [message])


@target(lambda: map(messages.encode, examples(test_messages.any_message, 80)), messages.MessageError,
        form=MESSAGEPACK)  # fmt: skip
def peer_messages(data: bytes) -> None:
    """Raft, leases, snapshots, forwarded proposals."""
    message = messages.decode(data)
    same(messages.decode(messages.encode(message)), message)


@target(lambda: map(configuration.encode, examples(test_messages.configurations)), OperationError,
        codes=("bad-argument",), form=MESSAGEPACK)  # fmt: skip
def raft_configuration(data: bytes) -> None:
    """Who votes, as records and snapshots carry it."""
    read = configuration.decode(data)
    same(configuration.decode(configuration.encode(read)), read)


def _proposals() -> Iterator[bytes]:
    for entry in test_state_codec.POOL:
        yield entries.encode(entries.Proposal(entry=entry, client="a" * 16, sequence=3, request="key#1"))


@target(_proposals, OperationError, codes=("bad-argument", "unsupported"), form=MESSAGEPACK)
def catalog_entries(data: bytes) -> None:
    """What peers propose, and what the log holds."""
    proposal = entries.decode(data)
    same(entries.decode(entries.encode(proposal)), proposal)


def _states() -> Iterator[bytes]:
    for log in examples(test_state_codec.steps, 12):
        yield state_codec.encode(test_state_codec.replay(log, test_state_codec.FOUNDED))


@target(_states, OperationError, codes=("bad-argument", "unsupported"), form=MESSAGEPACK, longest=16384)
def catalog_snapshots(data: bytes) -> None:
    """The whole state, as a leader sends it to a peer that is behind."""
    state = state_codec.decode(data)
    same(state_codec.decode(state_codec.encode(state)), state)


_ARGUMENTS = sorted(
    (model for model in vars(api).values() if isinstance(model, type) and issubclass(model, api.Arguments)),
    key=lambda model: model.__name__,
)


def _arguments() -> Iterator[bytes]:
    for number, model in enumerate(_ARGUMENTS):
        yield msgpack.packb([number, dict.fromkeys(model.model_fields, "x")])
        yield msgpack.packb([number, dict.fromkeys(model.model_fields, 1)])


@target(_arguments, OperationError, wire.WireError, codes=("bad-argument",), form=MESSAGEPACK)
def operation_arguments(data: bytes) -> None:
    """The arguments of every operation: [number of the model, arguments]."""
    match wire.unpack(data):
        case [int(number), args]:
            model = _ARGUMENTS[number % len(_ARGUMENTS)]
            read = api.parse(model, args, "op")
            same(api.parse(model, wire.unpack(wire.pack(read.model_dump())), "op"), read)


def _letters() -> Iterator[bytes]:
    for letters in ([b""], [b"a", b"bc"], [b"x" * 300] * 3):
        yield b"".join(len(letter).to_bytes(4, "big") + letter for letter in letters)
    yield (messages.LIMIT + 1).to_bytes(4, "big")


@target(_letters)
def mail_frames(data: bytes) -> None:
    """Messages of peers behind one another: found however they are cut, or the connection is of no use."""

    def taken(step: int) -> tuple[list[bytes], bool, bytes]:
        found: list[bytes] = []
        reader: Any = SimpleNamespace(_receive=lambda _peer, letter: found.append(letter))
        buffer, well = bytearray(), True
        for start in range(0, len(data), step):
            buffer += data[start : start + step]
            if not (well := mail.Mail._split(reader, buffer, "peer")):
                return found, well, b""
        return found, well, bytes(buffer)

    found, well, rest = taken(max(1, len(data)))
    same(taken(3), (found, well, rest))
    if well:
        same(b"".join(len(letter).to_bytes(4, "big") + letter for letter in found) + rest, data)
