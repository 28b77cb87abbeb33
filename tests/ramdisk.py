# SPDX-License-Identifier: Apache-2.0
"""Initial RAM disks with one program, for guests that need no image."""

from __future__ import annotations

import subprocess
from pathlib import Path


def build_ramdisk(source: Path, directory: Path, *options: str) -> Path:
    """`initrd` in `directory`, with the C program `source` as /init; `options` are more for the compiler."""
    program = directory / "init"
    command = ["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", *options]
    subprocess.run([*command, "-o", str(program), str(source)], check=True, timeout=120)
    image = directory / "initrd"
    image.write_bytes(
        _entry("dev", 0o40755)
        + _entry("dev/console", 0o20600, device=(5, 1))
        + _entry("proc", 0o40755)
        + _entry("init", 0o100755, program.read_bytes())
        + _entry("TRAILER!!!", 0)
    )
    return image


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry of a "newc" archive, as Documentation/driver-api/early-userspace/buffer-format.rst has it."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
