# SPDX-License-Identifier: Apache-2.0
"""Live migrations of real guests between real peers, and what is left when one fails at any step."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.built import missing
from tests.guest.peers import PeerProcess, eventually
from tests.guest.witness import two_peers

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

Row = dict[str, Any]

COUNTER = "while :; do echo >> /tmp/counter; sleep 0.002; done"


@pytest.fixture
async def mesh(tmp_path: Path, helper_binary: Path) -> AsyncIterator[list[PeerProcess]]:
    async with two_peers(tmp_path, {"MOBI_HELPER": str(helper_binary)}) as peers:
        yield list(peers)


async def migrate(peer: PeerProcess, name: str, to: str, **more: Any) -> Row:
    record: Row = await peer.call("vm.migrate", {"vm": name, "to": to, **more})
    return record


async def counter(peer: PeerProcess, name: str) -> int:
    code, out, err = await peer.execute(name, "sh", "-c", "wc -l < /tmp/counter")
    assert code == 0, err
    return int(out)


async def counts_beyond(peer: PeerProcess, name: str, before: int) -> None:
    """Until the guest has gone on with its work."""

    async def beyond() -> bool:
        return await counter(peer, name) > before

    await eventually(beyond)


async def where(peer: PeerProcess, name: str) -> tuple[str, str, int]:
    row = await peer.call("vm.show", {"vm": name})
    return row["peer"], row["state"], row["epoch"]


async def test_a_guest_moves_there_and_back_while_it_works(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    await tokyo.call("vm.run", {"image": "mini", "name": "one", "place": "tokyo"})
    make = "dd if=/dev/urandom of=/root/data bs=64k count=64 2>/dev/null; md5sum /root/data"
    _, checksum, _ = await tokyo.execute("one", "sh", "-c", make)
    await tokyo.execute("one", "sh", "-c", f"({COUNTER}) </dev/null >/dev/null 2>&1 & echo started")
    _, boot, _ = await tokyo.execute("one", "cat", "/proc/sys/kernel/random/boot_id")
    for number, (source, target) in enumerate([(tokyo, virginia), (virginia, tokyo)] * 2, 2):
        before = await counter(source, "one")
        record = await migrate(source, "one", target.name)
        assert record["ok"], record
        assert (record["from"], record["to"], record["epoch"]) == (source.name, target.name, number)
        assert len(record["passes"]) >= 2
        assert record["verified"] == "ok"
        assert record["downtime_ms"]["host"] > 0
        assert sum(record["parts_ms"].values()) == pytest.approx(record["downtime_ms"]["host"])
        assert record["downtime_ms"]["guest"] is not None
        assert record["downtime_ms"]["network"] is None
        assert not record["rolled_back"]
        assert await where(source, "one") == (target.name, "running", number)
        assert await counter(target, "one") >= before
        await counts_beyond(target, "one", before)
    assert (await tokyo.execute("one", "cat", "/proc/sys/kernel/random/boot_id"))[1] == boot
    assert (await tokyo.execute("one", "md5sum", "/root/data"))[1] == checksum
    assert await eventually(lambda: nothing_left(virginia))


async def nothing_left(peer: PeerProcess) -> bool:
    return not any((peer.directory / "guests").iterdir()) and not any(
        (peer.directory / "migrations").iterdir()
    )
