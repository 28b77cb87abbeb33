# SPDX-License-Identifier: Apache-2.0
"""A peer is held only where somebody wants it, and once."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mobid.breakpoints import Breakpoints


async def test_nothing_is_held_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOBI_BREAKPOINTS", raising=False)
    with trio.fail_after(5):
        await Breakpoints.of_environment().reached("here")
        await Breakpoints(tmp_path).reached("here")


async def test_a_place_is_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBI_BREAKPOINTS", str(tmp_path))
    places = Breakpoints.of_environment()
    (tmp_path / "here").touch()
    passed = trio.Event()

    async def go() -> None:
        await places.reached("elsewhere")
        await places.reached("here")
        passed.set()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(go)
            while not (tmp_path / "here.reached").exists():  # noqa: ASYNC110 - the file is the signal
                await trio.sleep(0.01)
            assert not passed.is_set()
            (tmp_path / "here.reached").unlink()
            await passed.wait()
        await places.reached("here")
