# SPDX-License-Identifier: Apache-2.0
"""The peer: composes its parts, starts them in order, and ends them in the reverse order.

Each part is one object of one module that gets what it needs by constructor; no part reaches through another.
A part that works by itself has `async def run(self) -> None`, which lasts as long as the peer; one that has
something to put away has `async def close(self) -> None`. Operations are found by `@operation`.
"""

from __future__ import annotations

from mobid.catalog import Catalog
from mobid.config import Config
from mobid.events import Events
from mobid.identity import Identity
from mobid.links import Links
from mobid.operations import Operations


class Peer:
    """All parts of one running peer."""

    config: Config
    identity: Identity
    events: Events
    operations: Operations
    links: Links
    catalog: Catalog

    @property
    def id(self) -> str:
        return self.identity.id
