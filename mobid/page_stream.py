# SPDX-License-Identifier: Apache-2.0
"""One end of a migration's stream: a `pages` process, and what of a guest it moves.

What travels is a list of *regions*: the guest's memory, then the overlay of each of its disks. Both ends make
the same list from their own processes, and `pages` compares them before a byte of either moves. The process
ends with this peer, unless a release is under way (`kernel/README.md` §6).
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobid.guest import LocalGuest
from mobid.helpers import Helper, HelperError, Helpers

PAGE = 4096
CONNECT_TIMEOUT = 30.0
PASS_TIMEOUT = 24 * 3600.0
"""A pass is ended by a broken stream or a cancel, not by this."""
FINAL_TIMEOUT = 60.0
VERIFY_TIMEOUT = 600.0


@dataclass
class Regions:
    """The layout that `pages` is told, and the descriptors that go with it (ours until `close`)."""

    layout: list[dict[str, Any]]
    fds: list[int]

    @property
    def sizes(self) -> list[int]:
        return [int(region["size"]) for region in self.layout]

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


async def regions_of(local: LocalGuest, memory: int | None = None) -> Regions:
    """The regions of a guest; `memory` gives an empty memory the length of the source's.

    Raises `HelperError`.
    """
    if local.shim is None:
        raise HelperError("gone", f"{local.record.key} has no shim")
    arguments: dict[str, Any] = {} if memory is None else {"size": memory}
    reply, fds = await local.shim.call("memory", **arguments)
    regions = Regions([], fds)
    try:
        regions.layout.append({"region": 0, "kind": "ram", "size": int(reply["size"]), "block_size": PAGE})
        for number, disk in enumerate(local.disks, 1):
            share = await disk.share()
            regions.fds += [share.overlay_fd, share.maps_fd]
            regions.layout.append(
                {
                    "region": number,
                    "kind": "disk",
                    "size": share.size,
                    "block_size": share.block_size,
                    "data_offset": share.data_offset,
                    "allocated_offset": share.allocated_offset,
                    "dirty_offset": share.dirty_offset,
                }
            )
    except BaseException:
        regions.close()
        raise
    return regions


class PageStream:
    """A running `pages` process with its connection."""

    def __init__(self, helper: Helper, control: Path) -> None:
        self.helper = helper
        self._control = control

    @classmethod
    async def start(cls, helpers: Helpers, control: Path, log: Path) -> PageStream:
        """Start the process; raises `HelperError`."""
        control.unlink(missing_ok=True)
        return cls(await helpers.start("pages", [], control=control, log=log), control)

    async def connect(
        self,
        way: Literal["send", "receive"],
        connection: socket.socket,
        *,
        migration: str,
        key: bytes,
        regions: Regions,
        bandwidth: int = 0,
    ) -> None:
        """Give it the socket, and return once both ends agree on the regions.

        Takes over `connection` and closes `regions`. Raises `HelperError`.
        """
        more = {"bandwidth": bandwidth} if way == "send" else {}
        with connection:
            try:
                await self.helper.call(
                    way,
                    [connection.fileno(), *regions.fds],
                    timeout=CONNECT_TIMEOUT,
                    migration=bytes.fromhex(migration),
                    key=key,
                    regions=regions.layout,
                    **more,
                )
            finally:
                regions.close()

    async def run_pass(self) -> dict[str, Any]:
        """One pass, until the receiver has it; raises `HelperError`."""
        reply, _ = await self.helper.call("pass", timeout=PASS_TIMEOUT)
        return reply

    async def final(self) -> dict[str, Any]:
        """The last difference, root and release of a frozen guest in one go.

        The reply's `released` tells what became of it. Raises `HelperError`: code `gone` or `timeout` if
        nobody knows, any other if nothing was released.
        """
        reply, _ = await self.helper.call("final", timeout=FINAL_TIMEOUT, release=True)
        return reply

    async def verify(self) -> bool:
        """Hash what is there in full, and compare with the last root; raises `HelperError`."""
        reply, _ = await self.helper.call("verify", timeout=VERIFY_TIMEOUT)
        return bool(reply["match"])

    async def cancel(self) -> bool:
        """Close the stream; False if a release was first."""
        try:
            await self.helper.call("cancel")
        except HelperError as error:
            return error.code != "bad-state"
        return True

    async def events(self, *names: str) -> AsyncIterator[dict[str, Any]]:
        """Events of these kinds, until the process or the connection to it ends."""
        async for event in self.helper.events:
            if event.get("event") in names:
                yield event

    async def close(self) -> None:
        """End the process."""
        with suppress(HelperError):
            await self.helper.quit()
        self.helper.forget()
        self._control.unlink(missing_ok=True)


def changed_bytes(done: dict[str, Any]) -> int:
    """Bytes of pages and blocks that a pass found changed."""
    return int(done["ram_bytes"]) + int(done["disk_bytes"])


def pass_record(
    done: dict[str, Any], before: Sequence[dict[str, Any]], bandwidth_seen: float
) -> dict[str, Any]:
    """A pass as in `vm migrate --json`: bytes, seconds, bytes/s. The first pass has no dirty rate."""
    rate = changed_bytes(done) / max(before[-1]["duration"], 1e-6) if before else None
    return {
        "ram_pages": done["ram_pages"],
        "ram_bytes": done["ram_bytes"],
        "disk_bytes": done["disk_bytes"],
        "sent_bytes": done["sent_bytes"],
        "duration": done["duration"],
        "dirty_rate": rate,
        "bandwidth": bandwidth_seen,
    }
