# SPDX-License-Identifier: Apache-2.0
"""Versions of the protocol, so that a mesh can be upgraded one peer after the other.

A peer speaks a range of versions. Two that talk agree on the highest that both speak, by TLS's own means
(ALPN, RFC 7301). The catalog is read by all, so what is written into it follows the *lowest* of the members'
newest versions: a kind of entry that came with version 2 is first used when the last peer of version 1 has
been upgraded. From then on no peer comes in that would not understand it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from proto.api import OperationError
from proto.entries import Batch, Entry
from proto.state import State

OLDEST: Final = 1
NEWEST: Final = 1

INTRODUCED: Final[Mapping[str, int]] = {}
"""Kind of entry → version with which it came; those that are not listed have been there from the first."""


def names(oldest: int = OLDEST, newest: int = NEWEST) -> list[str]:
    """The names of these versions in a TLS handshake, the best first."""
    return [f"mobi/{version}" for version in range(newest, oldest - 1, -1)]


def check_entry(state: State, entry: Entry, introduced: Mapping[str, int] = INTRODUCED) -> None:
    """Raise `OperationError(unsupported)` if not all members would understand this entry."""
    parts = entry.entries if isinstance(entry, Batch) else (entry,)
    for part in parts:
        kind = str(getattr(part, "kind", ""))
        needed = introduced.get(kind, OLDEST)
        late = [
            member.name
            for member in state.members.values()
            if member.status == "member" and member.facts.newest_protocol < needed
        ]
        if late:
            raise OperationError(
                "unsupported",
                f"{kind} needs version {needed} of the protocol, too new for {', '.join(sorted(late))}",
                "upgrade every peer of the mesh first",
            )
