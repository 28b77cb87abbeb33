# SPDX-License-Identifier: Apache-2.0
"""What a crash leaves of the files of a guest that was being removed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mobid.guest import LocalGuest, remove_rests


class Crash(BaseException):
    """The process ends here."""


def test_a_removal_that_was_cut_short_is_ended_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, guest = tmp_path / "kept", tmp_path / "495cc398"
    for directory in (kept, guest):
        directory.mkdir()
        for name in ("guest.json", "vda.overlay"):
            (directory / name).touch()

    def dies_half_way(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "guest.json").unlink()
            raise Crash

    local: Any = SimpleNamespace(directory=guest)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", dies_half_way)
        with pytest.raises(Crash):
            LocalGuest.remove_files(local)
    assert not guest.exists()
    remove_rests(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
