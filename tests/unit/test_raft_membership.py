# SPDX-License-Identifier: Apache-2.0
"""Changing who votes and who leads: learners, joint changes, transfers, replicas that have lost their log."""

from __future__ import annotations

from proto.raft.events import Received, Settings
from proto.raft.messages import AskVote, Lead, Voted
from tests.unit.raft_scene import Scene, label


def configurations(scene: Scene, name: str) -> list[str]:
    """Those that a replica's log went through, in the scene's notation."""
    machine = scene.actors[name].machine
    assert machine is not None
    return [label(configuration) for _, configuration in machine._replica.log._configurations]


def test_a_voter_is_added_as_a_learner_first() -> None:
    scene = Scene("a", "b")
    scene.play("""
        propose a x
        voters a a b
        beat a
        a leader config=ab
        b follower config=ab applied=x
    """)
    assert configurations(scene, "a") == ["a", "a+b", "ab/a", "ab"]


def test_a_newcomer_that_never_catches_up_is_given_up() -> None:
    scene = Scene("a b c", "d")
    scene.play("""
        campaign a
        cut d
        voters a a b d
        a config=abc+d
    """)
    for _ in range(13):
        scene.play("""
            elapse 0.8
            beat a
        """)
    scene.play("a leader config=abc")
    scene.play("""
        heal
        voters a a b d
        beat a
        a config=abd
    """)


def test_the_leader_removes_itself_after_handing_over() -> None:
    Scene("a b c").play("""
        campaign a
        voters a b c
        a observer config=bc
        b config=bc
        c config=bc
        propose a x
        a applied=
    """)


def test_somebody_leads_at_once_when_the_leader_removes_itself() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        voters a b c
    """)
    assert [actor.see("role") for actor in scene.actors.values()].count("leader") == 1


def test_a_joint_decision_needs_both_majorities() -> None:
    Scene("a b c", "d e f").play("""
        campaign a
        beat a
        cut a e
        cut a f
        hold d
        voters a d e f
        a config=abc+d+e+f
        propose a x
        a applied=x
    """)


def test_a_new_leader_ends_the_change_that_a_dead_one_began() -> None:
    scene = Scene("a b c", "d")
    scene.play("""
        campaign a
        hold b
        hold c
        voters a a b d
        a config=abc+d
    """)
    scene.do_disk("b", "1")
    scene.settle()
    scene.play("""
        a config=abd/abc
        crash a
        disk b
        disk c
        b config=abd/abc
        campaign b
        b leader term=3
        beat b
        b config=abd
        d config=abd
    """)


def test_a_configuration_cut_off_holds_no_more() -> None:
    Scene("a b c", "d").play("""
        campaign a
        beat a
        cut a
        voters a a b d
        a config=abc+d
        campaign b
        propose b x
        heal
        beat b
        a follower config=abc applied=x
    """)


def test_a_change_gives_way_to_another_while_its_newcomers_catch_up() -> None:
    Scene("a b c", "d e").play("""
        campaign a
        cut d
        voters a a b d
        a config=abc+d
        voters a a b e
        a config=abe
        heal
        beat a
        a config=abe
        voters a
        a config=abe
    """)


def test_to_want_the_present_voters_ends_a_change() -> None:
    Scene("a b c", "d").play("""
        campaign a
        cut d
        voters a a b d
        a config=abc+d
        voters a a b c
        a config=abc
        heal
        beat a
        a config=abc
    """)


def test_a_joint_change_is_not_replaced() -> None:
    scene = Scene("a b c", "d e")
    scene.play("""
        campaign a
        hold b
        hold c
        voters a a b d
    """)
    scene.do_disk("b", "1")
    scene.settle()
    scene.play("""
        a config=abd/abc
        voters a a b e
        disk b
        disk c
        beat a
        a config=abd
    """)


def test_learners_decide_nothing() -> None:
    Scene("a b c", "d").play("""
        campaign a
        hold d
        voters a a b d
        a config=abc+d
        cut b
        cut c
        propose a x
        disk d
        a applied=
    """)


def test_a_removed_voter_that_does_not_know_disturbs_nobody_and_learns_of_it() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        beat a
        cut c
        voters a a b
        a config=ab
        heal
    """)
    scene.actors["c"].clock += 3
    scene.play("""
        wake c
        a leader term=2
        c observer config=ab leader=a
    """)


def test_a_removed_voter_with_a_tail_of_its_own_loses_it() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign c
        beat c
        cut c
        propose c lost lost lost
        campaign a
        voters a a b
        propose a x
        heal
    """)
    scene.actors["c"].clock += 3
    scene.play("wake c")
    scene.actors["c"].clock += 3
    scene.play("""
        wake c
        c observer config=ab applied=x
    """)


def test_a_voter_removed_by_an_uncommitted_configuration_still_campaigns() -> None:
    """Its log is the only one that can win."""
    scene = Scene("a b")
    scene.play("""
        campaign a
        beat a
        hold b
        voters a b
        a config=b/ab
        disk b 1
    """)
    scene.play("""
        a leader config=b
        crash b
        crash a
        start a
        start b
        a config=b
        b config=b/ab
        campaign a
    """)
    scene.play("""
        elapse 1.1
        campaign a
        b config=b
        a observer
    """)


def test_a_transfer_catches_up_first_and_needs_no_silence() -> None:
    Scene("a b c").play("""
        campaign a
        hold b
        propose a x
        transfer a b
        a leader
        propose a y
        a last=4
        disk b
        b leader term=3 quiet=0.0
        beat b
        a follower leader=b applied=x,y
        b applied=x,y
    """)


def test_a_transfer_to_a_dead_voter_is_given_up() -> None:
    Scene("a b c").play("""
        campaign a
        cut b
        transfer a b
        propose a blocked
        elapse 0.6
        beat a
        a leader last=2
        elapse 0.6
        beat a
        propose a x
        a leader applied=x
    """)


def test_a_transfer_to_no_voter_does_nothing() -> None:
    Scene("a b c", "d").play("""
        campaign a
        transfer a d
        transfer a a
        propose a x
        a leader applied=x
    """)


def test_only_the_own_leaders_word_makes_a_voter_campaign() -> None:
    scene = Scene("a b c", "x")
    scene.play("campaign a")
    scene.feed("b", Received("c", Lead(2)))
    scene.feed("b", Received("a", Lead(1)))
    scene.play("b follower term=2")


def test_after_a_forced_candidacy_failed_the_next_one_waits_for_silence() -> None:
    """Else its own vote would break the promise `quiet`."""
    scene = Scene("a b c")
    scene.play("""
        campaign a
        beat a
        mute b a
        mute b c
    """)
    scene.feed("b", Received("a", Lead(2)))
    scene.settle()
    scene.play("b candidate term=3")
    machine = scene.actors["b"].machine
    assert machine is not None
    heard = machine._replica.heard_leader
    assert machine._election.due >= heard + Settings().election


def test_a_replica_that_lost_its_log_counts_for_nothing_until_it_was_demoted() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        propose a x
        damage c
        start c
        beat a
        c observer recovering=True applied=x
        a lost=c
        cut b
        propose a y
        a applied=x
        heal
        beat a
        a applied=x,y
        voters a a b
        a config=ab
        elapse 0.7
        beat a
        wake c
        c observer recovering=False applied=x,y
        voters a a b c
        beat a
        a config=abc lost=
        c follower
        crash c
        start c
        c follower recovering=False
    """)


def test_a_replica_that_lost_its_log_neither_votes_nor_campaigns() -> None:
    scene = Scene("a b c")
    scene.play("""
        damage c
        start c
        campaign c
        c observer term=0
        elapse 3
    """)
    scene.feed("c", Received("a", AskVote(5, 50, 5)))
    scene.feed("c", Received("a", AskVote(5, 50, 5, forced=True)))
    assert [send.message.granted for _, send in scene.mail if isinstance(send.message, Voted)] == [
        False,
        False,
    ]


def test_a_replica_that_lost_its_log_costs_a_leader_its_quorum() -> None:
    Scene("a b c").play("""
        campaign a
        beat a
        cut b
        damage c
        start c
        elapse 0.6
        beat a
        elapse 0.6
        beat a
        a leader=
    """)
