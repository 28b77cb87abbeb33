# SPDX-License-Identifier: Apache-2.0
"""Replication: conflicting logs, what is committed when, loss and reordering, disks, snapshots."""

from __future__ import annotations

import pytest

from proto import entries as e
from proto.log import Record
from proto.machine import Persisted
from proto.raft import events as raft
from proto.raft.events import Ballot, Received
from proto.raft.messages import Append, Appended, SnapshotPart, SnapshotTaken
from tests.unit.peer_cluster import Cluster, Host, ident
from tests.unit.raft_scene import Scene
from tests.unit.slow_links import MEGABIT, SLOW, Links, founded


def test_proposals_reach_everybody_and_commit() -> None:
    Scene("a b c").play("""
        campaign a
        propose a x y
        a applied=x,y commit=4
        b applied=x,y
        c applied=x,y
    """)


def test_a_proposal_elsewhere_does_nothing() -> None:
    Scene("a b c").play("""
        campaign a
        propose b x
        b last=2
        a last=2
    """)


def test_a_minority_commits_nothing_and_loses_its_tail() -> None:
    Scene("a b c").play("""
        campaign a
        cut a
        propose a lost
        a applied= last=3
        campaign b
        b leader term=3
        propose b x
        heal
        beat b
        a follower applied=x log=2,3,3
    """)


@pytest.mark.parametrize(
    "log",
    [
        "1 1 1 4 4 5 5 6 6",
        "1 1 1 4",
        "1 1 1 4 4 5 5 6 6 6 6",
        "1 1 1 4 4 5 5 6 6 6 7 7",
        "1 1 1 4 4 4 4",
        "1 1 1 2 2 2 3 3 3 3 3",
    ],
)
def test_any_conflicting_log_is_repaired_quickly(log: str) -> None:
    """The six followers of figure 7 of the Raft paper."""
    scene = Scene("a b c", logs={"a": "1 1 1 4 4 5 5 6 6 6", "b": log, "c": "1 1 1 4 4 5 5 6 6 6"})
    if "7" in log:
        scene.actors["a"].disk.ballot = scene.actors["c"].disk.ballot = Ballot(7)
        scene.do_start("a")
        scene.do_start("c")
    scene.play("""
        cut b
        campaign a
        a leader
        heal
        beat a
        beat a
        b follower leader=a
    """)
    assert scene.actors["b"].see("log") == scene.actors["a"].see("log")
    refused = [
        s for name, s in scene.sent if name == "b" and isinstance(s.message, Appended) and not s.message.ok
    ]
    assert len(refused) <= 6


def test_a_record_of_an_older_term_is_not_committed_by_counting() -> None:
    """Figure 8 of the Raft paper: the record of term 2 is on a majority, and yet may still be replaced."""
    scene = Scene("a b c", logs={"a": "2", "b": "2", "c": "3"})
    scene.actors["a"].disk.ballot = scene.actors["b"].disk.ballot = Ballot(3)
    scene.play("""
        start a
        start b
        cut c
        hold a
        hold b
        campaign a
    """)
    for name in "aba":
        scene.do_disk(name, "1")
        scene.settle()
    scene.play("""
        beat a
        a leader term=4 commit=1 log=2,4
        b log=2,4
        crash a
        crash b
        start b
        heal
        campaign c
        campaign c
        c leader term=5
        beat c
        b log=3,5
        start a
        beat c
        a log=3,5 commit=3
    """)


def test_records_of_older_terms_are_committed_with_the_first_of_the_own() -> None:
    Scene("a b c", logs={"a": "2 2", "b": "2 2", "c": "2 2"}).play("""
        hold b
        cut c
        campaign a
        disk b
        a leader term=3 commit=4
    """)


def test_lost_appends_are_sent_again() -> None:
    Scene("a b c").play("""
        campaign a
        beat a
        mute a b
        propose a x
        propose a y
        heal
        b applied=
        propose a z
        beat a
        b applied=x,y,z
    """)


def test_appends_in_any_order_and_twice_do_no_harm() -> None:
    for how in ("backwards", "twice"):
        Scene("a b c").play(f"""
            campaign a
            beat a
            tap a b
            propose a 1
            propose a 2
            propose a 3
            pour {how}
            beat a
            b applied=1,2,3 log=2,2,2,2
            a leader applied=1,2,3
        """)


def test_a_window_of_appends_is_under_way_at_most() -> None:
    scene = Scene("a b c")
    scene.play("campaign a")
    for _ in range(4):
        scene.play("beat a")
    scene.play("hold b")
    before = len(scene.sent)
    for number in range(200):
        scene.play(f"propose a {number}")
    appends = [send for name, send in scene.sent[before:] if name == "a" and send.peer == "b"]
    assert sum(bool(send.message.records) for send in appends if isinstance(send.message, Append)) == 64
    scene.play("""
        disk b
        beat a
        beat a
        b last=202
    """)


def test_the_own_record_counts_only_once_it_is_durable() -> None:
    Scene("a b c").play("""
        campaign a
        hold a
        cut c
        propose a x
        a applied=
        disk a
        a applied=x
    """)


def test_two_followers_may_commit_while_the_leaders_disk_is_slow() -> None:
    Scene("a b c").play("""
        campaign a
        hold a
        propose a x
        a commit=3 applied=
        propose a y
        b applied=x,y
        disk a
        a applied=x,y
    """)


def test_what_is_applied_is_durable_so_that_its_index_may_be_kept() -> None:
    """An older tail on disk must not be taken for what was committed in its place."""
    scene = Scene("a b c")
    scene.play("""
        campaign a
        cut a
        propose a lost lost lost
        campaign b
        propose b x y z
        hold a
        heal
        beat b
        disk a 1
        a log=2,3,3,3,3 commit=6 applied=
    """)
    actor = scene.actors["a"]
    assert actor.machine is not None
    applied = actor.machine.applied_index
    scene.play("crash a")
    actor.disk.commit = applied
    scene.play("""
        start a
        a applied=
        beat b
        a applied=x,y,z
    """)


def test_a_follower_acknowledges_only_what_is_durable() -> None:
    Scene("a b c").play("""
        campaign a
        cut c
        hold b
        propose a x
        beat a
        a applied=
        disk b
        a applied=x
    """)


def test_a_slow_disk_costs_no_leadership() -> None:
    Scene("a b c").play("""
        campaign a
        beat a
        cut c
        hold b
        propose a x
        elapse 0.6
        beat a
        elapse 0.6
        beat a
        elapse 0.6
        beat a
        a leader term=2 applied=
    """)


def test_late_word_of_a_write_that_was_cut_off_proves_nothing() -> None:
    """ABA: record 3 of term 2 is being written, is cut off, and another record 3 takes its place."""
    scene = Scene("a b c")
    scene.play("campaign a")
    b = scene.actors["b"]
    scene.play("hold b")
    assert b.machine is not None
    scene.feed("b", Received("a", Append(2, 2, 2, (Record(2, 3, b"old"), Record(2, 4, b"old")), 2, 9)))
    old = b.writes[-1].key
    scene.feed("b", Received("c", Append(3, 2, 2, (Record(3, 3, b"new"),), 2, 1)))
    scene.mail.clear()
    scene.sent.clear()
    scene.feed("b", Persisted(old))
    assert b.machine._replica.stable == 2
    assert not any(isinstance(s.message, Appended) and s.message.index > 2 for _, s in scene.sent)
    scene.feed("b", Persisted(b.writes[-1].key))
    acknowledged = [s.message for _, s in scene.sent if isinstance(s.message, Appended) and s.message.ok]
    assert acknowledged[-1].index == 3


def test_a_word_about_a_write_that_never_was_is_nothing() -> None:
    scene = Scene("a b c")
    scene.play("campaign a")
    for key in ("99", "x", "", "-1", "9" * 40, "²"):
        scene.feed("b", Persisted(key))
    scene.play("""
        propose a x
        b applied=x
    """)


def test_a_replica_far_behind_gets_the_snapshot_in_parts() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        cut c
        propose a one two three
        compact a 5 6
        a first=6
        propose a four
        heal
        beat a
        beat a
        c applied=one,two,three,four first=6
        crash c
        start c
        c applied=one,two,three
        beat a
        c applied=one,two,three,four
    """)
    parts = [s.message for _, s in scene.sent if isinstance(s.message, SnapshotTaken)]
    assert len(parts) >= 4
    assert scene.actors["c"].disk.snapshot.index == 5


def test_a_snapshot_goes_on_where_it_stopped() -> None:
    scene = scene_with_a_snapshot_to_send("mute c a")
    scene.play("""
        heal
        elapse 0.95
        beat a
    """)
    received = [s.message.received for _, s in scene.sent if isinstance(s.message, SnapshotTaken)]
    assert received[:4] == [4, 8, 12, 16]
    assert all(number >= 16 for number in received[4:])
    scene.play("""
        beat a
        c applied=one,two,three,four,five,six
    """)


def test_restoring_waits_for_the_disk() -> None:
    Scene("a b c").play("""
        campaign a
        cut c
        propose a one
        compact a 3 4
        propose a two
        hold c
        heal
        beat a
        beat a
        c applied=
        disk c
        c applied=one,two
    """)


def test_a_follower_whose_log_ends_at_the_leaders_base_in_another_term_gets_the_snapshot() -> None:
    Scene("a b c", logs={"a": "1 3", "b": "1 3", "c": "1 2"}).play("""
        cut c
        campaign a
        a leader
        propose a x
        compact a 3 4
        heal
        beat a
        beat a
        c log=4,4
    """)


def test_compaction_keeps_what_it_is_told_and_ignores_the_absurd() -> None:
    Scene("a b c").play("""
        campaign a
        propose a 1 2 3 4
        compact a 6 4
        a first=4 last=6
        compact a 5 6
        compact a 99 50
        compact a 1 1
        a first=4 last=6
        crash a
        start a
        a first=4 last=6
    """)


def test_what_was_known_to_be_committed_is_applied_at_the_start() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        propose a x
        crash a
    """)
    scene.actors["a"].disk.commit = 3
    scene.play("""
        start a
        a applied=x commit=3
    """)


def beats(scene: Scene, name: str, count: int) -> None:
    for _ in range(count):
        scene.play(f"beat {name}")


def test_a_leader_whose_disk_stands_still_hands_over() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        beat a
        hold a
        propose a x
        a commit=3 applied=
    """)
    beats(scene, "a", 12)
    scene.play("""
        b leader term=3 applied=x quiet=0.0
        propose b y
        beat b
        c applied=x,y
        a follower term=3 leader=b applied=
        disk a
        beat b
        a applied=x,y
    """)


def test_a_leader_whose_hand_over_fails_steps_down_and_stays_down_until_its_disk_works() -> None:
    scene = Scene("a b c")
    scene.play("""
        campaign a
        beat a
        hold a
        propose a x
        hold b
    """)
    beats(scene, "a", 15)
    scene.play("""
        b candidate term=3
        a leader term=2
    """)
    beats(scene, "a", 10)
    scene.play("""
        a follower term=2 leader=
        cut b c
        campaign a
        a follower term=2
        disk a
        a leader term=3
    """)


@pytest.mark.parametrize("voters", ["a", "a b", "a b c"])
def test_a_leader_stays_if_nobody_has_more_than_its_disk_has(voters: str) -> None:
    scene = Scene(voters)
    scene.play("""
        campaign a
        beat a
    """)
    for name in scene.actors:
        scene.play(f"hold {name}")
    scene.play("propose a x")
    beats(scene, "a", 30)
    scene.play("a leader term=2 applied=")


def test_a_leader_whose_disk_is_slow_but_works_stays() -> None:
    """There is always something that its disk lacks, but never the same for long."""
    scene = Scene("a b c")
    scene.play("""
        campaign a
        beat a
        hold a
        propose a x
    """)
    for _ in range(6):
        beats(scene, "a", 4)
        scene.play("propose a y")
        beats(scene, "a", 2)
        scene.play("disk a 1")
        assert len(scene.actors["a"].writes) == 1
    scene.play("a leader term=2")


def test_no_lease_runs_out_when_the_disk_of_the_coordinator_stands_still() -> None:
    stuck = ""

    class Stuck(Cluster):
        def _write(self, host: Host, key: str, data: raft.Durable) -> None:
            if host.name != stuck:
                super()._write(host, key, data)

    cluster = Stuck()
    cluster.join("b", "c")
    cluster.settle_voters("abc")
    cluster.run(5)
    stuck = cluster.leader.name
    others = [host for host in cluster.hosts.values() if host.name != stuck]
    for _ in range(40):
        cluster.propose("c", e.DrainPeer(peer=ident("c"), draining=False))
        cluster.run(0.1)
        assert all(host.deadline > host.clock(cluster.now) for host in others)
    assert cluster.leader.name != stuck
    assert len({host.state.index for host in others}) == 1
    assert {effect.peer for host in others for effect in host.lost} <= {ident(stuck)}


def scene_with_a_snapshot_to_send(line: str = "tap a c") -> Scene:
    """c lacks what only a snapshot has, and a sends the first parts of it; `line` is what becomes of them, or
    of the answers."""
    scene = Scene("a b c")
    scene.play(f"""
        campaign a
        cut c
        propose a one two three four five six
        compact a 8 9
        heal
        {line}
    """)
    scene.feed("a", Received("c", Appended(2, False, 2, 1, 2)))
    scene.settle()
    return scene


def parts(scene: Scene) -> list[int]:
    return [send.message.offset for _, send in scene.sent if isinstance(send.message, SnapshotPart)]


def test_a_part_that_is_only_late_is_not_sent_again() -> None:
    scene = scene_with_a_snapshot_to_send()
    begun = parts(scene)
    for _ in range(30):
        scene.play("beat a")
    assert parts(scene) == begun == [0, 4, 8, 12]
    scene.play("""
        pour
        c applied=one,two,three,four,five,six
    """)
    assert len(set(parts(scene))) == len(parts(scene))


def test_answers_in_the_wrong_order_make_nothing_begin_again() -> None:
    scene = scene_with_a_snapshot_to_send()
    number = max(s.message.round for _, s in scene.sent if isinstance(s.message, SnapshotPart))
    for received in (16, 4, 12, 8, 16, 0):
        scene.feed("a", Received("c", SnapshotTaken(2, 8, received, number)))
    assert len(set(parts(scene))) == len(parts(scene))
    scene.feed("a", Received("c", SnapshotTaken(2, 8, 0, number + 1)))
    assert parts(scene).count(0) == 2, "it has forgotten what it had"


def test_a_lost_part_is_sent_again_after_the_next_heartbeat() -> None:
    scene = scene_with_a_snapshot_to_send()
    scene.tapped.clear()
    scene.play("""
        pour
        beat a
        c applied=one,two,three,four,five,six
    """)


def test_a_lost_append_is_sent_again_after_the_next_heartbeats() -> None:
    for lost in ("x", "x y z"):
        scene = Scene("a b c")
        scene.play("""
            campaign a
            beat a
            mute a b
        """)
        for payload in lost.split():
            scene.play(f"propose a {payload}")
        scene.play(f"""
            heal
            beat a
            beat a
            b applied={lost.replace(" ", ",")}
        """)


def test_an_append_that_probes_is_sent_once() -> None:
    """The answer to a heartbeat before it says where the logs agree; it is under way."""
    scene = Scene("a b c")
    scene.play("campaign a")
    appends = [s.message for _, s in scene.sent if s.peer == "b" and isinstance(s.message, Append)]
    assert [len(append.records) for append in appends if append.records] == [1]


@pytest.mark.parametrize(("rate", "delay"), SLOW)
@pytest.mark.parametrize("what", ["snapshot", "records"])
def test_what_a_voter_lacks_gets_over_a_slow_link(what: str, rate: float, delay: float) -> None:
    size = 2_000_000
    stored = founded("abco", **{what: size})
    links = Links("abc", stored, founded("abco", records=1), rate, delay)
    end = stored.commit
    assert links.run(30 + 2 * size / rate + 100 * delay, lambda: links.machines["o"].applied_index >= end)
    assert links.carried < 1.5 * size


@pytest.mark.parametrize("what", ["snapshot", "records"])
@pytest.mark.parametrize("megabits", [1, 3, 10])
def test_a_leader_keeps_the_only_other_voter_while_that_catches_up(what: str, megabits: float) -> None:
    stored = founded("ao", **{what: 4_000_000})
    links = Links("a", stored, founded("ao", records=1), megabits * MEGABIT, 0.02)
    end = stored.commit
    assert links.run(100, lambda: links.machines["o"].applied_index >= end)
    assert [became.term for _, became in links.roles if became.role == "leader"] == [2]
