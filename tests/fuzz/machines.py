# SPDX-License-Identifier: Apache-2.0
"""Targets: the machines that hear what other members say, with members that say anything that can be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgpack

from proto import messages
from proto.lease_events import Granted, NotGranted, Renew
from proto.peer_events import Forward
from proto.raft import events as ev
from proto.swim import codec
from proto.wire import WireError
from tests.fuzz.target import Form, examples, target
from tests.unit import test_messages
from tests.unit.raft_scene import Scene
from tests.unit.test_gossip_wire import PACKETS
from tests.unit.test_swim import A, B, Rig


def _letters(letters: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(bytes((who % 256,)) + len(text).to_bytes(2, "big") + text for who, text in letters)


def _opened(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The [from whom 1 | length 2 | message] in an input."""
    while len(data) > 3:
        end = 3 + int.from_bytes(data[1:3], "big")
        yield data[0], data[3:end]
        data = data[end:]


@target(lambda: [_letters(enumerate(map(codec.encode, PACKETS)))], WireError)
def swim_machine(data: bytes) -> None:
    """Who seems alive: packets of two members, half a second apart."""
    rig = Rig(A, B)
    for number, letter in _opened(data):
        rig.hear((A, B)[number % 2], codec.decode(letter))
        rig.until(rig.now + 0.5)


def _raft() -> Iterator[bytes]:
    said = [messages.encode(one) for one in examples(test_messages.any_message, 60)]
    for start in range(0, len(said), 4):
        yield _letters(enumerate(said[start : start + 4]))


_LETTERS = Form(
    lambda data: [[who, msgpack.unpackb(letter)] for who, letter in _opened(data)],
    lambda tree: _letters((int(who), msgpack.packb(message)) for who, message in tree),
)


@target(_raft, messages.MessageError, form=_LETTERS)
def raft_machine(data: bytes) -> None:
    """The log: messages of another voter and of one that is none, to a follower, then to a leader."""
    for role in ("elapse 1", "campaign a"):
        scene = Scene("a b c", "d", {"a": "1 1", "b": "1 1", "c": "1"})
        scene.play(role)
        for number, letter in _opened(data):
            message = messages.decode(letter)
            if not isinstance(message, Renew | Granted | NotGranted | Forward):
                scene.feed("a", ev.Received("bcd"[number % 3], message))
