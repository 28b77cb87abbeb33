# SPDX-License-Identifier: Apache-2.0
"""What becomes of a peer whose machine makes a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from mobid.driver import Driver
from mobid.store import Store
from proto import messages
from proto.log import Record
from proto.raft.messages import Append


class Mistaken:
    """A machine that cannot go on."""

    def handle(self, event: Any, now: float) -> Any:
        raise LookupError("a mistake")


async def test_a_mistake_of_the_machine_ends_the_driver_and_no_record_is_logged(tmp_path: Path) -> None:
    store = Store(tmp_path / "catalog")
    driver = Driver(Mistaken(), store, lambda _peer, _data: None, lambda _effect: None)
    append = Append(1, 0, 0, (Record(1, 1, b"a key of gossip"),), 0, 1)
    with capture_logs() as logs:
        driver.receive("b" * 16, messages.encode(append))
        with trio.fail_after(5), pytest.raises(ExceptionGroup) as caught:
            await driver.run()
    store.close()
    assert caught.group_contains(LookupError, match="a mistake")
    [line] = logs
    assert "a key of gossip" not in repr(line)
    assert "Append" in repr(line)
