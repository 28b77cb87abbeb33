# SPDX-License-Identifier: Apache-2.0
"""Who shall keep the log: 1, 3 or 5 of the members, spread over sites, and as few changes as can be.

One voter serves one or two members (with two voters, either one's death would stop both), three serve three
or four, five all larger meshes. A set that works is left alone: a voter is replaced when it has left,
drains, has lost its log, or has looked dead for a while, and if somebody alive can take its place; and for
spread only if everybody concerned is alive. What looks dead is only a hint, so no step is ever taken that
depends on it being right: a change is committed by majorities of the old and of the new voters, or it does
not happen.

The leader is never simply dropped: it first hands over to another voter that stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from proto.entries import Member
from proto.raft.configuration import Configuration
from proto.raft.events import ChangeVoters, TransferTo
from proto.swim.packets import Reach


@dataclass(frozen=True, slots=True)
class Look:
    """How a member looks, since when (seconds of the own clock), and what is known of its host."""

    state: Reach
    since: float
    rtt: float | None = None
    memory_free: int | None = None


UNSEEN = Look("suspect", float("inf"))
"""A member of whom nothing was heard: not alive, and not dead since any time."""


@dataclass(frozen=True, slots=True)
class Electorate:
    """What the choice depends on. `looks` need not have everybody; the leader, `own`, is alive of course.

    `recovering`: replicas that have lost acknowledged records; `current`: those that live and have all that
    is committed; `lagging`: newcomers that did not catch up when they were tried. `dead_after` in seconds.
    """

    members: Mapping[str, Member]
    looks: Mapping[str, Look]
    configuration: Configuration
    recovering: Collection[str]
    current: Collection[str]
    lagging: Collection[str]
    own: str
    now: float
    dead_after: float

    def present(self, peer: str) -> bool:
        """Whether it is a member that has not left."""
        member = self.members.get(peer)
        return member is not None and member.status == "member"

    def alive(self, peer: str) -> bool:
        return peer == self.own or self._look(peer).state == "alive"

    def able(self, peer: str) -> bool:
        """Whether its vote can be counted on now."""
        return self.alive(peer) and peer not in self.recovering

    def dead(self, peer: str) -> bool:
        """Whether it has looked dead for so long that it should be replaced."""
        look = self._look(peer)
        return peer != self.own and look.state == "dead" and self.now - look.since >= self.dead_after

    def fit(self, peer: str) -> bool:
        """Whether it can become a voter now."""
        return self.present(peer) and self.able(peer) and peer not in self.lagging

    def flaws(self, peer: str) -> int:
        """0 for a good voter; the worse, the sooner it is replaced or dropped."""
        draining = self.present(peer) and self.members[peer].draining
        return 2 * self.dead(peer) + draining

    def spread(self, voters: Collection[str]) -> tuple[int, ...]:
        """How many voters the sites have, the fullest first; less is better."""
        return tuple(sorted(Counter(self.members[peer].site for peer in voters).values(), reverse=True))

    def distance(self, peer: str) -> float:
        rtt = self._look(peer).rtt
        return 0.0 if peer == self.own else float("inf") if rtt is None else rtt

    def _look(self, peer: str) -> Look:
        return self.looks.get(peer, UNSEEN)


def size(members: int) -> int:
    """How many voters a mesh of so many members has."""
    return 1 if members <= 2 else 3 if members <= 4 else 5


def step(electorate: Electorate) -> ChangeVoters | TransferTo | None:
    """What the leader should do next about the voters; None: nothing, or nothing that would succeed."""
    configuration = electorate.configuration
    if configuration.joint or electorate.own not in configuration.voters:
        return None
    voters = set(configuration.voters)
    wanted = choose(electorate)
    if wanted == voters and configuration.learners:
        return ChangeVoters(configuration.voters)  # what another leader began, and nobody wants any more
    if wanted == voters or not wanted:
        return None
    if electorate.own not in wanted:
        heirs = [peer for peer in voters & wanted if electorate.able(peer) and peer in electorate.current]
        if heirs:
            order = {peer: (electorate.flaws(peer), electorate.distance(peer), peer) for peer in heirs}
            return TransferTo(min(heirs, key=order.__getitem__))
        if not electorate.present(electorate.own) and voters & wanted:
            return None  # one of these takes over as soon as it can
        wanted = wanted | {electorate.own}
    if wanted == voters or not _can_commit(electorate, voters) or not _can_commit(electorate, wanted):
        return None
    return ChangeVoters(frozenset(wanted))


def _can_commit(electorate: Electorate, voters: Collection[str]) -> bool:
    return 2 * sum(electorate.able(peer) for peer in voters) > len(voters)


def choose(electorate: Electorate) -> set[str]:
    """The best set of voters that can be had now from the present one.

    One that drains is taken only if there are too few others. A voter that has lost records goes even if
    nobody replaces it: it counts again once it comes back as a learner, and until then the others are as many
    as before.
    """
    target = size(sum(electorate.present(peer) for peer in electorate.members))
    voters = electorate.configuration.voters
    chosen = {peer for peer in voters if electorate.present(peer) and peer not in electorate.recovering}
    fit = {peer for peer in electorate.members if electorate.fit(peer) and peer not in voters}
    fresh = {peer for peer in fit if not electorate.flaws(peer)}
    for peer in sorted(chosen, key=lambda peer: (-electorate.flaws(peer), peer)):
        if electorate.flaws(peer) and fresh:
            chosen.remove(peer)
            _add_best(electorate, chosen, fresh)
    draining = fit - fresh
    for newcomers in (fresh, draining):
        while len(chosen) < target and newcomers:
            _add_best(electorate, chosen, newcomers)
    while len(chosen) > target:
        chosen.remove(_most_dispensable(electorate, chosen))
    added = chosen - voters
    if len(chosen) % 2 == 0 and added and len(chosen) > len(voters):
        chosen.remove(_most_dispensable(electorate, added))
    _swap_for_spread(electorate, chosen, fresh)
    return chosen


def _add_best(electorate: Electorate, chosen: set[str], fresh: set[str]) -> None:
    """Add the newcomer that spreads best, of these the nearest."""
    best = min(fresh, key=lambda peer: (electorate.spread(chosen | {peer}), electorate.distance(peer), peer))
    fresh.remove(best)
    chosen.add(best)


def _most_dispensable(electorate: Electorate, chosen: set[str]) -> str:
    """Flawed ones first, then those that do not look alive, then a newcomer, then whose site has most."""
    voters = electorate.configuration.voters

    def order(peer: str) -> tuple[int, bool, bool, bool, tuple[int, ...], float, str]:
        return (
            -electorate.flaws(peer),
            electorate.alive(peer),
            peer in voters,
            peer == electorate.own,
            electorate.spread(chosen - {peer}),
            -electorate.distance(peer),
            peer,
        )

    return min(chosen, key=order)


def _swap_for_spread(electorate: Electorate, chosen: set[str], fresh: set[str]) -> None:
    """One swap that spreads strictly better, if every voter is alive and well; never the leader's place."""
    if not all(electorate.alive(peer) and not electorate.flaws(peer) for peer in chosen):
        return
    swaps = [
        (electorate.spread(chosen - {old} | {new}), electorate.distance(new), new, old)
        for old in sorted(chosen - {electorate.own})
        for new in sorted(fresh)
    ]
    if swaps:
        spread, _, new, old = min(swaps)
        if spread < electorate.spread(chosen):
            chosen.remove(old)
            chosen.add(new)
