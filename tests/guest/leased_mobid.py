# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.guest.leased_mobid run …`: a peer whose lease is renewed as long as its process runs."""

from __future__ import annotations

import trio

from mobid import main
from mobid.lease import boottime
from mobid.peer import Peer

LEASE = 1.5
INTERVAL = 0.3


def renew_own_leases() -> None:
    """From now on every peer of this process renews its own lease."""
    compose = Peer._compose

    async def compose_and_renew(peer: Peer, nursery: trio.Nursery) -> None:
        nursery.start_soon(renew, peer)
        await compose(peer, nursery)

    Peer._compose = compose_and_renew  # type: ignore[method-assign, assignment]


async def renew(peer: Peer) -> None:
    while True:
        peer.catalog.lease.extend(boottime() + LEASE)
        await trio.sleep(INTERVAL)


if __name__ == "__main__":
    renew_own_leases()
    main.main()
