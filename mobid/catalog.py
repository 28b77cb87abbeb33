# SPDX-License-Identifier: Apache-2.0
"""The catalog of a live peer: the log on disk, the state it makes, and how others get both.

One peer, the coordinator, appends; an entry is answered only after fsync. The other members follow: they
stream the records they lack, append them to a log of their own and apply them, so that every peer can
answer from its own state and starts with it. What a peer proposes goes to the coordinator, with a sequence
number, so that a proposal whose answer was lost can be sent again and is applied once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from proto.entries import Entry, Proposal
from proto.state import State


class Catalog:
    """The one object through which everything shared is read and changed."""

    @property
    def state(self) -> State:
        """What this peer knows by now; a value that never changes under its reader."""
        raise NotImplementedError

    async def propose(self, entry: Entry, timeout: float = 10.0) -> int:
        """Make `entry` true in the mesh; returns its index once it is durable *and applied here*.

        Raises `OperationError`: `Refused` if it contradicts the state, `no-leader` or `timeout` if the
        coordinator did not answer (then it may still become true).
        """
        raise NotImplementedError

    async def wait(self, predicate: Callable[[State], bool], timeout: float | None = None) -> State:
        """The first state, from now on, for which `predicate` holds; raises `OperationError(timeout)`."""
        raise NotImplementedError

    def changes(self, after: int | None = None) -> AsyncIterator[tuple[int, Proposal, State]]:
        """Every entry applied after index `after` (default: now), with the state it led to, for ever.

        A slow reader loses nothing; refused entries are left out. Leave the loop by cancellation.
        """
        raise NotImplementedError
