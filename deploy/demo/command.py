# SPDX-License-Identifier: Apache-2.0
"""The demo drives everything as a person would: by the documented commands. This module runs them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMAND_TIMEOUT = 300.0


class DemoError(Exception):
    """A step of the demo failed; the text is the command's own sentence."""


def mobictl(directory: Path, *arguments: str, timeout: float = COMMAND_TIMEOUT) -> Any:
    """Run one `mobictl --json` command and return its document.

    Raises:
        DemoError: the command failed or took longer than `timeout` seconds.
    """
    command = command_line(directory, "--json", *arguments)
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"mobictl {' '.join(arguments)} did not end within {timeout:.0f} s") from error
    if done.returncode:
        said = (done.stderr.decode(errors="replace") or done.stdout.decode(errors="replace")).strip()
        raise DemoError(f"mobictl {' '.join(arguments)}: {said or f'status {done.returncode}'}")
    return json.loads(done.stdout) if done.stdout.strip() else None


def command_line(directory: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mobictl", "--dir", str(directory), *arguments]


def in_guest(directory: Path, guest: str, *argv: str, timeout: float = COMMAND_TIMEOUT) -> str:
    """Run a program in a guest and return what it printed.

    Raises:
        DemoError: it could not be run, ended with another status than 0, or took too long.
    """
    command = command_line(directory, "vm", "exec", guest, "--", *argv)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"{argv[0]} in {guest} did not end within {timeout:.0f} s") from error
    if done.returncode:
        raise DemoError(f"{' '.join(argv)} in {guest}: status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Background:
    """A program in a guest whose output goes to a file while the demo does other things."""

    def __init__(self, directory: Path, guest: str, output: Path, *argv: str) -> None:
        self.output = output
        with output.open("wb") as out:
            self._process = subprocess.Popen(
                command_line(directory, "vm", "exec", guest, "--", *argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def lines(self) -> list[str]:
        return self.output.read_text(errors="replace").splitlines()

    def stop(self, wait: float = 10.0) -> None:
        """Interrupt it as Ctrl-C would; kill it if it does not end within `wait` seconds."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(wait)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_for(self, count: int, timeout: float) -> None:
        """Until it has printed `count` lines.

        Raises:
            DemoError: it ended or was silent for too long.
        """
        deadline = time.monotonic() + timeout
        while len(self.lines()) < count:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"{self.output.name}: expected {count} lines, got: {self.lines()[-3:]}")
            time.sleep(0.1)


@contextlib.contextmanager
def background(directory: Path, guest: str, output: Path, *argv: str) -> Iterator[Background]:
    running = Background(directory, guest, output, *argv)
    try:
        yield running
    finally:
        running.stop()
