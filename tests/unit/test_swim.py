# SPDX-License-Identifier: Apache-2.0
"""SWIM's mechanisms, one at a time: probes, helpers, suspicion, refutation, news, exchange, own health."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from proto.machine import Send, WakeAt, Woken
from proto.swim.awareness import Awareness
from proto.swim.broadcasts import Broadcasts
from proto.swim.events import TIMER, Event, Members, Received, Roster, SetMeta, Settings, Turned
from proto.swim.machine import Swim
from proto.swim.packets import (
    LIMIT,
    META_LIMIT,
    Ack,
    Claim,
    Gossip,
    Nack,
    Packet,
    Ping,
    PingFor,
    Placed,
    Reach,
    Sync,
    claim_size,
    packet_size,
)
from proto.swim.probing import Rounds
from proto.swim.suspicion import Suspicion, shortest
from proto.vivaldi import Coordinate

OWN, A, B, C, D = (f"{number:016x}" for number in range(5))
SETTINGS = Settings(sync=1e6)
HERE = Coordinate()


class Rig:
    """One machine, whose packets go nowhere; time is moved by hand."""

    def __init__(self, *others: str, settings: Settings = SETTINGS, incarnation: int = 5) -> None:
        self.machine = Swim(OWN, settings, random.Random(1), incarnation)
        self.now = 0.0
        self.wake: float | None = None
        self.sent: list[tuple[str, Packet]] = []
        self.turned: list[tuple[str, Reach]] = []
        self.feed(Members(Roster.of((OWN, *others))))

    def feed(self, event: Event) -> list[tuple[str, Packet]]:
        """Feed an event; returns what was sent because of it."""
        before = len(self.sent)
        for effect in self.machine.handle(event, self.now):
            match effect:
                case Send(peer, message):
                    assert packet_size(message) <= LIMIT
                    self.sent.append((peer, message))
                case WakeAt(timer, at):
                    assert timer == TIMER
                    self.wake = at
                case Turned(peer, state):
                    self.turned.append((peer, state))
        return self.sent[before:]

    def hear(self, peer: str, packet: Packet) -> list[tuple[str, Packet]]:
        return self.feed(Received(peer, packet))

    def until(self, time: float, answering: tuple[str, ...] = ()) -> list[tuple[str, Packet]]:
        """Let time pass; direct pings to `answering` are answered at once. Returns what was sent."""
        before = len(self.sent)
        while self.wake is not None and self.wake <= time:
            self.now, self.wake = max(self.now, self.wake), None
            for peer, packet in self.feed(Woken(TIMER)):
                if isinstance(packet, Ping) and peer in answering:
                    self.now += 0.001
                    self.hear(peer, Ack(packet.number, HERE))
        self.now = max(self.now, time)
        return self.sent[before:]

    def state(self, peer: str) -> Reach:
        return self.machine.sight(peer).state


def of(kind: type[Packet], sent: list[tuple[str, Packet]]) -> list[tuple[str, Packet]]:
    return [(peer, packet) for peer, packet in sent if isinstance(packet, kind)]


def claims(sent: list[tuple[str, Packet]]) -> list[Claim]:
    return [claim for _, packet in sent for claim in packet.claims]


# Probing.


@pytest.mark.parametrize("count", [1, 2, 3, 10, 97, 100])
def test_a_round_visits_each_once_in_a_new_order(count: int) -> None:
    rounds = Rounds(random.Random(1), count)
    orders = [tuple(rounds.next() for _ in range(count)) for _ in range(5)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 10 or len(set(orders)) == 5


def test_all_members_are_probed_equally_and_nobody_alone_sends() -> None:
    rig = Rig(A, B, C)
    pinged = Counter(peer for peer, _ in of(Ping, rig.until(30.5, answering=(A, B, C))))
    assert set(pinged) == {A, B, C}
    assert max(pinged.values()) - min(pinged.values()) <= 1
    assert rig.turned == []
    alone = Rig()
    alone.feed(SetMeta(b"x"))
    assert alone.until(100.0) == []
    rig.feed(Members(Roster.of((OWN,))))
    rig.until(40.0)
    assert rig.until(100.0) == []


def first_ping(rig: Rig) -> tuple[str, Ping]:
    while True:
        assert rig.wake is not None
        for peer, packet in rig.until(rig.wake):
            if isinstance(packet, Ping):
                return peer, packet


def test_silence_asks_helpers_and_goes_on_trying() -> None:
    rig = Rig(A, B, C, D)
    target, ping = first_ping(rig)
    sent = rig.until(rig.now + SETTINGS.timeout)
    asked = of(PingFor, sent)
    assert len(asked) == SETTINGS.helpers
    assert target not in [peer for peer, _ in asked]
    for _, packet in asked:
        assert isinstance(packet, PingFor)
        assert (packet.number, packet.target) == (ping.number, target)
        assert 0 < packet.wait < 1000
    assert [peer for peer, _ in of(Ping, sent)] == [target]
    rest = rig.until(rig.now + SETTINGS.interval - 1.01 * SETTINGS.timeout)
    assert [peer for peer, _ in of(Ping, rest)] == [target] * (SETTINGS.tries - 2)
    assert rig.turned == []


@pytest.mark.parametrize("by_helper", [True, False])
def test_an_answer_through_a_helper_or_to_the_second_ping_is_one(by_helper: bool) -> None:
    rig = Rig(A, B, C, D)
    target, ping = first_ping(rig)
    sent = rig.until(rig.now + SETTINGS.timeout)
    helper = of(PingFor, sent)[0][0]
    again = of(Ping, sent)[0][1]
    assert isinstance(again, Ping)
    rig.now += 0.001
    rig.hear(*((helper, Ack(ping.number, HERE)) if by_helper else (target, Ack(again.number, HERE))))
    assert (rig.machine.vivaldi.measured(target) is None) is by_helper
    rig.until(rig.now + 2.0, answering=(A, B, C, D))
    assert rig.turned == []


def doubting(peer: str, rtt: float) -> Rig:
    """A member that stood still so often that it doubts itself; it has just asked `peer`, far away."""
    rig = Rig(peer)
    for _ in range(SETTINGS.worst_health):
        rig.now += 100.0
        rig.feed(Woken(TIMER))
        rig.machine.vivaldi.observe(peer, HERE, rtt)
    assert rig.machine.health == SETTINGS.worst_health
    assert isinstance(rig.sent[-1][1], Ping)
    return rig


def test_an_answer_counts_for_the_probes_before_it() -> None:
    """A probe made in poor health waits long; its verdict must not be of a silence that has ended since."""
    rig = doubting(A, 0.4)
    began = rig.now
    rig.until(began + 7.5)
    _, later = first_ping(rig)
    rig.now += 0.4
    rig.hear(A, Ack(later.number, HERE))
    rig.until(began + 12.0)
    assert rig.turned == []


def test_doubt_of_oneself_does_not_multiply_a_long_way() -> None:
    rig = doubting(A, 0.6)
    rig.until(rig.now + SETTINGS.tries * SETTINGS.longest_timeout)
    assert (A, "suspect") in rig.turned


def test_an_answer_from_somebody_else_or_to_another_question_is_none() -> None:
    rig = Rig(A, B)
    target, ping = first_ping(rig)
    other = B if target == A else A
    rig.hear(other, Ack(ping.number, HERE))
    rig.hear(target, Ack(ping.number + 77, HERE))
    rig.until(rig.now + 1.5, answering=(other,))
    assert (target, "suspect") in rig.turned


def test_a_helper_asks_and_says_what_it_heard() -> None:
    rig = Rig(A, B)
    ((to, ping),) = rig.hear(A, PingFor(7, B, 200))
    assert to == B
    assert isinstance(ping, Ping)
    ((to, answer),) = rig.hear(B, Ack(ping.number, HERE))
    assert (to, answer.number if isinstance(answer, Ack) else None) == (A, 7)
    rig.hear(A, PingFor(8, B, 200))
    assert [(peer, p.number) for peer, p in rig.until(rig.now + 0.3) if isinstance(p, Nack)] == [(A, 8)]
    assert rig.hear(A, PingFor(9, "f" * 16, 200)) == [], "no stranger is pinged"


def test_a_ping_is_answered_with_the_own_place_and_news() -> None:
    rig = Rig(A, incarnation=9)
    ((to, ack),) = rig.hear(A, Ping(3, "alive", 0))
    assert to == A
    assert isinstance(ack, Ack)
    assert ack.number == 3
    assert ack.claims[0] == Claim(OWN, "alive", 9)
    assert rig.hear("f" * 16, Ping(3, "alive", 0)) == [], "strangers get no answer"


def test_far_members_get_more_time() -> None:
    near, far = Rig(A), Rig(A)
    for rig, rtt in ((near, 0.001), (far, 0.4)):
        for _ in range(3):
            rig.machine.vivaldi.observe(A, HERE, rtt)
        first_ping(rig)
        rig.until(rig.now + 1.1)
    assert near.state(A) == "suspect"
    assert far.state(A) == "alive"
    far.until(far.now + 3.8)
    assert far.state(A) == "suspect"


# Suspicion and refutation.


def test_a_silent_member_is_suspected_and_then_dead() -> None:
    rig = Rig(A, B, C)
    rig.until(60.0, answering=(A, B))
    assert rig.turned == [(C, "suspect"), (C, "dead")]
    told = [claim for claim in claims(rig.sent) if claim.peer == C]
    assert {claim.state for claim in told} == {"suspect", "dead"}
    assert {claim.by for claim in told} == {OWN}


def test_each_new_accuser_shortens_the_suspicion_and_enough_of_them_to_the_shortest() -> None:
    suspicion = Suspicion(10.0, A, 3.0, 12.0, 3)
    deadlines = [suspicion.deadline]
    for accuser in (A, B, C, D):
        suspicion.confirm(accuser)
        deadlines.append(suspicion.deadline)
    assert deadlines[0] == deadlines[1] == 22.0
    assert deadlines == sorted(deadlines, reverse=True)
    assert deadlines[-1] == 13.0
    assert not suspicion.confirm("e"), "enough is known"
    assert Suspicion(0.0, A, 3.0, 12.0, 0).deadline == 3.0
    assert shortest(3.0, 2, 1.0) == 3.0
    assert shortest(3.0, 1000, 1.0) == pytest.approx(9.0)


def test_confirmations_of_others_bring_death_sooner() -> None:
    slow, fast = Rig(A, B, C, D), Rig(A, B, C, D)
    for rig in (slow, fast):
        rig.hear(B, Gossip((Claim(A, "suspect", 0, B),)))
        assert rig.state(A) == "suspect"
    for accuser in (C, D, OWN):
        fast.hear(C, Gossip((Claim(A, "suspect", 0, accuser),)))
    for rig in (slow, fast):
        rig.until(SETTINGS.suspicion + 0.1, answering=(A, B, C, D))
    assert fast.state(A) == "dead"
    assert slow.state(A) == "suspect"


def test_a_suspected_member_is_told_in_the_ping_and_its_answer_clears_it() -> None:
    rig = Rig(A, B)
    rig.hear(B, Gossip((Claim(A, "suspect", 4, B),)))
    while True:
        target, ping = first_ping(rig)
        if target == A:
            break
        rig.hear(target, Ack(ping.number, HERE))
    assert (ping.state, ping.incarnation) == ("suspect", 4)
    rig.hear(A, Ack(ping.number, HERE, (Claim(A, "alive", 5),)))
    assert rig.turned == [(A, "suspect"), (A, "alive")]
    assert rig.machine.sight(A).incarnation == 5


@pytest.mark.parametrize("state", ["suspect", "dead"])
def test_what_is_said_of_oneself_is_refuted_with_a_newer_incarnation(state: Reach) -> None:
    rig = Rig(A, B, incarnation=5)
    rig.hear(A, Gossip((Claim(OWN, state, 7, B),)))
    assert rig.machine.incarnation == 8
    assert Claim(OWN, "alive", 8) in claims(rig.until(0.5))
    ((_, ack),) = rig.hear(A, Ping(1, state, 8))
    assert ack.claims[0] == Claim(OWN, "alive", 9)
    rig.hear(A, Ping(2, state, 3))
    assert rig.machine.incarnation == 9, "of an earlier incarnation"
    assert rig.turned == []


def test_a_restarted_member_gets_above_what_is_known_of_its_last_run() -> None:
    rig = Rig(A, incarnation=1)
    ((_, ack),) = rig.hear(A, Ping(1, "alive", 30))
    assert ack.claims[0].incarnation == 31
    rig.feed(SetMeta(b"new"))
    rig.hear(A, Sync(ask=False, claims=(Claim(OWN, "alive", 40, meta=b"old"),)))
    assert rig.machine.incarnation == 41


@pytest.mark.parametrize(
    ("known", "claim", "then"),
    [
        (Claim(A, "alive", 3), Claim(A, "suspect", 2, B), "alive"),
        (Claim(A, "alive", 3), Claim(A, "suspect", 3, B), "suspect"),
        (Claim(A, "alive", 3), Claim(A, "dead", 2, B), "alive"),
        (Claim(A, "alive", 3), Claim(A, "dead", 3, B), "dead"),
        (Claim(A, "suspect", 3, B), Claim(A, "alive", 3), "suspect"),
        (Claim(A, "suspect", 3, B), Claim(A, "alive", 4), "alive"),
        (Claim(A, "suspect", 3, B), Claim(A, "dead", 3, B), "dead"),
        (Claim(A, "dead", 3, B), Claim(A, "suspect", 3, B), "dead"),
        (Claim(A, "dead", 3, B), Claim(A, "alive", 3), "dead"),
        (Claim(A, "dead", 3, B), Claim(A, "suspect", 4, B), "suspect"),
        (Claim(A, "dead", 3, B), Claim(A, "alive", 4), "alive"),
    ],
)
def test_which_of_two_claims_holds(known: Claim, claim: Claim, then: Reach) -> None:
    rig = Rig(A, B)
    rig.hear(B, Gossip((known, claim)))
    assert rig.state(A) == then
    assert rig.machine.sight(A).incarnation == max(known.incarnation, claim.incarnation)


def test_claims_about_strangers_are_dropped_and_members_that_left_are_forgotten() -> None:
    rig = Rig(A, B)
    rig.hear(A, Gossip((Claim(C, "dead", 3, A), Claim(B, "dead", 3, A))))
    assert rig.turned == [(B, "dead")]
    rig.feed(Members(Roster.of((OWN, A))))
    rig.feed(Members(Roster.of((OWN, A, B))))
    assert rig.state(B) == "alive"


# Dead members.


def test_a_dead_member_is_asked_now_and_then_and_comes_back() -> None:
    rig = Rig(A, B)
    rig.hear(A, Gossip((Claim(B, "dead", 3, A),)))
    asked = [p for peer, p in of(Ping, rig.until(60.0, answering=(A,))) if peer == B]
    assert 4 <= len(asked) <= 24
    last = asked[-1]
    assert isinstance(last, Ping)
    assert (last.state, last.incarnation) == ("dead", 3)
    sent = rig.hear(B, Ack(last.number, HERE, (Claim(B, "alive", 4),)))
    assert rig.state(B) == "alive"
    assert any(isinstance(packet, Sync) and packet.ask for peer, packet in sent if peer == B)


def test_a_dead_member_that_speaks_is_told_at_once() -> None:
    rig = Rig(A, B)
    rig.hear(A, Gossip((Claim(B, "dead", 3, A),)))
    rig.until(2.0, answering=(A,))
    sent = rig.hear(B, Ping(5, "alive", 5))
    assert [(peer, type(packet)) for peer, packet in sent] == [(B, Ack), (B, Ping)]
    assert of(Ping, rig.hear(B, Ping(6, "alive", 5))) == [], "not for each packet"


# News.


def test_news_is_sent_a_bounded_number_of_times_newest_least_sent_first() -> None:
    news = Broadcasts(repeats=4)
    news.resize(10)
    news.add(Claim(A, "suspect", 1, B))
    news.take(LIMIT)
    news.add(Claim(C, "dead", 1, B))
    small = claim_size(Claim(C, "dead", 1, B)) + 70
    assert news.take(small)[0].peer == C
    sent = Counter(claim.peer for _ in range(100) for claim in news.take(LIMIT))
    assert sent == {A: 7, C: 7}
    assert not news


def test_newer_news_of_a_member_takes_the_place_of_older() -> None:
    news = Broadcasts(repeats=4)
    news.add(Claim(A, "suspect", 1, B))
    news.add(Claim(A, "alive", 2))
    assert news.take(LIMIT) == (Claim(A, "alive", 2),)
    news.forget(A)
    assert news.take(LIMIT) == ()


def test_packets_stay_within_their_size_however_much_news_there_is() -> None:
    others = [f"{number:016x}" for number in range(1, 400)]
    rig = Rig(*others)
    for start in range(0, 399, 40):
        part = [Claim(peer, "alive", 2, meta=b"m" * META_LIMIT) for peer in others[start : start + 13]]
        rig.hear(A, Gossip(tuple(part)))
    rig.until(10.0)
    sizes = [packet_size(packet) for _, packet in rig.sent]
    assert max(sizes) > LIMIT - 100


def test_what_a_member_tells_of_itself_reaches_the_others_newest_first() -> None:
    rig, other = Rig(A), Rig(A, B)
    rig.feed(SetMeta(b"one"))
    rig.feed(SetMeta(b"two"))
    rig.feed(SetMeta(b"two"))
    assert rig.machine.incarnation == 7
    assert Claim(OWN, "alive", 7, meta=b"two") in claims(rig.until(1.0))
    other.hear(A, Gossip((Claim(B, "alive", 7, meta=b"two"),)))
    other.hear(A, Gossip((Claim(B, "alive", 6, meta=b"one"),)))
    assert other.machine.sight(B).meta == b"two"
    with pytest.raises(ValueError, match="64 bytes"):
        SetMeta(b"x" * 65)


# Telling everything.


def test_at_the_start_everything_is_asked_for_until_it_comes() -> None:
    rig = Rig(A, B)
    asked = of(Sync, rig.until(7.0, answering=(A, B)))
    assert len(asked) >= 3
    rig.hear(asked[-1][0], Sync(ask=False))
    rig.until(9.1, answering=(A, B))
    assert of(Sync, rig.until(60.0, answering=(A, B))) == []


def test_an_exchange_brings_both_to_the_same_and_the_dead_are_only_suspected() -> None:
    rig = Rig(A, B, C)
    rig.hear(A, Gossip((Claim(B, "dead", 3, A),)))
    ((to, sync),) = rig.hear(A, Sync(ask=True, claims=(Claim(C, "dead", 2, A),)))
    assert to == A
    assert isinstance(sync, Sync)
    assert not sync.ask
    assert {(claim.peer, claim.state) for claim in sync.claims} >= {(B, "dead"), (OWN, "alive")}
    assert rig.state(C) == "suspect"
    assert rig.hear(B, Sync(ask=True)) == [] or not of(Sync, rig.hear(C, Sync(ask=True))), "paced"


def test_a_large_exchange_is_bounded_and_goes_on_where_it_ended() -> None:
    others = [f"{number:016x}" for number in range(1, 4001)]
    rig = Rig(*others)
    for start in range(0, 4000, 25):
        rig.hear(A, Gossip(tuple(Claim(peer, "alive", 2) for peer in others[start : start + 25])))
    told: set[str] = set()
    for turn in range(4):
        rig.now += 1.0
        sent = of(Sync, rig.hear(A, Sync(ask=True)))
        assert len(sent) <= SETTINGS.sync_packets
        told |= {claim.peer for claim in claims(sent)}
        assert turn > 0 or len(told) < 4001
    assert told == {OWN, *others}


# Places.

SURE = Coordinate((0.01, 0.0, 0.0, 0.0), 0.001, 0.1)
AWAY = Coordinate((0.21, 0.0, 0.0, 0.0), 0.001, 0.1)


def sure(*others: str, settings: Settings = SETTINGS) -> Rig:
    """A member that has found its place, near `SURE`."""
    rig = Rig(*others, settings=settings)
    while rig.machine.vivaldi.coordinate.error > 0.2:
        rig.machine.vivaldi.observe(A, SURE, 0.01)
    return rig


def test_an_exchange_tells_where_the_alive_are_and_how_old_that_is() -> None:
    rig = sure(A, B, C, D)
    rig.hear(A, Gossip((Claim(B, "alive", 1), Claim(C, "alive", 1), Claim(D, "dead", 0, A))))
    rig.hear(A, Sync(ask=False, places=(Placed(B, 7, AWAY), Placed(D, 7, AWAY), Placed("f" * 16, 0, AWAY))))
    rig.now += 2.5
    ((_, sync),) = of(Sync, rig.hear(A, Sync(ask=True)))
    assert isinstance(sync, Sync)
    assert set(sync.places) == {Placed(OWN, 0, rig.machine.vivaldi.coordinate), Placed(B, 10, AWAY)}


def test_nobody_is_told_where_oneself_or_a_stranger_is() -> None:
    rig = sure(A, B)
    rig.hear(A, Sync(ask=False, places=(Placed(OWN, 0, AWAY), Placed(C, 0, AWAY))))
    assert rig.machine.vivaldi.place(OWN) is None
    assert rig.machine.vivaldi.place(C) is None


def test_a_member_that_only_helpers_reach_is_placed_by_its_answer_to_them() -> None:
    rig = sure(A, B)
    while True:
        target, ping = first_ping(rig)
        if target == B:
            break
        rig.hear(A, Ack(ping.number, SURE))
    rig.until(rig.now + SETTINGS.timeout)
    rig.hear(A, Ack(ping.number, AWAY))
    assert rig.machine.vivaldi.measured(B) is None
    assert rig.machine.vivaldi.rtt(B) == pytest.approx(0.2, rel=0.2)


def test_a_probe_of_a_far_member_that_was_never_measured_is_as_patient_as_of_one_that_was() -> None:
    rig = sure(A, B)
    rig.hear(A, Sync(ask=False, places=(Placed(B, 0, AWAY),)))
    estimate = rig.machine.vivaldi.rtt(B)
    assert estimate is not None
    assert rig.machine.vivaldi.measured(B) is None
    while (pinged := first_ping(rig))[0] != B:
        rig.hear(A, Ack(pinged[1].number, SURE))
    assert of(PingFor, rig.until(rig.now + 2.9 * estimate)) == []
    assert of(PingFor, rig.until(rig.now + 0.2 * estimate)) != []


# The own health.


def test_health_is_bounded_and_recovers() -> None:
    health = Awareness(7)
    health.note(3)
    health.note(9)
    assert (health.score, health.factor) == (7, 8)
    for _ in range(9):
        health.note(-1)
    assert (health.score, health.factor) == (0, 1)


def test_silent_helpers_make_one_doubt_oneself_nacks_do_not() -> None:
    for nacks, worse in ((True, False), (False, True)):
        rig = Rig(A, B, C, D)
        _, ping = first_ping(rig)
        asked = of(PingFor, rig.until(rig.now + SETTINGS.timeout))
        for helper, _ in asked if nacks else []:
            rig.hear(helper, Nack(ping.number))
        rig.until(rig.now + 0.75)
        assert (rig.machine.health > 0) is worse


def test_a_process_that_stood_still_accuses_nobody() -> None:
    rig = Rig(A, B, C)
    rig.until(5.0, answering=(A, B, C))
    rig.hear(A, Gossip((Claim(B, "suspect", 0, A),)))
    rig.until(6.0, answering=())
    rig.now += 40.0
    rig.feed(Woken(TIMER))
    rig.until(rig.now + 0.2)
    assert rig.turned == [(B, "suspect")]
    assert rig.machine.health > 0
