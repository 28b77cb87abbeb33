# SPDX-License-Identifier: Apache-2.0
"""The catalog's state: what all peers agree on after so many records of the log.

States are never changed in place: `proto.catalog.apply` makes the next one, which shares all that did not
change. Whoever holds a state may keep it across an `await` and sees one consistent picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from proto.api import ErrorCode, OperationError
from proto.entries import (
    GossipKey,
    Guest,
    Lab,
    Member,
    Migration,
    Network,
    Token,
    User,
)

SESSION_WINDOW = 256
"""How many of a peer's last proposals are remembered, so that a repeated one is applied once."""

REQUESTS = 4096
"""How many of the last commands' steps are remembered at least, so that one asked again is done once."""

CLOSED_MIGRATIONS = 1000
"""How many closed handovers are kept; spent tokens are covered by the epoch beyond that."""


class Refused(OperationError):
    """An entry that cannot become true; the state is as before. Its text is for people."""


Refusal = tuple[ErrorCode, str, str]
"""The code, message and hint of an `OperationError`."""


@dataclass(frozen=True)
class Session:
    """What has been decided of one peer's proposals since its last start.

    `applied`: sequence → index at which it was decided; `refused`: of these, the ones that changed nothing,
    and why; `newest`: the largest sequence of `applied`.
    """

    boot: int = 0
    applied: Mapping[int, int] = field(default_factory=dict)
    refused: Mapping[int, Refusal] = field(default_factory=dict)
    newest: int = 0

    def floor(self) -> int:
        """Sequences up to here are forgotten and refused; a peer has far fewer outstanding at once."""
        return self.newest - SESSION_WINDOW


@dataclass(frozen=True)
class State:
    """Everything the log says, up to record `index`. Keys: peers, users and tokens by id, labs by name,
    guests by LAB/NAME, networks by LAB:NAME, migrations by id."""

    index: int = 0
    time: float = 0.0
    mesh: str = ""
    members: Mapping[str, Member] = field(default_factory=dict)
    users: Mapping[str, User] = field(default_factory=dict)
    tokens: Mapping[str, Token] = field(default_factory=dict)
    labs: Mapping[str, Lab] = field(default_factory=dict)
    guests: Mapping[str, Guest] = field(default_factory=dict)
    networks: Mapping[str, Network] = field(default_factory=dict)
    next_network: int = 1
    migrations: Mapping[str, Migration] = field(default_factory=dict)
    sessions: Mapping[str, Session] = field(default_factory=dict)
    gossip_keys: tuple[GossipKey, ...] = ()
    """The newest two, the newest last."""
    requests: Mapping[str, int] = field(default_factory=dict)
    """Step of a command (`Proposal.request`) → index at which it was applied."""

    # Looking things up as people name them.

    def find_peer(self, reference: str) -> Member:
        """The member with this name, or id, or beginning of one id; raises `OperationError`."""
        present = [member for member in self.members.values() if member.status == "member"]
        for member in present:
            if reference in (member.name, member.id):
                return member
        matches = [m for m in present if len(reference) >= 4 and m.id.startswith(reference)]
        return _only(matches, "peer", reference, [m.name for m in present], [m.name for m in matches])

    def find_guest(self, reference: str) -> Guest:
        """The guest `[LAB/]NAME`; raises `OperationError` not-found or ambiguous, with the candidates."""
        if "/" in reference:
            matches = [self.guests[reference]] if reference in self.guests else []
        else:
            matches = [guest for guest in self.guests.values() if guest.name == reference]
        return _only(matches, "guest", reference, list(self.guests), [guest.key for guest in matches])

    def find_lab(self, reference: str) -> Lab:
        """The lab of this name; raises `OperationError`."""
        matches = [self.labs[reference]] if reference in self.labs else []
        return _only(matches, "lab", reference, list(self.labs), [])

    def find_network(self, reference: str) -> Network:
        """The network or link `[LAB:]NAME`; raises `OperationError`."""
        if ":" in reference and reference in self.networks:
            return self.networks[reference]
        matches = [net for key, net in self.networks.items() if key.partition(":")[2] == reference]
        return _only(matches, "network", reference, list(self.networks), [net.key for net in matches])

    # Shorthands.

    @property
    def protocol(self) -> int:
        """The newest version of the protocol that all members speak."""
        present = [m.facts.newest_protocol for m in self.members.values() if m.status == "member"]
        return min(present, default=1)

    def peer_name(self, peer: str) -> str:
        """The name to show for a peer's id; the id itself if it is unknown."""
        member = self.members.get(peer)
        return member.name if member else peer

    def guests_of(self, peer: str) -> list[Guest]:
        """The guests that this peer (id) owns."""
        return [guest for guest in self.guests.values() if guest.owner == peer]

    def open_migration(self, guest: str) -> Migration | None:
        """The open handover of a guest (key), if there is one; there is never more than one."""
        for migration in self.migrations.values():
            if migration.guest == guest and migration.state == "open":
                return migration
        return None


ThingT = TypeVar("ThingT")


def _only(
    matches: list[ThingT], what: str, reference: str, known: Iterable[str], candidates: list[str]
) -> ThingT:
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise OperationError(
            "ambiguous",
            f"{reference!r} names several {what}s: {', '.join(sorted(candidates))}",
            "give the full name",
        )
    names = sorted(known)
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    hint = f"there are: {shown}" if names else f"there are no {what}s"
    raise OperationError("not-found", f"there is no {what} {reference!r}", hint)
