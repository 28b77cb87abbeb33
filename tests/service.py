# SPDX-License-Identifier: Apache-2.0
"""The user unit `deploy/systemd/mobid.service`, and what the service manager would do with it.

A machine for tests has no user manager, so the unit's own words are carried out here: its command with its
specifiers and its environment file, SIGTERM or SIGKILL to the main process alone (`KillMode=process`), and a
new start after whatever the unit counts as an end that nobody asked for.
"""

from __future__ import annotations

import configparser
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNIT = ROOT / "deploy" / "systemd" / "mobid.service"
END_TIMEOUT = 30


def read_unit() -> configparser.ConfigParser:
    """The unit's sections."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read(UNIT)
    return parser


def install(home: Path, options: str = "") -> None:
    """What README.md tells: the program in `~/.local/bin`, its options in `~/.config/mobitopolo`."""
    program = home / ".local" / "bin" / "mobid"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m mobid "$@"\n')
    program.chmod(0o755)
    settings = home / ".config" / "mobitopolo" / "mobid.env"
    settings.parent.mkdir(parents=True)
    settings.write_text(f'MOBID_OPTIONS="{options}"\n')


class Service:
    """The unit, started for the user with this home."""

    def __init__(self, home: Path, environment: Mapping[str, str]) -> None:
        self._section = read_unit()["Service"]
        self._specifiers = {"%h": str(home), "%E": str(home / ".config")}
        self._environment = {**environment, "HOME": str(home)}
        self._process: subprocess.Popen[bytes] | None = None
        self.log = home / "service.log"

    def _expanded(self, text: str) -> str:
        for specifier, value in self._specifiers.items():
            text = text.replace(specifier, value)
        return text

    def _settings(self) -> dict[str, str]:
        path = self._expanded(self._section["EnvironmentFile"]).removeprefix("-")
        found = (line.partition("=") for line in Path(path).read_text().splitlines())
        return {name: shlex.split(value)[0] for name, _, value in found if value not in ("", '""')}

    def start(self) -> None:
        """Run `ExecStart`."""
        command = self._expanded(self._section["ExecStart"]).split()
        words: list[str] = []
        for word in command:
            name = word.removeprefix("$")
            words += self._settings().get(name, "").split() if word.startswith("$") else [word]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    def end(self, number: signal.Signals) -> bool:
        """A signal to what `KillMode` names, the main process; whether it is then started again."""
        assert self._section["KillMode"] == "process"
        assert self._process is not None
        self._process.send_signal(number)
        code = self._process.wait(END_TIMEOUT)
        asked_for = str(code) in self._section["RestartPreventExitStatus"].split()
        if self._section["Restart"] == "always" and not asked_for:
            self.start()
            return True
        return False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid


def verify(home: Path) -> str:
    """What `systemd-analyze verify` says against the unit; nothing if it is right."""
    environment = {**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    command = ["systemd-analyze", "verify", "--user", "--man=no", str(UNIT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.stderr + (f"status {done.returncode}" if done.returncode else "")
