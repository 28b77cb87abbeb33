# SPDX-License-Identifier: Apache-2.0
"""Whatever fails in the middle of a migration, one copy of the guest runs in the end, and the right one.

These are the cases in which the rules of the handover differ; `make faults B=migration` tries all of them.
"""

from __future__ import annotations

import pytest

from tests.built import missing
from tests.guest.faults import Case, laboratory

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

BEFORE_THE_RELEASE = (
    Case("prepared", "destination"),
    Case("first pass", "connection"),
    Case("first pass", "source"),
    Case("later pass", "destination pages"),
    Case("before the freeze", "source"),
    Case("before the freeze", "source pages"),
    Case("frozen", "source"),
    Case("frozen", "connection"),
)
AFTER_THE_RELEASE = (
    Case("releasing", "connection"),
    Case("releasing", "destination pages"),
    Case("released", "destination"),
    Case("released", "source"),
    Case("running", "destination"),
    Case("running", "source pages"),
    Case("done", "destination"),
    Case("durable", "source"),
)


@pytest.mark.parametrize(
    "cases", [BEFORE_THE_RELEASE, AFTER_THE_RELEASE], ids=["before the release", "after the release"]
)
async def test_one_copy_runs_and_the_right_one(cases: tuple[Case, ...]) -> None:
    """The guest is moved from where the case before left it, so both peers are source and destination."""
    async with laboratory() as room:
        for case in cases:
            await room.try_out(case)
