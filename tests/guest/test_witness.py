# SPDX-License-Identifier: Apache-2.0
"""Guests that check themselves are moved again and again, in both ways of running a guest."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mobid.config import cache_directory
from tests.built import missing
from tests.guest.test_runtime import owner_of
from tests.guest.witness import (
    MOVER,
    Load,
    Witnesses,
    file_in,
    file_system_errors,
    merged_disk,
    two_peers,
)

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


@pytest.mark.parametrize(("mode", "moves"), [("seccomp", 20), ("ptrace", 5)])
async def test_a_guest_that_checks_itself_moves_without_an_error(
    tmp_path: Path, helper_binary: Path, mode: str, moves: int
) -> None:
    environment = {"MOBI_HELPER": str(helper_binary), "MOBI_GUEST_MODE": mode}
    async with two_peers(tmp_path, environment) as peers:
        witnesses = Witnesses(*peers)
        await witnesses.start(Load())
        for number in range(moves):
            record = await witnesses.move()
            assert record["ok"], record
            assert record["epoch"] == number + 2
            assert record["verified"] == "ok", record
            assert record["frames_lost"] == 0, record
            assert not await witnesses.wrong()
        await witnesses.working()
        assert not await witnesses.wrong()
        assert await mode_of(witnesses) == mode
        await file_system_is_clean(witnesses, tmp_path / "merged")


async def mode_of(witnesses: Witnesses) -> str:
    """How the kernel of the moved guest runs its programs, by the command line it was started with."""
    row = await witnesses.at.call("vm.show", {"vm": MOVER})
    shim = await owner_of(witnesses.at.socket.with_name(f"{row['id']}.shim"))
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(shim)]
    return "seccomp" if any(b"seccomp=on" in line for line in lines) else "ptrace"


def descendants(pid: int) -> list[int]:
    """All processes below this one."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [lower for child in children for lower in descendants(child)]


async def file_system_is_clean(witnesses: Witnesses, merged: Path) -> None:
    """Stop the moved guest, and check its root file system from outside."""
    peer = witnesses.at
    await witnesses.stop_witness(MOVER)
    assert (await peer.call("vm.stop", {"vm": MOVER}))["state"] == "stopped"
    (overlay,) = (peer.directory / "guests").glob("*/vdb.overlay")
    overlay = overlay.with_name("vda.overlay")
    base = cache_directory() / "images/mini/root.ext4"
    await trio.to_thread.run_sync(merged_disk, overlay, base, merged)
    assert not file_system_errors(merged)
    assert len(file_in(merged, "/root/witness")) > 0
