# SPDX-License-Identifier: Apache-2.0
"""What a coordinator takes into the log: proposals of everybody, each only once if it can be helped.

A proposal gets its time here (`Proposal.time`, which never goes back). One that is on its way through the log
already, or was decided before, is not appended again; that is only thrift, for the catalog would apply it
once all the same. What is under way is bounded; a proposal that finds no room is dropped and will be sent
again by its proposer.

The coordinator's own decisions have no client. They carry its term and a number instead, by which it knows
them when they come back from the log; nobody sends them twice.
"""

from __future__ import annotations

from collections.abc import Iterable

from proto import entries
from proto.catalog import Refused, applied_index
from proto.entries import Entry, Proposal
from proto.state import State

MOST = 4096
MOST_BYTES = 16 << 20
"""Proposals under way at once."""

_Name = tuple[str, int, int]


class Intake:
    """The proposals under way of one term of this peer's leadership."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._number = 0
        self._time = 0.0
        self._under_way: dict[_Name, bytes] = {}
        self._proposals: dict[bytes, Proposal] = {}
        self._leaving: dict[_Name, set[str]] = {}
        """The peers that proposals under way remove, of those that do."""
        self._bytes = 0

    def take(self, proposals: Iterable[Proposal], state: State, wall: float) -> tuple[bytes, ...]:
        """The payloads to append for those that are new; `wall` in seconds since 1970."""
        payloads: list[bytes] = []
        for proposal in proposals:
            full = len(self._under_way) >= MOST or self._bytes >= MOST_BYTES
            if not full and _name(proposal) not in self._under_way and _undecided(state, proposal):
                payloads.append(self._stamped(proposal, state, wall))
        return tuple(payloads)

    def decide(self, entry: Entry, state: State, wall: float) -> tuple[int, bytes]:
        """A decision of the coordinator itself: its number, and the payload to append."""
        self._number += 1
        proposal = Proposal.model_validate({"entry": entry, "boot": self._term, "sequence": self._number})
        return self._number, self._stamped(proposal, state, wall)

    def own_number(self, proposal: Proposal) -> int | None:
        """The number of a decision of this coordinator in this term; None if it is somebody else's."""
        return proposal.sequence if not proposal.client and proposal.boot == self._term else None

    def proposal_of(self, payload: bytes) -> Proposal | None:
        """The proposal that this payload was made of, if it was made here; it is under way no more."""
        proposal = self._proposals.pop(payload, None)
        if proposal is not None:
            self._bytes -= len(payload)
            self._under_way.pop(_name(proposal), None)
            self._leaving.pop(_name(proposal), None)
        return proposal

    def leaving(self) -> set[str]:
        """The peers whose removal is under way."""
        return set().union(*self._leaving.values())

    def _stamped(self, proposal: Proposal, state: State, wall: float) -> bytes:
        self._time = max(self._time, state.time, wall)
        proposal = proposal.model_copy(update={"time": self._time})
        payload = entries.encode(proposal)
        self._under_way[_name(proposal)] = payload
        self._proposals[payload] = proposal
        if leaving := entries.removed_peers(proposal.entry):
            self._leaving[_name(proposal)] = leaving
        self._bytes += len(payload)
        return payload


def _name(proposal: Proposal) -> _Name:
    return proposal.client, proposal.boot, proposal.sequence


def _undecided(state: State, proposal: Proposal) -> bool:
    try:
        return applied_index(state, proposal.client, proposal.boot, proposal.sequence) is None
    except Refused:
        return False
