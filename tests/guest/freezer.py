# SPDX-License-Identifier: Apache-2.0
"""Processes that stand still all at one instant: a frozen cgroup, of version 1 or 2, whichever there is.

A group is made below that of this process, which is where a user may be allowed to make one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.waiting import wait_for

Version = Literal["v1", "v2"]


@dataclass(frozen=True)
class Freezer:
    """The group `base`, below which others can be made, and the file of a group that freezes it."""

    base: Path
    switch: str
    on: str
    off: str

    def trouble(self) -> str:
        """Why no group can be frozen; empty if one can."""
        trial = self.base / "mobi-trial"
        try:
            trial.mkdir()
            there = (trial / self.switch).exists()
            trial.rmdir()
        except OSError as error:
            return f"no cgroup can be made below {self.base}: {error.strerror}"
        return "" if there else f"cgroups below {self.base} have no {self.switch}"

    @contextmanager
    def frozen(self, name: str, pids: list[int]) -> Iterator[None]:
        """These processes stand still as long as the block lasts."""
        group = self.base / name
        group.mkdir()
        try:
            for pid in pids:
                with suppress(ProcessLookupError):
                    (group / "cgroup.procs").write_text(str(pid))
            (group / self.switch).write_text(self.on)
            yield
        finally:
            (group / self.switch).write_text(self.off)
            wait_for(lambda: self._removed(group))

    def _removed(self, group: Path) -> bool:
        """Move all processes back and remove the group; False while one is just ending or beginning there."""
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):
                (self.base / "cgroup.procs").write_text(pid)
        try:
            group.rmdir()
        except OSError:
            return False
        return True


def freezer(version: Version) -> Freezer | None:
    """The one of this version, None if the machine has none mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split(" ")
        if version == "v1" and kind == "cgroup" and "freezer" in options.split(","):
            return Freezer(_own(Path(place), "freezer"), "freezer.state", "FROZEN", "THAWED")
        if version == "v2" and kind == "cgroup2":
            return Freezer(_own(Path(place), ""), "cgroup.freeze", "1", "0")
    return None


def _own(mount: Path, controller: str) -> Path:
    """The group of this process in the hierarchy that has this controller; version 2 has none in its line."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return mount / path.lstrip("/")
    return mount


def unfit(version: Version) -> str:
    """Why a test of this version cannot run here; empty if it can."""
    found = freezer(version)
    return found.trouble() if found is not None else f"no freezer of cgroup {version} is mounted here"
