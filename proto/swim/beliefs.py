# SPDX-License-Identifier: Apache-2.0
"""What a member believes of the others, and how claims change it (SWIM §4.2).

A member of the catalog that nothing was ever heard of counts as alive in incarnation 0; only what differs
from that is kept, so that a large quiet mesh costs nothing.

A claim that this member itself is suspect or dead is refuted: its incarnation rises above the claimed one,
and that it is alive is spread. A dead member comes back the same way, whenever it hears what is said of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from proto.swim.agenda import Agenda
from proto.swim.awareness import Awareness
from proto.swim.broadcasts import Broadcasts
from proto.swim.events import Roster, Settings, Turned
from proto.swim.packets import Claim, Reach
from proto.swim.suspicion import Suspicion, shortest

SUSPICION = "suspicion"
"""What the agenda calls the end of a suspicion."""


@dataclass(slots=True)
class Sight:
    """How a member looks: `since` is when its state turned (own clock), `by` whose claim that was."""

    state: Reach = "alive"
    incarnation: int = 0
    since: float = 0.0
    by: str = ""
    meta: bytes = b""


UNHEARD = Sight()


class Beliefs:
    """The beliefs of the member `own`; what turns is told to `turned`, what must be told on to `news`."""

    def __init__(
        self,
        own: str,
        incarnation: int,
        settings: Settings,
        awareness: Awareness,
        agenda: Agenda,
        *,
        period: Callable[[str], float],
        turned: Callable[[Turned], None],
    ) -> None:
        """`period(peer)` is how long a probe of that peer takes at most, in seconds."""
        self.own = own
        self.incarnation = incarnation
        self.meta = b""
        self.roster = Roster()
        self.news = Broadcasts(settings.repeats)
        self.dead: dict[str, float] = {}
        """The members that look dead, and when each was last probed."""
        self._settings = settings
        self._awareness = awareness
        self._agenda = agenda
        self._period = period
        self._turned = turned
        self._sights: dict[str, Sight] = {}
        self._suspicions: dict[str, Suspicion] = {}

    def sight(self, peer: str) -> Sight:
        """How this member looks; do not change it."""
        return self._sights.get(peer, UNHEARD)

    def enrol(self, roster: Roster) -> None:
        """These are the members now; what is known of others is forgotten."""
        for peer in sorted(self.roster.known - roster.known):
            self._sights.pop(peer, None)
            self._suspicions.pop(peer, None)
            self.dead.pop(peer, None)
            self.news.forget(peer)
        self.roster = roster
        self.news.resize(len(roster.ids))

    # The own state.

    def own_claim(self) -> Claim:
        """That this member is alive, and what it tells about itself."""
        return Claim(self.own, "alive", self.incarnation, meta=self.meta)

    def renew(self, above: int = 0) -> None:
        """Begin a new incarnation, newer than `above`, and spread it."""
        self.incarnation = max(self.incarnation, above) + 1
        self.news.add(self.own_claim())

    def told_of_self(self, state: Reach, incarnation: int, meta: bytes | None = None) -> None:
        """Somebody believes this of this member; `meta` is None where nothing is said of it."""
        if state != "alive":
            if incarnation >= self.incarnation:
                self._awareness.note(1)
                self.renew(incarnation)
        elif incarnation > self.incarnation or (
            incarnation == self.incarnation and meta is not None and meta != self.meta
        ):
            # An earlier run of this peer said so, whose clock was ahead.
            self.renew(incarnation)

    # The others.

    def hear(self, claim: Claim, now: float, *, hearsay: bool = False) -> None:
        """Take a claim. `hearsay`: it is part of everything somebody knows, perhaps from a part of the mesh
        that was cut off, so that who is dead there gets the time to refute it."""
        peer, incarnation = claim.peer, claim.incarnation
        if peer == self.own:
            self.told_of_self(claim.state, incarnation, claim.meta if claim.state == "alive" else None)
            return
        if peer not in self.roster.known:
            return
        sight = self._sights.get(peer, UNHEARD)
        if claim.state == "alive":
            if incarnation > sight.incarnation:
                self._revive(peer, claim, now)
        elif incarnation >= sight.incarnation:
            if claim.state == "suspect" or (hearsay and sight.state != "dead"):
                self.suspect(peer, incarnation, claim.by, now)
            else:
                self.bury(peer, incarnation, claim.by, now)

    def _revive(self, peer: str, claim: Claim, now: float) -> None:
        sight = self._known(peer)
        sight.incarnation, sight.meta = claim.incarnation, claim.meta
        self._suspicions.pop(peer, None)
        self.news.add(claim)
        self._turn(peer, sight, "alive", "", now)

    def suspect(self, peer: str, incarnation: int, by: str, now: float) -> None:
        """`by` suspects this incarnation, which is not older than the one known."""
        sight = self._known(peer)
        same = incarnation == sight.incarnation
        suspicion = self._suspicions.get(peer)
        if same and sight.state == "dead":
            return
        if same and suspicion is not None:
            if not suspicion.confirm(by):
                return
        else:
            suspicion = self._suspicions[peer] = self._suspicion(peer, by, now)
            sight.incarnation = incarnation
            self._turn(peer, sight, "suspect", by, now)
        self._agenda.add(max(now, suspicion.deadline), SUSPICION, peer)
        self.news.add(Claim(peer, "suspect", incarnation, by))

    def _suspicion(self, peer: str, by: str, now: float) -> Suspicion:
        settings, members = self._settings, len(self.roster.ids)
        least = shortest(settings.suspicion, members, self._period(peer))
        wanted = min(settings.confirmations, members - 2)
        return Suspicion(now, by, least, settings.patience * least, wanted)

    def suspicion_ended(self, peer: str, now: float) -> None:
        """A deadline of a suspicion has come; it may have been put off or overtaken."""
        suspicion = self._suspicions.get(peer)
        if suspicion is not None and now >= suspicion.deadline:
            self.bury(peer, self.sight(peer).incarnation, self.own, now)

    def bury(self, peer: str, incarnation: int, by: str, now: float) -> None:
        """This incarnation, or an earlier one, is dead."""
        sight = self._known(peer)
        sight.incarnation = max(sight.incarnation, incarnation)
        if sight.state == "dead":
            return
        self._suspicions.pop(peer, None)
        self.news.add(Claim(peer, "dead", sight.incarnation, by))
        self._turn(peer, sight, "dead", by, now)

    def stood_still(self, seconds: float) -> None:
        """This process did not run for so long: nobody had the chance to refute anything meanwhile."""
        for peer, suspicion in self._suspicions.items():
            suspicion.begun += seconds
            self._agenda.add(suspicion.deadline, SUSPICION, peer)

    def _known(self, peer: str) -> Sight:
        sight = self._sights.get(peer)
        if sight is None:
            sight = self._sights[peer] = Sight()
        return sight

    def _turn(self, peer: str, sight: Sight, state: Reach, by: str, now: float) -> None:
        if state == "dead":
            self.dead[peer] = now
        elif sight.state == "dead":
            self.dead.pop(peer, None)
        if state != sight.state:
            sight.state, sight.since, sight.by = state, now, by
            self._turned(Turned(peer, state, now))

    def everything(self) -> Iterator[Claim]:
        """A claim for each member of which something is known, who is not alive first."""
        for peer, sight in self._sights.items():
            if sight.state != "alive":
                yield Claim(peer, sight.state, sight.incarnation, sight.by or self.own)
        yield self.own_claim()
        for peer, sight in self._sights.items():
            if sight.state == "alive":
                yield Claim(peer, "alive", sight.incarnation, meta=sight.meta)
