# SPDX-License-Identifier: Apache-2.0
"""What becomes of a copy of a guest whose right to run went elsewhere while its peer was away.

It is killed, never thawed: another copy may run. What it wrote to its disks before it stood still is nowhere
else (a guest that is failed over starts from its image), so its files are kept for a while, out of the way of
everything that looks for guests. Whatever it still wrote after its lease reached only these files: the disk
processes serve the host's own overlay, and nobody else reads that.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mobid.guest import LocalGuest
from mobid.guest_record import Record
from mobid.lease import boottime

KEPT = 4
"""Stale copies that are kept at one peer; the oldest goes."""


def stood_for(local: LocalGuest) -> float:
    """Seconds since its lease ran out; 0 if it never had one, or still has."""
    return max(0.0, boottime() - local.deadline_ns / 1e9) if local.deadline_ns > 1 else 0.0


def keep_aside(directory: Path, record: Record) -> Path | None:
    """Move a guest's directory to `fenced/ID-EPOCH` beside all guests' directory; None if that failed, and
    then nothing of it is left."""
    target = directory.parent.with_name("fenced") / f"{record.id}-{record.epoch}"
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        directory.rename(target)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        return None
    target.touch()
    copies = sorted(target.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in copies[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target
