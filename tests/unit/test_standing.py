# SPDX-License-Identifier: Apache-2.0
"""Whose word that one was evicted is believed."""

from __future__ import annotations

from typing import Any

import pytest

from mobid.standing import says_left
from proto.state import State

OWN = State(index=40, mesh="m" * 16)


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ({"mesh": OWN.mesh, "status": "left", "index": 41}, True),
        ({"mesh": OWN.mesh, "status": "member", "index": 41}, False),
        ({"mesh": OWN.mesh, "status": "unknown", "index": 41}, False),
        ({"mesh": "n" * 16, "status": "left", "index": 41}, False),
        # It was away itself: this peer may have left, and joined again since.
        ({"mesh": OWN.mesh, "status": "left", "index": 39}, False),
        ({"mesh": OWN.mesh, "status": "left"}, False),
        (None, False),
    ],
)
def test_only_who_knows_more_is_believed(answer: Any, left: bool) -> None:
    assert says_left(answer, OWN) is left
