# SPDX-License-Identifier: Apache-2.0
"""Members without a vote: following, catching up, changing whom they ask."""

from __future__ import annotations

import random

import pytest

from proto.log import Record
from proto.raft.events import Received, Stored
from proto.raft.messages import Feed, Follow, SnapshotPart, SnapshotTaken
from tests.unit.raft_scene import Scene
from tests.unit.slow_links import MEGABIT, SLOW, Links, founded


def test_an_observer_gets_what_is_committed_and_only_that() -> None:
    Scene("a b c", "o").play("""
        campaign a
        contacts o a b c
        propose a x
        o observer applied=x leader=a config=abc
        cut a b
        cut a c
        propose a y
        o applied=x last=3
        heal
        beat a
        o applied=x,y
    """)


def test_an_observer_is_told_when_something_comes_and_else_of_life() -> None:
    scene = Scene("a", "o")
    scene.play("contacts o a")
    before = len(scene.sent)
    scene.play("wake a")
    assert len(scene.sent) == before
    scene.play("beat a")
    feeds = [s.message for _, s in scene.sent[before:] if isinstance(s.message, Feed)]
    assert [feed.records for feed in feeds] == [()]
    scene.play("""
        propose a x
        o applied=x
    """)


def test_an_observer_far_behind_gets_the_snapshot() -> None:
    scene = Scene("a b c", "o")
    scene.play("""
        campaign a
        propose a one two three
        beat a
        compact a 5 6
        compact b 5 6
        compact c 5 6
        propose a four
        contacts o a b c
        o applied=one,two,three,four first=6
        crash o
        start o
        o applied=one,two,three
        beat a
        o applied=one,two,three,four
    """)
    assert any(isinstance(s.message, SnapshotPart) and s.message.round == 0 for _, s in scene.sent)


def test_a_snapshot_that_the_leader_brings_is_not_thrown_away_for_another() -> None:
    scene = Scene("a b c", "d")
    scene.play("""
        campaign a
        propose a one two three four five six seven eight nine ten
        beat a
        compact a 12 13
        compact b 12 13
        tap b d
        contacts d b
        tap d a
        voters a a b c d
        d last=0
        pour
        d applied=one,two,three,four,five,six,seven,eight,nine,ten leader=a
    """)
    parts = [s for name, s in scene.sent if isinstance(s.message, SnapshotPart) and name == "a"]
    assert len(parts) > 4
    assert len({s.message.offset for s in parts}) == len(parts)


def test_an_observer_goes_on_to_another_replica() -> None:
    Scene("a b c", "o").play("""
        campaign a
        contacts o a b c
        o leader=a
        cut a
        elapse 0.7
        wake o
        campaign b
        propose b x
        o applied=x leader=b
    """)


def test_a_follower_feeds_observers_too() -> None:
    Scene("a b c", "o").play("""
        campaign a
        cut o a
        contacts o a
        o last=0
        contacts o b
        elapse 0.7
        wake o
        propose a x
        beat a
        o applied=x leader=a
    """)


def test_an_observer_asked_by_another_names_the_voters() -> None:
    Scene("a b c", "o p").play("""
        campaign a
        contacts o a
        propose a x
        contacts p o
        p applied=x
        elapse 0.1
        wake p
        propose a y
        p applied=x,y leader=a
    """)


def test_observers_that_know_nothing_do_not_ask_each_other_for_ever() -> None:
    Scene("a", "o p").play("""
        contacts o p a
        contacts p o a
        o last=0
        elapse 0.2
        wake o
        wake p
        o leader=a last=2
        p leader=a last=2
    """)


def test_an_observer_leaves_a_replica_that_knows_less_than_itself() -> None:
    scene = Scene("a b c", "o")
    scene.play("""
        campaign a
        contacts o a b c
        propose a x
        beat a
        o applied=x
    """)
    machine = scene.actors["o"].machine
    assert machine is not None
    before = len(scene.sent)
    scene.feed("o", Received("a", Feed(2, "a", machine.configuration, 0, 0, (), 0)))
    scene.play("""
        elapse 0.2
        wake o
    """)
    assert [s.peer for name, s in scene.sent[before:] if name == "o"][:1] == ["b"]


def test_an_observer_that_knows_nobody_waits() -> None:
    scene = Scene("a", "o")
    scene.play("""
        elapse 10
        wake o
        o observer last=0
        contacts o a
        o leader=a
    """)


def test_a_late_answer_of_an_older_term_does_not_hide_the_leader() -> None:
    scene = Scene("a b c", "o")
    scene.play("""
        campaign a
        contacts o a b c
        o leader=a
        cut a
        campaign b
        elapse 0.7
        wake o
        propose b x
        o applied=x leader=b
    """)
    machine = scene.actors["o"].machine
    assert machine is not None
    voters = machine.configuration
    scene.feed("o", Received("b", Feed(machine.term - 1, "", voters, 1, 1, (), 1)))
    scene.play("o leader=b")
    scene.feed("o", Received("b", Feed(machine.term, "", voters, 1, 1, (), 1)))
    scene.feed("o", Received("b", Feed(machine.term - 1, "a", voters, 1, 1, (), 1)))
    scene.feed("o", Received("b", Feed(machine.term, "b", voters, 1, 1, (), 1)))
    scene.play("o leader=b")


def test_one_question_per_peer_is_kept() -> None:
    scene = Scene("a", "o")
    for _ in range(10):
        scene.feed("a", Received("o", Follow(2, 2)))
    before = len(scene.sent)
    scene.play("beat a")
    assert len(scene.sent) == before + 1


def test_a_feed_never_changes_what_is_committed() -> None:
    scene = Scene("a b c", "o")
    scene.play("""
        campaign a
        propose a x
        contacts o a
        o applied=x log=2,2
    """)
    machine = scene.actors["o"].machine
    assert machine is not None
    scene.feed("o", Received("a", Feed(9, "a", machine.configuration, 1, 1, (Record(9, 2, b"no"),), 2)))
    scene.feed("o", Received("a", Feed(9, "a", machine.configuration, 1, 1, (Record(9, 2, b"no"),) * 2, 3)))
    scene.play("o applied=x log=2,2")


def test_observers_read_through_the_leader() -> None:
    Scene("a b c", "o").play("""
        campaign a
        contacts o a
        propose a x
        read o 1
        o ready=1
        read o 2 fresh
        o ready=1,2
    """)


@pytest.mark.parametrize(("rate", "delay"), SLOW)
@pytest.mark.parametrize("what", ["snapshot", "records"])
@pytest.mark.parametrize("voters", ["a", "abc"])
def test_what_an_observer_lacks_gets_over_a_slow_link(
    voters: str, what: str, rate: float, delay: float
) -> None:
    size = 1_000_000
    stored = founded(voters, **{what: size})
    links = Links(voters, stored, Stored(), rate, delay)
    end = stored.commit
    assert links.run(30 + 2 * size / rate + 100 * delay, lambda: links.machines["o"].applied_index >= end)
    assert links.carried < 1.5 * size


def test_a_snapshot_gets_through_although_messages_are_lost() -> None:
    size = 1_000_000
    links = Links("abc", founded("abc", snapshot=size), Stored(), 100 * MEGABIT, 0.01)
    dice = random.Random(1)
    links.lose = lambda sender, to, _message: "o" in (sender, to) and dice.random() < 0.1
    assert links.run(120, links.follows)
    assert links.carried < 3 * size


def test_a_late_part_is_taken_and_its_sender_goes_on() -> None:
    scene = Scene("a b c", "o")
    scene.play("""
        campaign a
        propose a one two three four five six
        beat a
        compact a 8 9
        compact b 8 9
        tap a o
        tap b o
        contacts o a b
        elapse 0.7
        wake o
        o last=0
        pour
        o applied=one,two,three,four,five,six
    """)
    taken = [s.peer for name, s in scene.sent if name == "o" and isinstance(s.message, SnapshotTaken)]
    assert len(taken) > 1
    assert set(taken) == {"a"}


def test_who_says_twice_what_it_has_gets_the_next_part_once() -> None:
    scene = Scene("a", "o")
    scene.play("""
        propose a one two three four five six
        compact a 8 9
        tap o a
        contacts o a
    """)
    scene.feed("a", Received("o", Follow(0, 0)))
    before = len(scene.sent)
    for _ in range(3):
        scene.feed("a", Received("o", SnapshotTaken(0, 8, 4)))
    assert len(scene.sent) == before + 1
