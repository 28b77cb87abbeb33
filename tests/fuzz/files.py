# SPDX-License-Identifier: Apache-2.0
"""Targets: the JSON files that a peer and a user keep, which somebody may have edited or cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from mobictl import credentials, doors, places
from mobid import guest_record, images, recovery
from proto.api import OperationError
from tests.fuzz.target import Form, room, target

_LOADERS: list[tuple[str, Callable[[Path], object]]] = [
    ("guest.json", guest_record.Record.load),
    ("mesh.json", lambda directory: recovery.read_known(directory / "mesh.json")),
    ("image.json", images._load),
    ("doors.json", doors.Known.load),
    ("meshes.json", lambda directory: credentials.Credentials(directory)._read()),
    (places.MANIFEST, places.load_manifest),
]


def _pages() -> Iterator[bytes]:
    disk, interface = {"name": "vda", "size": 1}, {"name": "eth0", "network": "n", "mac": "02:00:00:00:00:01"}
    times = {"heartbeat": 0.1, "election": 1.0}
    members = [{"name": "a", "address": "b", "key": "00"}]
    pages: list[object] = [
        {"format": guest_record.FORMAT, "disks": [disk], "ports": [], "interfaces": [interface]},
        {"mesh": "m", "members": [{"id": "a", "certificate": "00"}], "times": times, "voters": ["a"]},
        {"format": images.FORMAT, "name": "mini", "root_sha256": "0", "size": 0, "init": "/sbin/init"},
        {"format": doors.FORMAT, "meshes": {"m": {"members": members}}, "places": {"p": "m"}},
        {"format": credentials.FORMAT, "meshes": {"m": members}},
        {"format": places.FORMAT, "peers": [{"name": "a", "directory": "b", "listen": "c"}], "wan": ""},
    ]
    for number, page in enumerate(pages):
        yield bytes([number]) + json.dumps(page).encode()
        yield bytes([number]) + b"[" * 3000


_PAGE = Form(
    lambda data: [data[0], json.loads(data[1:])],
    lambda tree: bytes([int(tree[0]) % len(_LOADERS)]) + json.dumps(tree[1]).encode(),
)


@target(_pages, OperationError, codes=("failed", "unsupported"), form=_PAGE)
def state_files(data: bytes) -> None:
    """First byte which, then its text: it is read, or said to be of no use."""
    name, load = _LOADERS[data[0] % len(_LOADERS)] if data else _LOADERS[0]
    (room() / name).write_bytes(data[1:])
    load(room())
