# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: T201 - a command whose output is its result
"""`python -m tests.sim.mutations [NAME …]`: take a protection out, and count the seeds that notice.

A simulator that finds nothing proves nothing unless it would find something. Each mutation takes one
protection away, in this process only, and the simulation of the whole mesh runs as ever.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from proto import catalog, handover, peer
from proto import handover_events as ev
from proto import peer_events as pe
from proto.coordinator import Coordinator
from proto.leases import Grantor, Holder
from proto.raft.events import Ballot, Stored
from tests.sim.disks import Disk
from tests.sim.hosts import Host
from tests.sim.mesh_world import World


@dataclass(frozen=True)
class Mutation:
    """What is taken away, where, and what stands there instead; `what` is for people."""

    what: str
    owner: Any
    name: str
    instead: Callable[..., Any]


_load = Disk.load
_granted = Holder.granted
_handle_read = peer.Peer._read
_expiry = Grantor._expiry


def _forgets_its_vote(self: Disk) -> Stored:
    stored = _load(self)
    return replace(stored, ballot=Ballot(stored.ballot.term, ""))


def _is_durable_at_once(self: Disk, data: Any, done: Callable[[], None]) -> bool:
    if data.records and data.snapshot is None and data.ballot is None:
        self._at(0.0, done)
        self._at(1.0, self._apply, data, None)
        return True
    self._apply(data, None)
    self._at(0.0, done)
    return True


def _reads_what_it_has(self: peer.Peer, whose: str, cookie: int, fresh: bool) -> None:
    if whose == "shell":
        self._out.append(pe.Readable(cookie, self.state))
    else:
        _handle_read(self, whose, cookie, fresh)


def _thaws_at_once(self: Any, event: Any, now: float) -> list[ev.Effect]:
    return [ev.Thaw(), *self._cancel(event, now)]


MUTATIONS = {
    "grantor-wait": Mutation(
        "a new coordinator does not wait out the leases of earlier ones",
        Grantor,
        "_expiry",
        lambda self, known: known.until,
    ),
    "fence-check": Mutation(
        "a coordinator calls a peer lost half a lease too early",
        Grantor,
        "_expiry",
        lambda self, known: _expiry(self, known) - 0.8,
    ),
    "lease-index": Mutation(
        "a lease counts before the log that it names is applied",
        Holder,
        "granted",
        lambda self, peer, grant, applied: _granted(self, peer, replace(grant, index=0), applied),
    ),
    "vote": Mutation(
        "a replica that restarts has forgotten whom it voted for", Disk, "load", _forgets_its_vote
    ),
    "fsync": Mutation(
        "a replica acknowledges records that are not durable", Disk, "write", _is_durable_at_once
    ),
    "read": Mutation("a read asks nobody", peer.Peer, "_read", _reads_what_it_has),
    "once": Mutation(
        "a proposal is applied as often as it is in the log",
        catalog,
        "applied_index",
        lambda state, client, boot, sequence: None,
    ),
    "shim": Mutation(
        "a shim does not look at its deadline", Host, "_check_deadline", lambda self, boot, copy: None
    ),
    "leaving": Mutation(
        "peers leave whether or not the others can decide without them",
        Coordinator,
        "_too_early",
        lambda self, proposal, view: False,
    ),
    "release": Mutation("a source thaws after a release", handover.Source, "_sent", _thaws_at_once),
}


@contextmanager
def without(name: str) -> Iterator[None]:
    """While this lasts, the protection `name` is not there."""
    mutation = MUTATIONS[name]
    with mock.patch.object(mutation.owner, mutation.name, mutation.instead):
        yield


def found_by(name: str, seeds: range) -> list[int]:
    """The seeds that notice that a protection is missing."""
    noticed: list[int] = []
    with without(name):
        for seed in seeds:
            try:
                World(seed).run()
            except Exception:  # noqa: BLE001 - a machine that raises has noticed too
                noticed.append(seed)
    return noticed


def main() -> None:
    parser = argparse.ArgumentParser(description="count the seeds that notice a missing protection")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MUTATIONS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.names or MUTATIONS:
        noticed = found_by(name, range(arguments.start, arguments.start + arguments.seeds))
        first = f", the first is {noticed[0]}" if noticed else ""
        print(f"{name}: {len(noticed)} of {arguments.seeds} seeds notice that {MUTATIONS[name].what}{first}")


if __name__ == "__main__":
    main()
