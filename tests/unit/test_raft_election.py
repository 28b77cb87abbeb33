# SPDX-License-Identifier: Apache-2.0
"""Elections: campaigns, pre-votes, the quorum check, and who is left in peace."""

from __future__ import annotations

import pytest

from proto.raft.events import Propose, Received
from proto.raft.messages import Append, Appended, AskVote, Feed, Lead, SnapshotPart, Voted
from tests.unit import peer_cluster
from tests.unit.peer_cluster import Cluster
from tests.unit.raft_scene import SETTINGS, Scene


def test_a_majority_elects() -> None:
    Scene("a b c").play("""
        campaign a
        a leader term=2 leader=a commit=2 quiet=0.99
        b follower term=2 leader=a
        beat a
        b commit=2
        c commit=2
    """)


def test_a_sole_voter_elects_itself_at_once() -> None:
    Scene("a").play("""
        a leader term=2 commit=2 quiet=0.0
        propose a x
        a applied=x
        crash a
        start a
        a leader term=3 applied=x
    """)


def test_a_minority_cannot_elect_and_changes_no_term() -> None:
    Scene("a b c").play("""
        cut a
        campaign a
        campaign a
        a candidate term=1
        heal
        campaign b
        b leader term=2
        beat b
        a follower term=2 leader=b
    """)


def test_a_longer_log_gets_no_vote_for_a_shorter_one() -> None:
    Scene("a b c", logs={"b": "2", "c": "2"}).play("""
        campaign a
        a follower term=2
        b follower term=2
        campaign b
        b leader term=3
    """)


def test_the_newer_last_term_wins_over_the_longer_log() -> None:
    Scene("a b c", logs={"a": "3", "b": "2 2 2", "c": "2 2"}).play("""
        campaign b
        campaign a
        a leader term=4
        beat a
        b log=3,4
        c log=3,4
    """)


def test_who_hears_a_leader_votes_for_nobody_else() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        cut a c
        elapse 0.8
        beat a
        elapse 0.5
    """)
    scene.actors["c"].clock += 5
    scene.play("""
        wake c
        c candidate term=2
        b follower term=2 leader=a
        a leader term=2
    """)


def test_a_real_vote_is_refused_as_well_while_a_leader_is_heard() -> None:
    scene = Scene("a b c")
    scene.play("campaign a")
    scene.feed("b", Received("c", AskVote(9, 50, 9)))
    scene.feed("a", Received("c", AskVote(9, 50, 9)))
    scene.play("""
        b follower term=2 leader=a
        a leader term=2
    """)


def test_nobody_votes_soon_after_its_start() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        crash b
        cut a
        elapse 0.9
        start b
    """)
    scene.actors["c"].clock += 5
    scene.play("""
        wake c
        c candidate term=2
        elapse 1
        wake c
        c leader term=3
    """)


def test_a_leader_without_a_quorum_steps_down() -> None:
    Scene("a b c").play("""
        campaign a
        cut a
        elapse 0.5
        beat a
        a leader
        elapse 0.5
        wake a
        a follower leader=
    """)


def test_a_vote_counts_only_once_it_is_durable() -> None:
    Scene("a b c").play("""
        cut c
        hold b
        campaign a
        a candidate term=2
        disk b
        a leader term=2
    """)


def test_a_candidacy_begins_only_once_it_is_durable() -> None:
    Scene("a b c").play("""
        hold a
        campaign a
        a candidate term=2
        b follower term=1
        disk a
        a leader term=2
    """)


def test_a_vote_given_is_not_forgotten_by_a_crash() -> None:
    scene = Scene("a b c")
    scene.play("""
        cut c
        tap b a
        elapse 1.1
        campaign a
        pour
        a leader term=2
        crash b
        start b
        elapse 1.1
    """)
    assert scene.actors["b"].disk.ballot.voted == "a"
    scene.feed("b", Received("c", AskVote(2, 50, 2)))
    assert Voted(2, False) in [send.message for _, send in scene.mail]


def test_one_vote_per_term_also_after_a_term_entered_without_a_vote() -> None:
    scene = Scene("a b c")
    scene.play("elapse 1.1")
    scene.feed("b", Received("c", AskVote(5, 0, 0)))
    scene.feed("b", Received("a", AskVote(5, 1, 1)))
    scene.feed("b", Received("c", AskVote(5, 1, 1)))
    answers = [send.message for name, send in scene.sent if name == "b"]
    assert answers[-3:] == [Voted(5, False), Voted(5, True), Voted(5, False)]


def test_a_returning_peer_is_taken_back_in_the_same_term() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        cut c
    """)
    scene.actors["c"].clock += 5
    scene.play("""
        wake c
        c candidate term=2
        heal
        beat a
        c follower term=2 leader=a
        a leader term=2
    """)


def test_a_stuck_higher_term_makes_the_leader_make_room() -> None:
    scene = Scene("a b c")
    scene.play("campaign a")
    machine = scene.actors["c"].machine
    assert machine is not None
    machine._replica.adopt(7)
    scene.play("""
        beat a
        a follower term=7
        campaign a
        a leader term=8
        c follower term=8 leader=a
    """)


def test_a_stranger_with_a_higher_term_disturbs_nobody() -> None:
    scene = Scene("a b c", "x")
    scene.play("campaign a")
    for peer in ("a", "b"):
        scene.feed(peer, Received("x", Appended(99, False, 0, 0)))
        scene.feed(peer, Received("x", Voted(99, False)))
        scene.feed(peer, Received("x", Lead(99)))
        scene.feed(peer, Received("x", AskVote(99, 0, 0, forced=True)))
    scene.play("""
        a leader term=2
        b follower term=2 leader=a
    """)


def test_absurd_messages_change_nothing() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        propose a x
        beat a
    """)
    actor = scene.actors["b"]
    assert actor.machine is not None
    configuration = actor.machine.configuration
    for message in (
        Append(2, 2**62, 2, (), 2**62, 1),
        Append(2, -5, 2, (), 5, 1),
        Append(2, 1, 77, (), 5, 1),
        Append(1, 1, 1, (), 5, 1),
        Feed(2, "a", configuration, 2**61, 2, (), 2**62),
        Feed(2, "b", configuration, 0, 0, (), 0),
        SnapshotPart(2, 2**60, 2, configuration, 2**40, 0, b"x", 1),
        SnapshotPart(2, 2**60, 2, configuration, 5, 4, b"xyz", 1),
        "nonsense",
        Lead(2**60),
    ):
        scene.feed("b", Received("a", message))
    for message in (
        Appended(2, True, 2**62, 1),
        Appended(2, True, 3, 2**62),
        Appended(2, False, 2**62, 1, 9),
    ):
        scene.feed("a", Received("b", message))
    scene.feed("b", Propose((b"not the leader",)))
    scene.settle()
    scene.play("""
        beat a
        propose a y
        beat a
        b follower term=2 leader=a applied=x,y
        a leader applied=x,y
    """)


def test_waking_too_often_asks_for_nothing() -> None:
    scene = Scene("a b c")
    scene.play("campaign a")
    before = len(scene.sent)
    for _ in range(50):
        scene.do_wake("a")
        scene.do_wake("b")
    assert len(scene.sent) == before
    assert SETTINGS.heartbeat < SETTINGS.election


def test_nobody_campaigns_again_while_the_own_ballot_is_being_written() -> None:
    Scene("a b c").play("""
        hold a
        campaign a
        cut a
        elapse 5
        wake a
        a candidate term=2
        heal
        disk a
        a leader term=2
    """)


def test_a_sole_voter_leads_however_slow_its_disk_is() -> None:
    Scene("a").play("""
        crash a
        hold a
        start a
        elapse 5
        wake a
        a candidate term=3
        disk a
        a leader term=3
    """)


def test_a_voter_whose_disk_still_writes_neither_campaigns_nor_lets_others() -> None:
    """A ballot would have to wait for those writes."""
    Scene("a b c").play("""
        campaign a
        hold c
        propose a x
        cut a
        campaign c
        c follower term=2
        campaign b
        b candidate term=2
        disk c
        c leader term=3
    """)


def test_the_patience_of_a_voter_begins_when_its_vote_is_durable() -> None:
    Scene("a b c").play("""
        cut c
        hold b
        campaign a
        elapse 5
        mute b a
        disk b
        wake b
        b follower term=2
    """)


def test_a_vote_counts_however_late_it_comes() -> None:
    """Also when the candidate already asks whether it would be elected in the next term."""
    scene = Scene("a b c")
    scene.play("""
        cut c
        hold b
        campaign a
        elapse 0.9
        wake a
        a candidate term=2
        disk b
        a leader term=2
    """)
    assert AskVote(3, 1, 1, pre=True) in [send.message for name, send in scene.sent if name == "a"]


def test_a_late_vote_after_a_hand_over_promises_no_silence() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        beat a
        cut c
        hold a
        transfer a b
        b candidate term=3
        elapse 1.4
        wake b
        disk a
        b leader term=3 quiet=0.0
    """)
    assert AskVote(4, 2, 2, pre=True) in [send.message for name, send in scene.sent if name == "b"]


def asks_whether(scene: Scene) -> list[AskVote]:
    messages = (send.message for name, send in scene.sent if name == "a" and send.peer == "b")
    return [message for message in messages if isinstance(message, AskVote) and message.pre]


def fail(scene: Scene) -> float:
    """The others say that they would vote for `a`, and do not; how long it waits until it asks anew."""
    before = len(asks_whether(scene))
    scene.feed("a", Received("b", Voted(asks_whether(scene)[-1].term, True, True)))
    waited = 0.0
    while len(asks_whether(scene)) == before:
        waited += 0.05
        scene.play("elapse 0.05")
        scene.do_wake("a")
    return waited


def test_the_pause_grows_with_each_failed_campaign_until_a_leader_is_heard() -> None:
    scene = Scene("a b c")
    scene.play("""
        crash b
        crash c
        campaign a
    """)
    first, second, *later = [fail(scene) for _ in range(6)]
    assert 0.5 <= first < 0.9
    assert 1.0 <= second < 1.7
    assert all(2.0 <= waited < 3.3 for waited in later)
    scene.feed("a", Received("b", Append(20, 1, 1, (), 1, 1)))
    scene.play("campaign a")
    assert fail(scene) < 0.9


@pytest.mark.parametrize("seconds", [0.5, 1.5, 3.0])
def test_a_leader_is_found_however_slow_the_disks_are(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    cluster = Cluster()
    cluster.join("b", "c")
    cluster.settle_voters("abc")
    monkeypatch.setattr(peer_cluster, "DISK", seconds)
    cluster.crash(cluster.leader.name)
    cluster.until(lambda: cluster.leads("abc"))
