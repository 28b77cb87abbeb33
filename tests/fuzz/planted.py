# SPDX-License-Identifier: Apache-2.0
"""A target with a mistake in it, so that the tests see that mistakes are found. Only run when named."""

from __future__ import annotations

from tests.fuzz.target import target


@target(lambda: [b"ab"], ValueError)
def planted(data: bytes) -> None:
    """A parser that believes a length."""
    if data[:1] == b"m" and data[1:2] > b"\x80":
        int(data[data[1]])  # the mistake: IndexError
    int(data)
