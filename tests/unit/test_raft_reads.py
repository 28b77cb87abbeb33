# SPDX-License-Identifier: Apache-2.0
"""Linearizable reads, at the leader and elsewhere, by lease and by a fresh round."""

from __future__ import annotations

from proto.raft.events import Received
from proto.raft.messages import Append, Readable
from tests.unit.raft_scene import Scene


def rounds(scene: Scene) -> int:
    return max(s.message.round for _, s in scene.sent if isinstance(s.message, Append))


def test_a_leader_reads_by_its_lease_without_asking_anybody() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        propose a x
    """)
    before = len(scene.sent)
    scene.play("""
        read a 1
        a ready=1
    """)
    assert len(scene.sent) == before


def test_a_fresh_read_asks_a_quorum_once_for_all_that_wait() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        beat a
    """)
    before = rounds(scene)
    scene.play("""
        tap b a
        tap c a
        read a 1 fresh
        read a 2 fresh
        read a 3 fresh
        a ready=
        pour
        a ready=1,2,3
    """)
    assert rounds(scene) <= before + 2


def test_the_lease_ends_and_then_a_quorum_is_asked() -> None:
    Scene("a b c").play("""
        campaign a
        cut a
        elapse 0.995
        read a 1
        a leader ready=
        elapse 0.1
        wake a
        a follower ready=
        elapse 2
        wake a
        a failed=1
    """)


def test_the_lease_counts_from_sending() -> None:
    Scene("a b c").play("""
        campaign a
        elapse 0.5
        tap b a
        tap c a
        beat a
        mute a b
        mute a c
        elapse 0.45
        pour
        elapse 0.5
        read a 1
        a ready=1
        elapse 0.045
        read a 2
        a leader ready=1
    """)


def test_reads_wait_for_the_first_record_of_the_term() -> None:
    Scene("a b c").play("""
        hold b
        hold c
        campaign a
        disk b 1
        a leader commit=1
        read a 1
        a ready=
        disk b
        disk c
        a ready=1 commit=2
    """)


def test_a_follower_asks_the_leader_and_waits_until_it_has_applied() -> None:
    Scene("a b c").play("""
        campaign a
        beat a
        cut a b
        propose a x
        heal
        mute a b
        read b 1
        b ready= applied=
        heal
        elapse 0.35
        wake b
        beat a
        b applied=x ready=1
    """)


def test_a_read_without_a_leader_fails_in_time() -> None:
    Scene("a b c").play("""
        read b 1
        cut b
        elapse 1
        wake b
        b failed=
        elapse 1.1
        wake b
        b failed=1
    """)


def test_a_question_goes_to_the_new_leader() -> None:
    Scene("a b c").play("""
        campaign a
        cut a
        read b 1
        campaign b
        b leader ready=1
        read c 2
        c ready=2
    """)


def test_a_leader_that_is_deposed_does_not_answer() -> None:
    Scene("a b c").play("""
        campaign a
        cut a
        elapse 0.995
        read a 1
        a leader ready=
        campaign b
        heal
        beat b
        a follower ready=1
    """)


def test_after_handing_over_there_is_no_lease() -> None:
    Scene("a b c").play("""
        campaign a
        beat a
        mute a b
        transfer a b
        elapse 0.6
        beat a
        elapse 0.6
        beat a
        heal
        beat a
        cut a
        read a 1
        a leader ready=
    """)


def test_a_leader_that_is_no_voter_has_no_lease() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        hold b
        hold c
        voters a b c
        disk b 1
        disk c 1
    """)
    if scene.actors["a"].see("config") == "bc":
        scene.play("""
            cut a
            read a 1
            a leader ready=
        """)
    else:
        raise AssertionError(scene.actors["a"].see("config"))


def test_answers_to_an_earlier_life_are_of_no_meaning() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        beat a
        read b 7 fresh
        b ready=7
    """)
    answers = [s.message for _, s in scene.sent if isinstance(s.message, Readable)]
    scene.play("""
        crash b
        start b
        beat a
        tap b a
        read b 8 fresh
    """)
    for answer in answers:
        scene.feed("b", Received("a", answer))
    scene.play("""
        b ready=7
        pour
        b ready=7,8
    """)
