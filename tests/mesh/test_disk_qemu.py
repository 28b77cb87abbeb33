# SPDX-License-Identifier: Apache-2.0
"""The disk under a virtual machine monitor and a driver that nobody here wrote: QEMU and SeaBIOS.

QEMU (emulating the processor, so it runs anywhere) is the front end, the BIOS's virtio-blk driver the guest.
The BIOS boots the first sector of our disk, which reads the second one, adds one to its first byte, writes it
as the third, and ends QEMU with a status that says whether the BIOS was content.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helperclient import HelperProcess
from tests.vhost import BlockDriver, FrontEnd

SECTOR = 512
PACKET = 0x7C40
"""Where the BIOS's packet with the address of a transfer is in memory: at 0x40 of the boot sector."""

DONE, FAILED = 0x10, 0x11

PROGRAM = bytes.fromhex(
    "31c0 8ed8 8ec0"  # xor ax, ax; mov ds, ax; mov es, ax
    "be407c b442 cd13 7217"  # mov si, PACKET; mov ah, 0x42 (read); int 0x13; jc failed
    "fe060080"  # inc byte [0x8000]
    "c606487c02"  # mov byte [PACKET + 8], 2
    "be407c b80043 cd13 7204"  # mov si, PACKET; mov ax, 0x4300 (write); int 0x13; jc failed
    "b010 e6f4"  # mov al, DONE; out 0xf4, al
    "b011 e6f4 f4"  # failed: mov al, FAILED; out 0xf4, al; hlt
)
# 16 bytes long, 1 sector, to or from 0000:8000, from sector 1 on.
TRANSFER = bytes.fromhex("1000 0100 0080 0000 0100000000000000")


def boot_sector() -> bytes:
    code = PROGRAM.ljust(PACKET - 0x7C00, b"\0") + TRANSFER
    return code.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def test_bios_boots_from_the_disk(helper_binary: Path, socket_dir: Path, tmp_path: Path) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is missing (apt-get install qemu-system-x86)")
    data = bytes(range(256)) * 2
    base = tmp_path / "base"
    base.write_bytes((boot_sector() + data).ljust(1 << 20, b"\0"))
    disk = ("--socket", socket_dir / "blk", "--base", base, "--overlay", tmp_path / "overlay")
    command = [qemu, "-nodefaults", "-display", "none", "-no-reboot", "-m", "64"]
    command += ["-machine", "q35,accel=tcg,memory-backend=memory"]
    command += ["-object", "memory-backend-memfd,id=memory,size=64M,share=on"]
    command += ["-chardev", f"socket,id=disk,path={socket_dir / 'blk'}"]
    command += ["-device", "vhost-user-blk-pci,chardev=disk,bootindex=0"]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    with HelperProcess(helper_binary, "disk", *disk, control=socket_dir / "control") as process:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == DONE << 1 | 1, done.stderr
        assert process.status()["writes"] == 1
        with FrontEnd(socket_dir / "blk") as vm:
            assert BlockDriver(vm).read(2 * SECTOR, SECTOR) == b"\1" + data[1:]
