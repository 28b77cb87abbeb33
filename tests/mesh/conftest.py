# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests with real processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mesh.peers import mesh
from tests.switch_rig import MakeSwitch, SwitchProcess

__all__ = ["mesh"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


@pytest.fixture
def make(helper_binary: Path, socket_dir: Path, stack: ExitStack) -> MakeSwitch:
    def switch(number: int, address: str = "127.0.0.1") -> SwitchProcess:
        return stack.enter_context(SwitchProcess(helper_binary, socket_dir, number, address))

    return switch
