# SPDX-License-Identifier: Apache-2.0
"""Targets: what people type and the files they give: tokens, labs, WANs, quantities."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack

from mobictl.document import DocumentError, parse_document
from mobictl.labfile import parse_lab_file
from mobid.config import parse_listen
from proto import addresses, labcheck, labfields, tokens, units
from proto.api import OperationError
from proto.jsontext import parse_json
from proto.lab import dump_lab
from proto.scale import scaled
from proto.wan import WanError, parse_wan
from tests.fuzz.target import JSON, MESSAGEPACK, examples, same, target
from tests.unit import test_tokens

_EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"


def _token_bodies() -> Iterator[bytes]:
    for token in examples(test_tokens.made):
        doors = [list(door) for door in token.doors]
        yield msgpack.packb([token.id, token.secret, token.mesh, token.role, token.expires, doors])


@target(_token_bodies, OperationError, codes=("bad-argument", "unsupported", "unauthenticated"),
        form=MESSAGEPACK)  # fmt: skip
def join_tokens(data: bytes) -> None:
    """Any text; and a token with these bytes in it and the right checksum, which is no secret."""
    text = base64.urlsafe_b64encode(data + tokens._checksum(data)).decode()
    with suppress(OperationError):
        tokens.decode(data.decode(errors="surrogateescape"), now=0.0)
    token = tokens.decode(tokens.PREFIX + text)
    same(dataclasses.astuple(tokens.decode(tokens.encode(token))), dataclasses.astuple(token))


def _lab_documents() -> Iterator[bytes]:
    for path in sorted(_EXAMPLES.glob("*.yaml")):
        if "topology:" in (text := path.read_text()):
            lab, _ = parse_lab_file(text, path.name)
            yield json.dumps(dump_lab(lab)).encode()
    yield b"[" * 3000


@target(_lab_documents, labcheck.LabError, form=JSON)
def lab_texts(data: bytes) -> None:
    """A lab as it comes in `lab.up`; one that is accepted can be wired."""
    lab = labcheck.read_lab(data.decode(errors="replace"))
    same(labcheck.read_lab(labcheck.write_lab(lab)), lab)
    addresses.segments(scaled(lab).lab)


def _yaml_files(key: str) -> Callable[[], Iterator[bytes]]:
    return lambda: (path.read_bytes() for path in sorted(_EXAMPLES.glob("*.yaml")) if key in path.read_text())


@target(_yaml_files("topology:"), DocumentError)
def lab_files(data: bytes) -> None:
    """A lab file as a person writes it; what is wrong is told with its line."""
    lab, _ = parse_lab_file(data.decode(errors="replace"), "file")
    same(labcheck.parse_lab(dump_lab(lab)), lab)


@target(_yaml_files("paths:"), DocumentError, WanError)
def wan_files(data: bytes) -> None:
    """A WAN file."""
    wan = parse_wan(parse_document(data.decode(errors="replace"), "file").data)
    same(parse_wan(wan.model_dump(mode="json")), wan)
    assert all(wan.address(site) for site in wan.sites)


_QUANTITIES: list[tuple[Callable[[Any], Any], Callable[[Any], str]]] = [
    (units.parse_size, str),
    (units.parse_rate, "{}B/s".format),
    (units.parse_time, "{:.9f}s".format),
    (units.parse_percentage, lambda share: f"{share * 100:.9f}%"),
]


def _quantities() -> Iterator[bytes]:
    for text in ("64M", "1.5GiB", "100MB", "20mbit", "1.5 gbit/s", "100MB/s", "50ms", "1h", "0.1%", "µs", 5):
        yield from (json.dumps([number, text]).encode() for number in range(len(_QUANTITIES)))


@target(_quantities, units.UnitError, form=JSON)
def quantities(data: bytes) -> None:
    """[which, value]: a size, a rate, a time, a share; what is written again is read as nearly the same."""
    match _json(data):
        case [int(number), value]:
            parse, write = _QUANTITIES[number % len(_QUANTITIES)]
            read = parse(value)
            again = parse(write(read))
            assert abs(again - read) <= 1e-9 + 1e-9 * read, (value, read, again)


_FIELDS: list[Callable[[Any], Any]] = [
    labfields.parse_endpoint,
    labfields.parse_member,
    labfields.parse_subnet,
]


def _fields() -> Iterator[bytes]:
    for text in ("a:eth1", "content", "10.8.0.0/24", "fd00::/64", "10.0.0.1/24", "fe80::%1/64"):
        yield from (json.dumps([number, text]).encode() for number in range(len(_FIELDS)))


@target(_fields, ValueError, form=JSON)
def lab_fields(data: bytes) -> None:
    """[which, value]: an endpoint, a member, a subnet; the text of what was read is read as the same."""
    match _json(data):
        case [int(number), value]:
            parse = _FIELDS[number % len(_FIELDS)]
            read = parse(value)
            assert str(read)
            same(_unrefused(parse, str(read)), read)


def _unrefused(parse: Callable[[Any], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise AssertionError(f"{text!r}, which was written by the program, is refused: {error}") from error


@target(lambda: [b"127.0.0.1:7400", b"[::]:7400", b"host:99999"], OperationError, codes=("bad-argument",))
def listen_addresses(data: bytes) -> None:
    """`--listen ADDRESS:PORT`."""
    host, port = parse_listen(data.decode(errors="surrogateescape"))
    assert host
    assert 0 <= port < 1 << 16


def _json(data: bytes) -> Any:
    """The value, None if it is no JSON: then the target has nothing to do."""
    try:
        return parse_json(data)
    except ValueError:
        return None
