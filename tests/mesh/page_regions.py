# SPDX-License-Identifier: Apache-2.0
"""Regions for tests of `pages`: memory in a memfd, a disk's overlay, changed as their owners change them."""

from __future__ import annotations

import mmap
import os
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = 4096
DATA_OFFSET = 1 << 16
ALLOCATED_OFFSET = 64


def content(rng: random.Random) -> bytes:
    """A page: zeros, compressible or random."""
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(PAGE)
    if kind < 5:
        return (rng.randbytes(16) * (PAGE // 16))[:PAGE]
    return rng.randbytes(PAGE)


@dataclass
class Memory:
    """A guest's memory: a memfd with holes."""

    pages: int
    region: int = 0
    fd: int = field(init=False)

    def __post_init__(self) -> None:
        self.fd = os.memfd_create("memory", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.pages * PAGE)

    @property
    def fds(self) -> list[int]:
        return [self.fd]

    def describe(self) -> dict[str, Any]:
        return {"region": self.region, "kind": "ram", "size": self.pages * PAGE, "block_size": PAGE}

    def write(self, page: int, data: bytes) -> None:
        os.pwrite(self.fd, data, page * PAGE)

    def punch(self, page: int, count: int) -> None:
        """Gives pages back, as MADV_REMOVE does."""
        with mmap.mmap(self.fd, self.pages * PAGE) as view:
            view.madvise(mmap.MADV_REMOVE, page * PAGE, count * PAGE)

    def change(self, rng: random.Random, count: int) -> None:
        for _ in range(count):
            self.write(rng.randrange(self.pages), content(rng))

    def read(self) -> bytes:
        return os.pread(self.fd, self.pages * PAGE, 0)

    def close(self) -> None:
        os.close(self.fd)


class Disk:
    """The overlay of a disk and the maps memfd that `disk` shares."""

    def __init__(self, path: Path, pages: int, region: int = 1) -> None:
        self.pages, self.region = pages, region
        self.words = (pages + 63) // 64
        self.overlay = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.maps_fd = os.memfd_create("maps", os.MFD_CLOEXEC)
        self.dirty_offset = ALLOCATED_OFFSET + 8 * self.words
        os.ftruncate(self.maps_fd, self.dirty_offset + 8 * self.words)
        self.maps = mmap.mmap(self.maps_fd, 0)

    @property
    def fds(self) -> list[int]:
        return [self.overlay, self.maps_fd]

    def describe(self) -> dict[str, Any]:
        return {
            "region": self.region,
            "kind": "disk",
            "size": self.pages * PAGE,
            "block_size": PAGE,
            "data_offset": DATA_OFFSET,
            "allocated_offset": ALLOCATED_OFFSET,
            "dirty_offset": self.dirty_offset,
        }

    def _set(self, offset: int, page: int) -> None:
        at = offset + page // 64 * 8
        (word,) = struct.unpack_from("<Q", self.maps, at)
        struct.pack_into("<Q", self.maps, at, word | 1 << page % 64)

    def write(self, page: int, data: bytes) -> None:
        os.pwrite(self.overlay, data, DATA_OFFSET + page * PAGE)
        self._set(ALLOCATED_OFFSET, page)
        self._set(self.dirty_offset, page)

    def change(self, rng: random.Random, count: int) -> None:
        for _ in range(count):
            self.write(rng.randrange(self.pages), content(rng))

    def read(self) -> dict[int, bytes]:
        """Every allocated block."""
        blocks = {}
        for page in range(self.pages):
            (word,) = struct.unpack_from("<Q", self.maps, ALLOCATED_OFFSET + page // 64 * 8)
            if word >> page % 64 & 1:
                blocks[page] = os.pread(self.overlay, PAGE, DATA_OFFSET + page * PAGE).ljust(PAGE, b"\0")
        return blocks

    def close(self) -> None:
        self.maps.close()
        os.close(self.overlay)
        os.close(self.maps_fd)
