# SPDX-License-Identifier: Apache-2.0
"""The systemd user unit: right in systemd's own eyes, and it leaves the guests alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.service import install, read_unit, verify


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    install(tmp_path)
    assert verify(tmp_path) == ""


def test_only_the_peer_itself_is_ended_and_it_comes_back() -> None:
    section = read_unit()["Service"]
    assert (section["KillMode"], section["OOMPolicy"]) == ("process", "continue")
    assert (section["Restart"], section["RestartPreventExitStatus"]) == ("always", "0")
