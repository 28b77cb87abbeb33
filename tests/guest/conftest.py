# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that boot real guests: the kernel, and a tiny initial ramdisk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.guest.uml import Boot, Guest, memory_file

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def kernel() -> Path:
    """The guest kernel: `$MOBI_KERNEL`, else what `kernel/uml/build.py` made; skips if there is none."""
    wanted = os.environ.get("MOBI_KERNEL")
    if wanted:
        return Path(wanted)
    script = REPOSITORY / "kernel/uml/build.py"
    found = subprocess.run(
        [sys.executable, str(script), "--print-path"], capture_output=True, text=True, check=False, timeout=30
    )
    if found.returncode:
        pytest.skip("the guest kernel is not built (kernel/uml/build.py)")
    return Path(found.stdout.splitlines()[-1])


def cpio_entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry of a "newc" archive, as Documentation/driver-api/early-userspace/buffer-format.rst has it."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


@pytest.fixture(scope="session")
def ramdisk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initial ramdisk with `kernel_init.c` as its only program."""
    directory = tmp_path_factory.mktemp("ramdisk")
    program = directory / "init"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", str(program)]
    subprocess.run([*command, str(HERE / "kernel_init.c")], check=True, timeout=120)
    archive = cpio_entry("dev", 0o40755) + cpio_entry("proc", 0o40755)
    archive += cpio_entry("dev/console", 0o20600, device=(5, 1))
    archive += cpio_entry("init", 0o100755, program.read_bytes())
    archive += cpio_entry("TRAILER!!!", 0)
    image = directory / "initrd"
    image.write_bytes(archive)
    return image


@pytest.fixture
def boot_kernel(kernel: Path, ramdisk: Path) -> Iterator[Boot]:
    """Start a guest, or with `resume=True` a process that waits for one; all end with the test."""
    with ExitStack() as stack:

        def start(*, options: tuple[str, ...] | list[str] = (), **arguments: Any) -> Guest:
            memory = stack.enter_context(memory_file())
            command = [*options, f"initrd={ramdisk}", "root=/dev/ram0"]
            return stack.enter_context(Guest(kernel, memory, options=command, **arguments))

        yield start
