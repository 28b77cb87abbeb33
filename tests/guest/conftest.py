# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that boot the real kernel: a tiny initial RAM disk, and what starts guests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.guest.uml import Boot, Guest, memory_file
from tests.ramdisk import build_ramdisk


@pytest.fixture(scope="session")
def ramdisk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initial RAM disk with `kernel_init.c` as its only program."""
    directory = tmp_path_factory.mktemp("ramdisk")
    return build_ramdisk(Path(__file__).parent / "kernel_init.c", directory, "-pthread")


@pytest.fixture
def boot_kernel(guest_kernel: Path, ramdisk: Path) -> Iterator[Boot]:
    """Start a guest, or with `resume=True` a process that waits for one; all end with the test."""
    with ExitStack() as stack:

        def start(*, options: tuple[str, ...] | list[str] = (), **arguments: Any) -> Guest:
            memory = stack.enter_context(memory_file())
            command = [*options, f"initrd={ramdisk}", "root=/dev/ram0"]
            return stack.enter_context(Guest(guest_kernel, memory, options=command, **arguments))

        yield start
