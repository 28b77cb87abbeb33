# SPDX-License-Identifier: Apache-2.0
"""Framing between a client and a peer, without a socket in sight.

A frame is a big-endian u32 length and a MessagePack map. Requests carry an id chosen by the client; items,
inputs, a cancel and the one result that ends it carry the same id, so many requests share one connection.
This module turns bytes into messages and back and enforces the size limits; who owns the bytes (trio in a
peer, anything in a client, a list in a test) is not its business. Both sides use the same `Decoder`.

A stranger is given 16 KiB per frame and a shallow parser; a length beyond the limit is refused before a byte
of the body is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack

from proto.api import OperationError

LIMIT = 4 << 20
"""Largest frame body in bytes on an authenticated connection."""

LIMIT_UNAUTHENTICATED = 16 << 10
"""Largest frame body in bytes before the caller is known."""

MAX_HOPS = 3
"""A request is forwarded at most this often: a guest may move while it is under way."""

KEY_PATTERN = re.compile(r"[0-9a-f]{16,32}")
"""What the key of a command looks like."""

_HEADER = 4


class WireError(Exception):
    """The bytes are no message; the connection is of no more use. Carries a sentence for the log."""


@dataclass(frozen=True)
class Request:
    """Ask for operation `op`. `hops` counts how often a peer has passed it on. `key` (16 to 32 hex digits, or
    empty) names the command of which this is an attempt: another attempt, at any peer, carries the same."""

    id: int
    op: str
    args: dict[str, Any] = field(default_factory=dict)
    hops: int = 0
    key: str = ""


@dataclass(frozen=True)
class Item:
    """Server to client, while the request runs: progress, output, an event."""

    id: int
    item: dict[str, Any]


@dataclass(frozen=True)
class Input:
    """Client to server, while the request runs."""

    id: int
    input: dict[str, Any]


@dataclass(frozen=True)
class Cancel:
    """Client to server: end it; a result (an error) still follows."""

    id: int


@dataclass(frozen=True)
class Result:
    """Server to client: the request ended well. `remark` is for people: that the answer may be old."""

    id: int
    result: Any
    remark: str = ""


@dataclass(frozen=True)
class Failure:
    """Server to client: the request ended with an error."""

    id: int
    error: OperationError

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Failure)
            and self.id == other.id
            and self.error.as_dict() == other.error.as_dict()
        )

    def __hash__(self) -> int:
        return hash((self.id, self.error.code, self.error.message))


Message = Request | Item | Input | Cancel | Result | Failure


def pack(value: Any) -> bytes:
    """MessagePack bytes of `value`; raises `TypeError` for what MessagePack cannot say."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(data: bytes, limit: int = LIMIT) -> Any:
    """The value in `data`; raises `WireError` for anything malformed, too deep, or followed by rubbish."""
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_extension,
            timestamp=0,
            max_array_len=min(limit, 1 << 20),
            max_map_len=min(limit, 1 << 18),
        )
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        raise WireError(f"a message is no valid MessagePack: {str(error) or type(error).__name__}") from None


def _no_extension(code: int, _data: bytes) -> Any:
    raise WireError(f"a message has a MessagePack extension (type {code}), which is not used here")


def encode(message: Message, limit: int = LIMIT) -> bytes:
    """The frame of `message`; raises `OperationError(too-large)` beyond `limit` bytes."""
    body = pack(_to_map(message))
    if len(body) > limit:
        raise OperationError(
            "too-large",
            f"a message of {len(body)} bytes is larger than the {limit} bytes that fit into a frame",
            "ask for less at once",
        )
    return len(body).to_bytes(_HEADER, "big") + body


def _to_map(message: Message) -> dict[str, Any]:
    match message:
        case Request(id, op, args, hops, key):
            request: dict[str, Any] = {"id": id, "op": op, "args": args}
            if hops:
                request["hops"] = hops
            if key:
                request["key"] = key
            return request
        case Item(id, item):
            return {"id": id, "item": item}
        case Input(id, value):
            return {"id": id, "input": value}
        case Cancel(id):
            return {"id": id, "cancel": True}
        case Result(id, result, remark):
            return {"id": id, "result": result, **({"remark": remark} if remark else {})}
        case Failure(id, error):
            return {"id": id, "error": error.as_dict()}


class Decoder:
    """Bytes in, messages out. `limit` may be raised once the other side has proved who it is."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """Whether a frame has begun and not ended: an end of stream now means a truncated message."""
        return bool(self._buffer)

    def feed(self, data: bytes | bytearray) -> Iterator[Message]:
        """Take bytes, yield every message they complete; raises `WireError` and is then of no more use."""
        self._buffer += data
        while len(self._buffer) >= _HEADER:
            length = int.from_bytes(self._buffer[:_HEADER], "big")
            if length > self.limit:
                raise WireError(f"a frame of {length} bytes is larger than the {self.limit} allowed here")
            if len(self._buffer) < _HEADER + length:
                return
            body = bytes(self._buffer[_HEADER : _HEADER + length])
            del self._buffer[: _HEADER + length]
            yield _from_map(unpack(body, self.limit))


def _from_map(value: Any) -> Message:
    if not isinstance(value, dict):
        raise WireError("a message is not a map")
    keys = set(value)
    id = value.get("id")
    if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < 2**64:
        raise WireError("a message has no id, or one that is no unsigned integer")
    if "op" in keys:
        return _request(id, value)
    if len(keys) == 2:
        if isinstance(value.get("item"), dict):
            return Item(id, value["item"])
        if isinstance(value.get("input"), dict):
            return Input(id, value["input"])
        if value.get("cancel") is True:
            return Cancel(id)
        if "result" in keys:
            return Result(id, value["result"])
        if "error" in keys:
            return Failure(id, _error(value["error"]))
    if keys == {"id", "result", "remark"} and isinstance(value["remark"], str):
        return Result(id, value["result"], value["remark"])
    raise WireError("a message is neither request, item, input, cancel nor result")


def _request(id: int, value: dict[str, Any]) -> Request:
    op, args, hops, key = value["op"], value.get("args", {}), value.get("hops", 0), value.get("key", "")
    if set(value) - {"id", "op", "args", "hops", "key"}:
        raise WireError("a request has unknown keys")
    if not isinstance(op, str) or not 0 < len(op) <= 64:
        raise WireError("a request's op is no short string")
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
        raise WireError(f"the arguments of {op} are no map of names")
    if not isinstance(hops, int) or isinstance(hops, bool) or not 0 <= hops <= 255:
        raise WireError("a request's hops is no small integer")
    if not isinstance(key, str) or (key and not KEY_PATTERN.fullmatch(key)):
        raise WireError("a request's key is not 16 to 32 hex digits")
    return Request(id, op, args, hops, key)


def _error(value: Any) -> OperationError:
    if not isinstance(value, dict) or not all(
        isinstance(value.get(key), str) for key in ("code", "message", "hint")
    ):
        raise WireError("an error has not the shape {code, message, hint}")
    return OperationError(value["code"], value["message"], value["hint"])
