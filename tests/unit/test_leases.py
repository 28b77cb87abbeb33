# SPDX-License-Identifier: Apache-2.0
"""Leases: a holder never believes longer than its grantor, whatever the clocks, the network and pauses do."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.lease_events import Deadline, Granted, NotGranted, PeerFound, PeerLost, Renew
from proto.leases import AskFresh, Grantor, Holder
from proto.machine import Send, WakeAt

D, DRIFT, MARGIN = 1.5, 0.01, 0.15
ENOUGH = D * (1 + DRIFT) + MARGIN


def grantor(now: float = 0.0, quiet: float = 0.0, term: int = 1, **leases: float) -> Grantor:
    made = Grantor(term, quiet, DRIFT, MARGIN, now)
    made.members(leases or {"p": D}, (), now)
    made.settle(now)
    return made


def messages(effects: list[Any]) -> list[Any]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def lost(effects: list[Any]) -> list[str]:
    return [effect.peer for effect in effects if isinstance(effect, PeerLost)]


def grant(to: Grantor, number: int, now: float, index: int = 7, duration: float = D) -> list[Any]:
    assert to.renew("p", Renew(number, duration)) == [AskFresh()]
    return to.read(index, now)


# The holder.


def holder() -> tuple[Holder, int]:
    made = Holder(D, random.Random(1))
    effects = made.follow("c", 10.0)
    send, wake = effects
    assert isinstance(send, Send)
    assert wake == WakeAt("lease", 10.0 + D / 5)
    return made, send.message.number


def test_a_lease_counts_from_sending_and_once_the_log_is_applied() -> None:
    made, number = holder()
    assert made.granted("c", Granted(number, D, 5), applied=4) == []
    assert made.applied(4) == []
    assert made.applied(5) == [Deadline(11.5)]
    assert made.deadline == 11.5


def test_answers_that_were_not_asked_for_are_of_no_meaning() -> None:
    made, number = holder()
    assert made.granted("c", Granted(number + 1, D, 0), 9) == []
    assert made.granted("other", Granted(number, D, 0), 9) == []
    assert made.granted("c", Granted(number, 100.0, 0), 9) == [Deadline(11.5)]
    assert made.granted("c", Granted(number, D, 0), 9) == []


def test_a_restarted_holder_takes_no_answer_meant_for_its_earlier_life() -> None:
    _, number = holder()
    again = Holder(D, random.Random(2))
    again.follow("c", 50.0)
    assert again.granted("c", Granted(number, D, 0), 9) == []


def test_a_new_or_lost_coordinator_changes_nothing_in_what_is_held() -> None:
    made, number = holder()
    made.granted("c", Granted(number, D, 0), 0)
    assert made.follow("", 11.0) == []
    assert made.renew(11.1) == []
    (send, _) = made.follow("d", 11.2)
    assert isinstance(send, Send)
    assert send.peer == "d"
    assert send.message.number > number
    assert made.deadline == 11.5


def test_the_deadline_never_goes_back() -> None:
    made, first = holder()
    (send, _) = made.renew(10.3)
    assert isinstance(send, Send)
    assert made.granted("c", Granted(send.message.number, D, 0), 0) == [Deadline(11.8)]
    assert made.granted("c", Granted(first, D, 0), 0) == []
    assert made.deadline == 11.8


def test_who_cannot_apply_the_log_asks_no_more_until_it_can() -> None:
    made, number = holder()
    assert made.granted("c", Granted(number, D, index=9), applied=8) == []
    wake = WakeAt("lease", 11.0 + D / 5)
    assert wake in (asked := made.renew(11.0))
    assert len(asked) == 2, "the grant may count yet"
    stands_still = 10.0 + D
    assert made.renew(stands_still) == [WakeAt("lease", stands_still + D / 5)]
    assert made.applied(9) == [Deadline(10.0 + D)]
    assert len(made.renew(stands_still + D / 5)) == 2


def test_what_a_holder_remembers_is_bounded() -> None:
    made, first = holder()
    for at in range(100):
        made.renew(20.0 + at)
    assert len(made._sent) == 16
    assert made.granted("c", Granted(first, D, 0), 0) == []


# The grantor.


def test_a_grant_follows_a_read_begun_after_the_request_and_reads_are_shared() -> None:
    made = grantor(p=D, q=D, r=D)
    assert made.renew("p", Renew(1, D)) == [AskFresh()]
    assert made.renew("q", Renew(5, D)) == []
    assert made.renew("r", Renew(9, 0.5)) == []
    effects = made.read(3, 1.0)
    assert messages(effects) == [Granted(1, D, 3)]
    assert effects[-1] == AskFresh()
    assert messages(made.read(4, 1.1)) == [Granted(5, D, 4), Granted(9, 0.5, 4)]


def test_nobody_gets_more_than_the_log_allows_him() -> None:
    assert messages(grant(grantor(), 1, 0.0, duration=60.0)) == [Granted(1, D, 7)]
    made = Grantor(1, 0.0, DRIFT, MARGIN, 0.0)
    made.members({"p": 0.0, "q": D}, {"q"}, 0.0)
    made.settle(0.0)
    for peer in ("p", "q", "stranger"):
        assert isinstance(messages(made.renew(peer, Renew(1, D)))[0], NotGranted)


def test_a_failed_read_grants_nothing() -> None:
    made = grantor()
    made.renew("p", Renew(1, D))
    assert isinstance(messages(made.read(None, 0.5))[0], NotGranted)
    assert made.renew("p", Renew(2, D)) == [AskFresh()]


def test_a_peer_is_lost_when_its_lease_is_out_by_every_clock_and_found_at_the_next_grant() -> None:
    made = grantor()
    grant(made, 1, 1.0)
    assert made.holds("p", 1.0)
    assert made.woken(ENOUGH) == [WakeAt("grants", 1.0 + ENOUGH)]
    assert not made.out("p", 1.0 + ENOUGH - 0.001)
    assert lost(made.woken(1.0 + ENOUGH)) == ["p"]
    assert lost(made.woken(1.5 + ENOUGH)) == []
    assert lost(made.woken(2.0 + ENOUGH)) == ["p"]
    assert not made.holds("p", 2.0 + ENOUGH)
    assert PeerFound("p") in grant(made, 2, 6.0)
    assert not made.out("p", 6.0)
    assert PeerFound("p") not in grant(made, 3, 6.1)


def test_a_new_grantor_waits_for_what_an_earlier_one_may_have_granted() -> None:
    made = grantor(now=100.0, quiet=1.0)
    assert not made.out("p", 99.0 + ENOUGH - 0.001)
    assert made.out("p", 99.0 + ENOUGH)
    long_quiet = grantor(now=100.0, quiet=50.0)
    assert long_quiet.out("p", 100.0)


def test_before_the_log_is_known_nobody_is_lost_and_a_lease_found_in_it_counts_from_the_start() -> None:
    made = Grantor(1, 0.0, DRIFT, MARGIN, 0.0)
    made.members({"p": D}, (), 0.0)
    assert not made.out("p", 60.0)
    made.members({"p": 10.0}, (), 2.0)
    made.settle(2.0)
    assert not made.out("p", 10 * (1 + DRIFT) + MARGIN - 0.001)
    assert made.out("p", 10 * (1 + DRIFT) + MARGIN)


def test_a_timer_of_an_earlier_leadership_wakes_nobody_again_and_again() -> None:
    made = Grantor(2, 0.0, DRIFT, MARGIN, 100.0)
    made.members({"p": D}, (), 100.0)
    assert made.woken(100.0 + 2 * ENOUGH) == []
    assert any(isinstance(effect, WakeAt) for effect in made.settle(100.0 + 2 * ENOUGH))


def test_a_lost_peer_whose_longest_lease_grows_is_named_again_only_when_that_is_out() -> None:
    made = grantor()
    assert lost(made.woken(ENOUGH)) == ["p"]
    made.members({"p": 10 * D}, (), ENOUGH)
    late = ENOUGH + 2.0
    (wake,) = made.woken(late)
    assert isinstance(wake, WakeAt)
    assert wake.at == pytest.approx(10 * D * (1 + DRIFT) + MARGIN)


def test_one_that_leaves_before_it_ever_had_a_lease_is_lost() -> None:
    one = Grantor(1, 0.0, 0.01, MARGIN, 0.0)
    one.members({"v": 0.0}, (), 0.0)
    one.settle(0.0)
    assert not lost(one.woken(5.0))
    one.members({"v": 0.0}, {"v"}, 10.0)
    assert not lost(one.woken(10.0))
    assert lost(one.woken(10.0 + MARGIN)) == ["v"]
    assert one.out("v", 10.0 + MARGIN)


def test_a_newcomer_has_time_to_ask() -> None:
    made = grantor()
    made.members({"p": D, "new": D}, (), 50.0)
    assert not made.out("new", 51.0)
    assert made.out("new", 50.0 + ENOUGH)


def test_a_fence_bars_from_renewal_also_one_that_has_begun() -> None:
    made = grantor()
    made.renew("p", Renew(1, D))
    made.bar("p", fence=1)
    assert isinstance(messages(made.read(3, 5.0))[0], NotGranted)
    assert isinstance(messages(made.renew("p", Renew(2, D)))[0], NotGranted)
    made.lift(1)
    assert messages(grant(made, 3, 5.2, index=8)) == [Granted(3, D, 8)]


def test_a_grantor_that_was_away_listens_before_it_calls_anybody_lost() -> None:
    made = grantor(now=0.0)
    assert lost(made.woken(60.0)) == []
    assert not made.out("p", 60.0)
    assert not made.holds("p", 60.0)
    assert lost(made.woken(60.0 + 2 * D / 5)) == ["p"]


# Both together, with clocks that drift, an unreliable network, pauses and new grantors.


@dataclass
class World:
    """A holder whose clock runs at `rate`, grantors that follow one another, and a true time."""

    rate: float
    now: float = 0.0
    applied: int = 0
    term: int = 0
    last_read: float = float("-inf")
    """When a quorum last answered to a leader."""
    holder: Holder = field(init=False)
    grantor: Grantor = field(init=False)
    asked: list[Renew] = field(default_factory=list)
    answers: list[tuple[str, Granted]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.holder = Holder(D, random.Random(3))
        self.elect()

    @property
    def own(self) -> float:
        return self.now * self.rate

    def elect(self) -> None:
        """A new leader, which knows how long no other one had a quorum's answer."""
        quiet = min(max(0.0, self.now - self.last_read) / (1 + DRIFT), 2.0)
        self.term += 1
        self.grantor = grantor(self.now, quiet, self.term)
        self.holder.follow(f"leader {self.term}", self.own)

    def ask(self) -> None:
        send, _ = self.holder.renew(self.own)
        assert isinstance(send, Send)
        self.asked.append(send.message)

    def decide(self) -> None:
        """A request reaches the leader, and the fresh read succeeds."""
        if self.asked and self.grantor.renew("p", self.asked.pop(0)) == [AskFresh()]:
            self.last_read = self.now
            for answer in messages(self.grantor.read(self.applied, self.now)):
                if isinstance(answer, Granted):
                    self.answers.append((f"leader {self.term}", answer))

    def hear(self) -> None:
        """An answer arrives; whatever it names is applied."""
        if self.answers:
            peer, answer = self.answers.pop(0)
            self.holder.granted(peer, answer, self.applied)


acts = st.lists(
    st.tuples(st.sampled_from(["ask", "decide", "hear", "elect", "drop"]), st.floats(0.0, 1.0)), max_size=60
)


@given(acts, st.floats(1 / (1 + DRIFT), 1 + DRIFT))
def test_whoever_is_called_lost_has_no_lease(tried: list[tuple[str, float]], rate: float) -> None:
    world = World(rate)
    for act, pause in tried:
        world.now += pause
        if act == "drop":
            world.asked, world.answers = world.asked[1:], world.answers[1:]
        else:
            getattr(world, act)()
        if world.grantor.out("p", world.now):
            assert world.holder.deadline <= world.own
            # Answers that are still under way say no more than that either.
            for peer, answer in world.answers:
                world.holder.granted(peer, answer, world.applied)
            assert world.holder.deadline <= world.own
            world.answers.clear()


def test_without_the_margin_for_drift_they_would_overlap() -> None:
    """The property above can fail: a holder whose clock is slow believes longer than 1.5 s."""
    slow = Holder(D, random.Random(3))
    (send, _) = slow.follow("c", 0.0)
    assert isinstance(send, Send)
    slow.granted("c", Granted(send.message.number, D, 0), 0)
    true_end = slow.deadline * (1 + DRIFT)
    assert true_end > D
    assert true_end == pytest.approx(ENOUGH - MARGIN)
