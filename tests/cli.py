# SPDX-License-Identifier: Apache-2.0
"""A person at the command line: runs `mobictl` as a process of its own and reads what it says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 90


@dataclass
class Cli:
    """A user with a home of its own and one directory of peers."""

    home: Path
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def dir(self) -> Path:
        return self.home / "mesh"

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOBI_", "XDG_"))}
        return {
            **kept,
            "PYTHONPATH": str(ROOT),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "XDG_STATE_HOME": str(self.home / "state"),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "MOBI_DIR": str(self.dir),
            **self.extra,
        }

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "mobictl", *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def __call__(self, *arguments: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        if "input" not in options:
            options["stdin"] = subprocess.DEVNULL
        done = subprocess.run(
            [sys.executable, "-m", "mobictl", *arguments],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            **options,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, f"{arguments}: {done.stdout} {done.stderr}"
        return done

    def json(self, *arguments: str, code: int = 0) -> Any:
        done = self("--json", *arguments, code=code)
        assert done.stdout.count("\n") == 1, done.stdout
        return json.loads(done.stdout)

    def error(self, *arguments: str, code: int = 1) -> Any:
        return self.json(*arguments, code=code)["error"]

    def processes(self) -> list[str]:
        """Command lines of everything that still runs for this home."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.home) in line:
                found.append(line)
        return found


def home() -> Path:
    return Path(tempfile.mkdtemp(prefix="mobi-", dir="/tmp"))


def clean(cli: Cli) -> None:
    subprocess.run(
        [sys.executable, "-m", "mobictl", "down"],
        env=cli.environment(),
        capture_output=True,
        timeout=TIMEOUT,
    )
    left = cli.processes()
    shutil.rmtree(cli.home, ignore_errors=True)
    assert not left
