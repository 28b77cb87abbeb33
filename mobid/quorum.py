# SPDX-License-Identifier: Apache-2.0
"""Who decides in the mesh, as seen from one peer: the coordinator, the voters, and which of them are missing.

A voter is missing when nothing was heard of it for a while and the membership does not see it alive, or when
it has left. That is a view and proves nothing; it serves to tell people why nothing can be decided, and
whom to start again, as soon as that is likely instead of at the end of every wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mobid.lease import boottime
from mobid.mail import FAREWELL
from proto import entries
from proto.api import OperationError
from proto.raft.configuration import Configuration
from proto.raft.events import Role
from proto.state import State
from proto.swim.packets import Reach

SILENT_AFTER = 3.0
"""A voter not heard for so long, and three election times, does not answer."""


@dataclass(frozen=True)
class Leadership:
    """Who coordinates, as far as this peer knows. `since` is seconds since 1970."""

    role: Role = "observer"
    term: int = 0
    leader: str = ""
    since: float = 0.0


class Knowledge(Protocol):
    """What the peer knows of the mesh; `mobid.catalog.Catalog` is it."""

    @property
    def state(self) -> State: ...

    @property
    def leadership(self) -> Leadership: ...

    @property
    def configuration(self) -> Configuration: ...

    @property
    def recovering(self) -> bool: ...


class Quorum:
    """Whom the peer `own` has heard, and what follows. `election` is Raft's timeout in seconds."""

    def __init__(self, known: Knowledge, own: str, election: float) -> None:
        self._known = known
        self._own = own
        self._patience = SILENT_AFTER + 3 * election
        self._begun = boottime()
        self._heard: dict[str, float] = {}
        self._looks: dict[str, Reach] = {}
        self._left: dict[str, float] = {}

    # What is seen.

    def heard(self, peer: str) -> None:
        """Something has just come from a member."""
        self._heard[peer] = boottime()

    def sight(self, peer: str, looks: Reach) -> None:
        """How a member looks to the membership."""
        self._looks[peer] = looks
        if looks == "alive":
            self.heard(peer)

    def note_who_left(self, before: State, after: State) -> None:
        """The members have changed."""
        for peer, member in after.members.items():
            known = before.members.get(peer)
            if member.status == "left" and known is not None and known.status == "member":
                self._left[peer] = boottime()

    def is_spoken_to(self, member: entries.Member) -> bool:
        """Whether messages still go to it: one that has just left is told so."""
        return member.status != "left" or boottime() <= self._left.get(member.id, 0.0) + FAREWELL

    # What follows.

    @property
    def voters(self) -> frozenset[str]:
        """The ids of those who vote, by the newest configuration known here."""
        return self._known.configuration.deciding

    def missing(self) -> dict[str, float]:
        """The voters that do not answer, and for how many seconds they have been silent. One that has left
        the mesh will not answer any more, whenever it was last heard."""
        now = boottime()
        found = {}
        for peer in self.voters - {self._own}:
            silence = now - self._heard.get(peer, self._begun)
            member = self._known.state.members.get(peer)
            left = member is not None and member.status == "left"
            if left or (self._looks.get(peer) != "alive" and silence > self._patience):
                found[peer] = silence
        return found

    def dispensable(self, peer: str) -> bool:
        """Whether the mesh could decide without this peer, if it were gone now."""
        settled = self._known.configuration
        return settled.quorum(settled.deciding - self.missing().keys() - {peer})

    def heirs(self) -> list[str]:
        """The other voters that answer; those that are being drained come last."""
        return sorted(self.voters - self.missing().keys() - {self._own}, key=self._drains)

    def _drains(self, peer: str) -> bool:
        member = self._known.state.members.get(peer)
        return member is not None and member.draining

    def no_leader(self) -> OperationError:
        """Why there is no coordinator, in words; `no-leader` while there may soon be one."""
        if not self.voters:
            return OperationError(
                "no-leader",
                "no coordinator: this peer has no catalog yet and none of the members it knows has answered",
                "start the peers of the mesh, or mend the network between them",
            )
        return self._no_majority() or OperationError(
            "no-leader", "no coordinator right now: one is being elected", "try again"
        )

    def _no_majority(self) -> OperationError | None:
        """That too many voters are missing for a decision, if it is so as far as this peer sees."""
        voters, missing, decides = self.voters, self.missing(), self._known.configuration.quorum
        lost = voters & {self._own} if self._known.recovering else frozenset[str]()
        there = voters - missing.keys() - lost
        if not voters or decides(there):
            return None
        why = {peer: f"silent for {silence:.0f} s" for peer, silence in missing.items()}
        why |= dict.fromkeys(lost, "this peer, which has lost its log and must not vote as it is")
        name = self._known.state.peer_name
        names = ", ".join(sorted(f"{name(peer)} ({reason})" for peer, reason in why.items()))
        hint = "start the missing peers again, or mend the network to them; what is there goes on as it is"
        if lost and not decides(voters - lost):
            hint = (
                "the others cannot decide without this peer: restore its catalog from a copy, or found a new "
                "mesh in an empty --dir"
            )
        message = f"no coordinator: {len(there)} of {len(voters)} voters answer; missing: {names}"
        return OperationError("no-majority", message, hint)

    def hopeless(self) -> OperationError | None:
        """Why there is no use in waiting for a decision; None if there may be.

        A coordinator that answers is hope enough: it may hear voters that this peer does not.
        """
        role, leader = self._known.leadership.role, self._known.leadership.leader
        if role == "leader" or not self.voters or (leader and leader not in self.missing()):
            return None
        return self._no_majority()
