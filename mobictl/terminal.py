# SPDX-License-Identifier: Apache-2.0
"""This process's own terminal, as one end of a conversation with a guest.

Standard input is read without changing its mode of blocking, since that mode belongs to the open file,
which the shell and other programs share. Raw mode hands every key to the guest, Ctrl-C too; it is always
undone, also when the connection breaks.
"""

from __future__ import annotations

import os
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

import trio

CHUNK = 32 << 10


async def read_input(fd: int = 0) -> bytes:
    """The next bytes of standard input, empty at its end; waits for them."""
    try:
        await trio.lowlevel.wait_readable(fd)
    except OSError:
        # Regular files and /dev/null cannot be waited for: they are always ready.
        await trio.lowlevel.checkpoint()
    try:
        return os.read(fd, CHUNK)
    except OSError:
        return b""


def write_output(data: bytes, fd: int = 1) -> None:
    """Write all of it. Raises BrokenPipeError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def raw_mode(fd: int = 0) -> Iterator[None]:
    """Every key goes to the guest as it is; does nothing when the input is no terminal."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def is_terminal() -> bool:
    """Whether a person sits at both standard input and standard output."""
    return sys.stdin.isatty() and sys.stdout.isatty()
