# SPDX-License-Identifier: Apache-2.0
"""The disks of a guest: one `mobi-helper disk` process for each, and the files it serves.

`/dev/vda` is an image's read-only root with a copy-on-write overlay of the guest's own; `/dev/vdb`, if the
guest has one, is an overlay over nothing. The process outlives this peer, like the guest's shim, and is found
again by its control socket. If it dies, nothing written is lost (the overlay says what it holds), so another
one takes its place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobid.helpers import Helper, HelperError, Helpers


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What one disk is. `name` is `vda` or `vdb`; `size` in bytes, 0 for that of the base."""

    name: str
    overlay: Path
    base: Path | None = None
    size: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `guest.json`."""
        base = str(self.base) if self.base else None
        return {"name": self.name, "overlay": self.overlay.name, "base": base, "size": self.size}

    @classmethod
    def from_dict(cls, directory: Path, values: Mapping[str, Any]) -> DiskPlan:
        """The reverse of `as_dict`; raises KeyError or TypeError."""
        base = values["base"]
        overlay = directory / Path(values["overlay"]).name
        return cls(str(values["name"]), overlay, Path(base) if base else None, int(values["size"]))


@dataclass(frozen=True, slots=True)
class Share:
    """What a copy of a disk needs (`kernel/README.md` §5). The descriptors belong to whoever asked."""

    size: int
    block_size: int
    data_offset: int
    allocated_offset: int
    dirty_offset: int
    overlay_fd: int
    maps_fd: int


class Disk:
    """One running disk process."""

    def __init__(self, plan: DiskPlan, helper: Helper, socket: Path) -> None:
        self.plan = plan
        self.helper = helper
        self.socket = socket

    @classmethod
    async def start(cls, helpers: Helpers, plan: DiskPlan, sockets: Path, prefix: str, log: Path) -> Disk:
        """Start the process; its sockets are `sockets/PREFIX.NAME` and `….c`. Raises `HelperError`."""
        vhost, control = _sockets(plan, sockets, prefix)
        for path in (vhost, control):
            path.unlink(missing_ok=True)
        arguments: list[str | Path] = ["--socket", vhost, "--overlay", plan.overlay]
        if plan.base is not None:
            arguments += ["--base", plan.base]
        if plan.size:
            arguments += ["--size", str(plan.size)]
        return cls(plan, await helpers.start("disk", arguments, control=control, log=log), vhost)

    @classmethod
    async def adopt(cls, helpers: Helpers, plan: DiskPlan, sockets: Path, prefix: str) -> Disk:
        """Take over the process that an earlier peer started. Raises `HelperError`."""
        vhost, control = _sockets(plan, sockets, prefix)
        return cls(plan, await helpers.adopt(control, role="disk"), vhost)

    async def share(self) -> Share:
        """The overlay and its maps, for `pages`."""
        reply, fds = await self.helper.call("share")
        try:
            overlay_fd, maps_fd = fds
            return Share(
                size=int(reply["size"]),
                block_size=int(reply["block_size"]),
                data_offset=int(reply["data_offset"]),
                allocated_offset=int(reply["allocated_offset"]),
                dirty_offset=int(reply["dirty_offset"]),
                overlay_fd=overlay_fd,
                maps_fd=maps_fd,
            )
        except (ValueError, KeyError, TypeError) as error:
            for fd in fds:
                os.close(fd)
            raise HelperError("internal", f"the disk helper answered share with {sorted(reply)}") from error

    async def track(self, on: bool) -> None:
        """Start or stop marking written blocks."""
        await self.helper.call("track", on=on)

    async def quit(self, sync: bool = True) -> None:
        """End the process, and before that make durable what was written."""
        if sync:
            with suppress(HelperError):
                await self.helper.call("sync", timeout=30)
        await self.helper.quit()
        self.helper.forget()


def begin_afresh(plans: Iterable[DiskPlan]) -> None:
    """The disks of a guest that this peer has nothing of begin with what its image holds.

    Also those of one that is failed over to here: nothing of an earlier stay may be found in them. It is the
    one place where such a guest gets its disks.
    """
    for plan in plans:
        plan.overlay.unlink(missing_ok=True)


def _sockets(plan: DiskPlan, sockets: Path, prefix: str) -> tuple[Path, Path]:
    return sockets / f"{prefix}.{plan.name}", sockets / f"{prefix}.{plan.name}.c"
