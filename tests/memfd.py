# SPDX-License-Identifier: Apache-2.0
"""What is in a guest's memfd: its parts that are not holes, and a plain copy of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

CHUNK = 1 << 20


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """The parts of a memfd that are not holes, as (start, end)."""
    size, at = os.fstat(fd).st_size, 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at


def copy_data(source: int, destination: int) -> int:
    """Copy all that is not a hole between memfds of the same length; returns the bytes copied."""
    copied = 0
    for start, end in data_ranges(source):
        at = start
        while at < end:
            at += os.pwrite(destination, os.pread(source, min(CHUNK, end - at), at), at)
        copied += end - start
    return copied
