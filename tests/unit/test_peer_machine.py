# SPDX-License-Identifier: Apache-2.0
"""The machine of a peer, a few of them together: what is promised holds across deaths, cuts and pauses."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from proto import entries as e
from proto.lease_events import Granted, Renew
from proto.machine import WakeAt, Woken
from proto.peer import Peer
from proto.peer_events import Applied, Fence, Forward, GivenUp, Proposed, Settings
from proto.raft import events as raft
from proto.raft import messages, replica
from tests.unit.peer_cluster import EPOCH, Cluster, Host, ident


def token(id: str) -> e.AddToken:
    return e.AddToken(token=e.Token(id=id, secret_hash=b"", role="peer", uses=1, expires=2e9))


def guest(name: str, owner: str, **more: Any) -> e.AddGuest:
    more = {"on_partition": "freeze", "memory": 64 << 20} | more
    return e.AddGuest(guest=e.Guest(key=f"lab/{name}", id=name, image="mini", owner=ident(owner), **more))


def mesh(names: str, voters: str, settings: Settings | None = None) -> Cluster:
    """Peers that all hold a lease, with these voters."""
    cluster = Cluster(settings)
    cluster.join(*names[1:])
    cluster.settle_voters(voters)
    cluster.until(lambda: all(held(cluster, host) for host in cluster.hosts.values()))
    return cluster


def held(cluster: Cluster, host: Host) -> bool:
    return host.deadline > host.clock(cluster.now)


def times(host: Host, id: str) -> int:
    """How often an `AddToken` took effect at this peer."""
    entries = [a.proposal.entry for a in host.applied if a.proposal and not a.refused and not a.repeated]
    return sum(isinstance(entry, e.AddToken) and entry.token.id == id for entry in entries)


# Alone.


def test_a_founder_leads_at_once_and_has_a_lease() -> None:
    cluster = Cluster()
    cluster.until(lambda: cluster.hosts["a"].deadline > 0.0, limit=0.1)
    assert cluster.leader.machine.leader == ident("a")
    cluster.commit("a", token("x"), limit=0.1)
    assert cluster.leader.state.time >= EPOCH


def test_a_founder_that_starts_again_has_all_that_was_acknowledged() -> None:
    cluster = Cluster()
    cluster.commit("a", token("x"))
    before = cluster.hosts["a"].state
    cluster.crash("a")
    again = cluster.restart("a")
    cluster.until(lambda: again.state.index >= before.index, limit=2.0)
    assert again.state.tokens == before.tokens
    cluster.commit("a", token("y"))


# Proposals.


def test_a_long_log_is_applied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "AT_ONCE", 4)
    cluster = Cluster()
    for number in range(10):
        cluster.commit("a", token(f"t{number}"))
    stored = cluster.hosts["a"].disk.stored
    end = cluster.hosts["a"].state.index
    machine = Peer(ident("a"), replace(stored, commit=end), Settings(), random.Random(1))
    parts = 0
    while machine.behind or not parts:
        effects = machine.handle(Woken(raft.TIMER), 1.0)
        assert sum(isinstance(effect, Applied) for effect in effects) <= 4
        assert not machine.behind or any(isinstance(effect, WakeAt) for effect in effects)
        parts += 1
    assert machine.state.index >= end
    assert parts > 2


def test_proposals_of_all_peers_become_true_everywhere_with_the_coordinators_time() -> None:
    cluster = mesh("abcd", "abc")
    for name in "abcd":
        cluster.commit(name, token(f"of-{name}"))
    cluster.run(1.0)
    for host in cluster.hosts.values():
        assert {f"of-{name}" for name in "abcd"} <= set(host.state.tokens)
        assert EPOCH < host.state.time < EPOCH + cluster.now


def test_a_forwarded_proposal_whose_coordinator_dies_is_applied_exactly_once() -> None:
    cluster = mesh("abc", "abc")
    sent: list[str] = []

    def drop(source: Host, _target: Host, message: Any) -> bool:
        """The coordinator's record reaches the others; that it is committed is never heard of."""
        if source.name == "a" and isinstance(message, messages.Append) and message.records and not sent:
            cluster.at(cluster.now + 0.0005, lambda: cluster.crash("a"))
        elif source.name == "a" and sent:
            return True
        return False

    outcome = cluster.propose("b", token("once"))
    cluster.drop = drop
    cluster.until(outcome)
    cluster.run(2.0)
    assert cluster.leader.name in "bc"
    copies = [
        record for record in cluster.records("c") if record.kind == "command" and b"once" in record.payload
    ]
    assert len(copies) == 2, "the scenario is that it was appended by both coordinators"
    assert times(cluster.hosts["b"], "once") == times(cluster.hosts["c"], "once") == 1
    repeated = [applied for applied in cluster.hosts["b"].applied if applied.repeated]
    assert len(repeated) == 1
    assert repeated[0].refused is None


def test_a_refusal_stays_a_refusal_for_a_second_copy_of_the_proposal() -> None:
    cluster = mesh("abc", "abc")
    again = cluster.proposal("b", e.RemoveUser(user="nobody"))
    cluster.feed(cluster.hosts["b"], Proposed(again, EPOCH))
    cluster.run(0.5)
    first = [a for a in cluster.hosts["b"].applied if a.proposal and a.proposal.entry == again.entry]
    assert [a.refused.code for a in first if a.refused] == ["not-found"]
    leader = cluster.leader
    stamped = e.encode(again.model_copy(update={"time": EPOCH + 1}))
    leader.machine._inbox.append(raft.Propose((stamped,)))
    cluster.run(0.5)
    copies = [a for a in leader.applied if a.proposal and a.proposal.entry == again.entry]
    assert [(a.repeated, a.refused.code if a.refused else "") for a in copies] == [
        (False, "not-found"),
        (True, "not-found"),
    ]


def test_nobody_speaks_for_another() -> None:
    cluster = mesh("abc", "abc")
    forged = cluster.proposal("c", token("forged"))
    nameless = forged.model_copy(update={"client": ""})
    message = Forward((e.encode(forged), e.encode(nameless), b"\xc1"))
    cluster.feed(cluster.leader, raft.Received(ident("b"), message))
    cluster.feed(cluster.leader, raft.Received("f" * 16, Forward((e.encode(forged),))))
    cluster.run(1.0)
    assert "forged" not in cluster.leader.state.tokens


def test_many_proposals_at_once_are_all_done_although_the_log_remembers_few() -> None:
    cluster = mesh("abc", "abc")
    outcomes = [cluster.propose("b", token(f"t{number}")) for number in range(600)]
    cluster.until(lambda: all(outcome() for outcome in outcomes), limit=60.0)
    assert all(applied and applied.refused is None for applied in (outcome() for outcome in outcomes))


def test_a_proposal_is_refused_at_once_if_it_is_too_large_and_forgotten_if_given_up() -> None:
    cluster = mesh("abc", "abc")
    huge = e.AddToken(token=e.Token(id="h", secret_hash=bytes(4 << 20), role="peer", uses=1, expires=2e9))
    applied = cluster.propose("b", huge)()
    assert applied
    assert applied.refused
    assert applied.refused.code == "too-large"
    cluster.split("b", "ac")
    outcome = cluster.propose("b", token("late"))
    cluster.feed(cluster.hosts["b"], GivenUp(cluster.hosts["b"].sequence))
    cluster.split()
    cluster.run(5.0)
    assert outcome() is None


def test_a_proposal_of_an_earlier_start_with_the_same_sequence_settles_nothing() -> None:
    cluster = mesh("abc", "abc")
    held_up: list[Any] = []

    def drop(source: Host, _target: Host, message: Any) -> bool:
        if isinstance(message, Forward) and source.name == "b" and not held_up:
            held_up.append(message)
            return True
        return source.name == "b" and isinstance(message, Forward)

    cluster.drop = drop
    cluster.hosts["b"].sequence = 100
    cluster.propose("b", token("old"))
    cluster.crash("b")
    again = cluster.restart("b")
    again.sequence = 100
    cluster.until(lambda: again.machine.leader)
    outcome = cluster.propose("b", token("new"))
    cluster.feed(cluster.leader, raft.Received(ident("b"), held_up[0]))
    cluster.run(1.0)
    assert times(again, "old") == 1
    assert outcome() is None
    cluster.drop = lambda *_: False
    cluster.until(outcome)


def test_what_is_proposed_in_a_minority_waits_and_becomes_true_afterwards() -> None:
    cluster = mesh("abc", "abc")
    cluster.split("a", "bc")
    outcome = cluster.propose("a", token("later"))
    cluster.run(5.0)
    assert outcome() is None
    assert cluster.hosts["a"].machine.coordinator is None
    cluster.split()
    cluster.until(outcome)
    cluster.run(1.0)
    assert [times(host, "later") for host in cluster.hosts.values()] == [1, 1, 1]


def test_own_proposals_that_a_snapshot_hides_are_answered_all_the_same() -> None:
    cluster = mesh("abcd", "abc", Settings(compact_records=30, keep_records=5))
    cluster.run(1.0)
    cut_off: list[bool] = []
    cluster.drop = lambda _source, target, _message: bool(cut_off) and target.name == "d"
    done, refused = cluster.propose("d", token("hidden")), cluster.propose("d", e.RemoveUser(user="nobody"))
    cut_off.append(True)
    for number in range(60):
        cluster.commit("a", token(f"t{number}"))
    assert done() is None
    cluster.drop = lambda *_: False
    cluster.until(lambda: done() and refused())
    found, failed = done(), refused()
    assert found
    assert found.repeated
    assert found.refused is None
    assert failed
    assert failed.refused
    assert failed.refused.code == "not-found"


# Reads.


@pytest.mark.parametrize("name", ["a", "c", "e"])
def test_what_is_read_is_as_new_as_what_was_acknowledged(name: str) -> None:
    cluster = mesh("abcdef", "abcde")
    cluster.commit("b", token("x"))
    host = cluster.hosts[name]
    cluster.feed(host, raft.Read(5))
    cluster.until(lambda: host.readable)
    assert host.readable[0].cookie == 5
    assert "x" in host.readable[0].state.tokens


def test_a_read_in_a_minority_fails() -> None:
    cluster = mesh("abc", "abc")
    cluster.split("c", "ab")
    cluster.feed(cluster.hosts["c"], raft.Read(5, fresh=True))
    cluster.until(lambda: cluster.hosts["c"].failed, limit=10.0)
    assert cluster.hosts["c"].failed == [raft.ReadFailed(5)]


# Voters.


def test_a_mesh_grows_to_five_voters_and_shrinks_to_one_that_is_not_its_founder() -> None:
    cluster = mesh("abcdefg", "abcde")
    for name, voters in (("e", 5), ("a", 5), ("f", 3), ("b", 3), ("c", 1)):
        cluster.commit("g", e.RemovePeer(peer=ident(name), force=True))
        cluster.until(lambda name=name, voters=voters: _settled_without(cluster, name, voters))
        cluster.crash(name)
    cluster.commit("g", token("still"))


def _settled_without(cluster: Cluster, name: str, count: int) -> bool:
    if not cluster.leads("abcdefg"):
        return False
    configuration = cluster.leader.machine.configuration
    return (
        not configuration.joint
        and ident(name) not in configuration.voters
        and len(configuration.voters) == count
    )


def test_two_that_leave_at_once_do_not_strand_the_third() -> None:
    """Each is dispensable, both together are not: the second waits until the voters have been changed."""
    cluster = mesh("abc", "abc")
    outcomes = {name: cluster.propose(name, e.RemovePeer(peer=ident(name))) for name in "bc"}
    gone: set[str] = set()
    for _ in "bc":
        cluster.until(lambda: any(outcomes[name]() for name in set("bc") - gone))
        for name in set("bc") - gone:
            if outcomes[name]():
                gone.add(name)
                cluster.crash(name)
                cluster.see_dead(name)
    cluster.commit("a", token("still"))
    cluster.settle_voters("a")


def test_a_sole_voter_that_leaves_first_gives_its_vote_away() -> None:
    cluster = mesh("ab", "a")
    outcome = cluster.propose("a", e.RemovePeer(peer=ident("a")))
    cluster.run(5.0)
    assert outcome() is None
    cluster.commit("b", e.DrainPeer(peer=ident("a"), draining=True))
    cluster.until(outcome)
    cluster.crash("a")
    cluster.commit("b", token("still"))
    assert cluster.voters() == "b"


def test_who_leaves_while_about_to_become_a_voter_becomes_none() -> None:
    cluster = mesh("abcd", "abc")
    cluster.stuck["d"] = []
    cluster.commit("a", e.DrainPeer(peer=ident("c"), draining=True))
    cluster.run(2.0)
    cluster.commit("a", e.RemovePeer(peer=ident("b")))
    outcome = cluster.propose("a", e.RemovePeer(peer=ident("d")))
    cluster.until(outcome)
    cluster.disk_goes_on("d")
    cluster.run(0.3)
    for name in "bd":
        cluster.crash(name)
    cluster.see_dead("b", "d")
    cluster.commit("a", token("still"))


def test_an_heir_that_cannot_catch_up_holds_up_nobody() -> None:
    cluster = mesh("abcd", "abc")
    cluster.stuck["b"] = []
    cluster.commit("a", e.DrainPeer(peer=ident("a"), draining=True))
    for number in range(10):
        cluster.commit("d", token(f"t{number}"), limit=3.0)
        cluster.run(1.0)
    cluster.until(lambda: cluster.leads("cd"))


def test_a_newcomer_that_cannot_catch_up_leaves_its_place_to_another() -> None:
    cluster = mesh("abcde", "abcde", Settings())
    cluster.join("f", "g")
    cluster.stuck["f"] = []
    cluster.commit("a", e.DrainPeer(peer=ident("c"), draining=True))
    cluster.settle_voters("abdeg")


def test_a_voter_that_lost_its_log_recovers_although_its_place_cannot_be_taken() -> None:
    cluster = mesh("abcd", "abc")
    cluster.stuck["d"] = []
    cluster.crash("c")
    cluster.hosts["c"].disk.stored = raft.Stored(recovering=True)
    cluster.restart("c", "ab")
    cluster.until(lambda: not cluster.hosts["c"].machine.raft.recovering)
    cluster.settle_voters("abc")


def test_a_peer_whose_log_knows_only_who_has_left_asks_those_it_last_knew() -> None:
    """After a power cut the log may end before the members that were kept beside it joined."""
    cluster = mesh("ad", "a")
    cluster.commit("a", e.DrainPeer(peer=ident("d"), draining=True))  # it never votes
    before = replace(deepcopy(cluster.hosts["d"].disk.stored), commit=cluster.hosts["d"].state.index)
    cluster.join("b", "c")
    cluster.settle_voters("abc")
    cluster.commit("b", e.RemovePeer(peer=ident("a"), force=True))
    for name in "abcd":
        cluster.crash(name)
    for name in "bc":
        cluster.restart(name)  # who feeds nobody that has not asked since
    cluster.hosts["d"].disk.stored = before
    again = cluster.restart("d", "bc")
    assert again.state.members.keys() == {ident("a"), ident("d")}
    cluster.until(lambda: again.state.members[ident("a")].status == "left")


def test_learners_that_nobody_wants_any_more_are_none_for_long() -> None:
    cluster = mesh("abcd", "abc")
    cluster.stuck["d"] = []
    cluster.commit("a", e.DrainPeer(peer=ident("c"), draining=True))
    cluster.until(lambda: cluster.leader.machine.configuration.learners)
    cluster.commit("a", e.DrainPeer(peer=ident("c"), draining=False))
    cluster.until(lambda: not cluster.leader.machine.configuration.learners, limit=5.0)


def test_a_voter_that_stays_dead_is_replaced() -> None:
    cluster = mesh("abcd", "abc")
    cluster.crash("b")
    cluster.see_dead("b")
    cluster.run(5.0)
    assert cluster.voters() == "abc"
    cluster.settle_voters("acd")


def test_a_draining_leader_hands_over() -> None:
    cluster = mesh("abcd", "abc")
    cluster.commit("d", e.DrainPeer(peer=ident("a"), draining=True))
    cluster.until(lambda: cluster.leads("bcd") and _settled_without(cluster, "a", 3), limit=20.0)
    cluster.run(2.0)
    assert held(cluster, cluster.hosts["a"])


# Leases.


def test_a_far_peer_is_allowed_a_long_lease() -> None:
    cluster = mesh("abc", "abc")
    assert {member.lease for member in cluster.leader.state.members.values()} == {1.5}
    cluster.see("a", "c", rtt=0.2)
    cluster.until(lambda: cluster.leader.state.members[ident("c")].lease == 10.0)
    cluster.see("a", "c", rtt=0.001)
    cluster.run(10.0)
    assert cluster.leader.state.members[ident("c")].lease == 10.0
    assert cluster.hosts["c"].deadline > cluster.now + 5.0


def test_only_the_coordinator_itself_decides_leases() -> None:
    cluster = mesh("abc", "abc")
    outcome = cluster.propose("b", e.SetLease(peer=ident("b"), duration=60.0))
    cluster.until(outcome)
    applied = outcome()
    assert applied
    assert applied.refused
    assert applied.refused.code == "forbidden"


@pytest.mark.parametrize("seed", range(8))
def test_no_guest_has_the_right_to_run_twice_whatever_is_cut_paused_or_drifts(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(rates=dict(zip("abcd", rng.choices([1.005, 1.0, 1 / 1.005], k=4), strict=True)))
    cluster.join("b", "c", "d")
    for name in "abcd":
        cluster.commit("a", guest(f"of-{name}", name))
    for _ in range(40):
        what = rng.random()
        if what < 0.4:
            names = rng.sample("abcd", 4)
            cut = rng.randrange(1, 4)
            cluster.split("".join(names[:cut]), "".join(names[cut:]))
        elif what < 0.6:
            cluster.split()
        elif what < 0.8:
            cluster.pause(rng.choice("abcd"), rng.uniform(0.1, 4.0))
        _watch(cluster, cluster.now + rng.uniform(0.1, 2.0))
    cluster.split()
    cluster.until(lambda: all(held(cluster, host) for host in cluster.hosts.values()))
    epochs = [guest.epoch for guest in cluster.leader.state.guests.values()]
    assert max(epochs) > 1, "nothing was ever failed over"


def _watch(cluster: Cluster, end: float) -> None:
    """Let time pass; at every moment each guest may run at one peer at most."""
    while cluster.next_at() < end:
        cluster.step()
        holders = [host for host in cluster.hosts.values() if held(cluster, host)]
        running = [guest.key for host in holders for guest in host.state.guests_of(host.id)]
        assert len(running) == len(set(running)), f"{running} at {cluster.now}"
    cluster.now = end


def test_a_fence_bars_a_renewal_that_races_it() -> None:
    cluster = mesh("abc", "abc")
    leader, other = cluster.leader, cluster.hosts["c"]
    cluster.drop = lambda source, _target, message: source is other and isinstance(message, Renew)
    cluster.until(lambda: any(lost.peer == other.id for lost in leader.lost))
    cluster.drop = lambda *_: False
    cluster.sent.clear()
    number = other.machine._holder._number
    cluster.feed(other, e_woken())
    cluster.run(0.0011)
    assert leader.machine.coordinator
    fenced = Fence(other.id, token("fenced"), leader.machine.raft.term, EPOCH + cluster.now)
    cluster.feed(leader, fenced)
    cluster.until(lambda: held(cluster, other))
    index = next(a.index for a in other.applied if a.proposal and "fenced" in str(a.proposal.entry))
    grants = [m for source, to, m in cluster.sent if isinstance(m, Granted) and to == "c"]
    assert grants
    assert all(grant.index >= index for grant in grants)
    assert all(grant.number > number + 1 for grant in grants), "the racing request was not granted"


def e_woken() -> Any:
    from proto.machine import Woken

    return Woken("lease")


def test_a_fence_is_dropped_if_the_lease_is_not_out_or_the_term_is_another() -> None:
    cluster = mesh("abc", "abc")
    leader = cluster.leader
    term = leader.machine.raft.term
    cluster.feed(leader, Fence(ident("c"), token("early"), term, EPOCH))
    cluster.crash("c")
    cluster.until(lambda: any(lost.peer == ident("c") for lost in leader.lost))
    cluster.feed(leader, Fence(ident("c"), token("old"), term - 1, EPOCH))
    cluster.feed(leader, Fence(ident("c"), token("good"), term, EPOCH))
    cluster.run(1.0)
    assert {"early", "old", "good"} & set(leader.state.tokens) == {"good"}


# Failover.


def test_a_lost_peers_lease_bound_guests_start_elsewhere_and_it_finds_that_out_when_it_comes_back() -> None:
    cluster = mesh("abcd", "abc")
    for add in (guest("bound", "d"), guest("free", "d", on_partition="run"), guest("other", "b")):
        cluster.commit("a", add)
    cluster.run(1.0)
    cluster.split("d", "abc")
    began = cluster.now
    cluster.until(lambda: cluster.leader.state.guests["lab/bound"].owner != ident("d"))
    assert cluster.now - began < 3.0
    assert not held(cluster, cluster.hosts["d"])
    cluster.run(3.0)
    guests = cluster.leader.state.guests
    moved = guests["lab/bound"]
    assert (moved.epoch, moved.state) == (2, "pending")
    assert (guests["lab/free"].owner, guests["lab/free"].epoch) == (ident("d"), 1)
    assert (guests["lab/other"].owner, guests["lab/other"].epoch) == (ident("b"), 1)
    assert cluster.hosts["d"].state.guests["lab/bound"].owner == ident("d")
    cluster.split()
    cluster.until(lambda: held(cluster, cluster.hosts["d"]))
    assert cluster.hosts["d"].state.guests["lab/bound"] == moved
    assert any(found.peer == ident("d") for found in cluster.leader.found)


def evict_within_its_lease(cluster: Cluster, name: str) -> Host:
    """Evict a peer that is cut off and holds a lease; returns the coordinator."""
    cluster.run(0.5)
    cluster.split(name, "".join(cluster.hosts.keys() - {name}))
    cluster.commit("a", e.RemovePeer(peer=ident(name), force=True))
    assert held(cluster, cluster.hosts[name])
    return cluster.leader


def assert_over(cluster: Cluster, name: str) -> None:
    """The evicted peer holds no lease, and its loss is told no more."""
    assert not held(cluster, cluster.hosts[name])
    leader = cluster.leader
    told = len(leader.lost)
    cluster.run(5.0)
    assert len(leader.lost) == told, "nothing hangs on it any more"


def test_an_evicted_peers_bound_guests_wait_for_its_lease_and_start_elsewhere() -> None:
    cluster = mesh("abcd", "abc")
    cluster.commit("a", guest("bound", "d"))
    cluster.commit("a", guest("free", "d", on_partition="run"))
    leader = evict_within_its_lease(cluster, "d")
    assert leader.state.guests["lab/bound"].state == "fenced"
    assert leader.state.guests["lab/free"].state == "lost"
    cluster.until(lambda: leader.state.guests["lab/bound"].epoch == 2)
    assert_over(cluster, "d")


def test_an_evicted_peers_guest_that_is_not_wanted_running_is_lost_only_when_the_lease_is_out() -> None:
    """Nobody has seen it stop there, so that nobody may start it elsewhere before."""
    cluster = mesh("abcd", "abc")
    cluster.commit("a", guest("going", "d", state="running", wanted="stopped"))
    leader = evict_within_its_lease(cluster, "d")
    assert leader.state.guests["lab/going"].state == "fenced"
    cluster.until(lambda: leader.state.guests["lab/going"].state == "lost")
    assert_over(cluster, "d")


def test_a_guest_for_which_nobody_has_room_is_marked_once_and_goes_on_when_there_is() -> None:
    cluster = mesh("abcd", "abc")
    cluster.commit("a", guest("big", "d", memory=8 << 30))
    cluster.crash("d")
    cluster.until(lambda: cluster.leader.state.guests["lab/big"].state == "fenced")
    index = cluster.leader.state.index
    cluster.run(5.0)
    assert cluster.leader.state.index == index
    cluster.see("a", "b", free=16 << 30)
    cluster.until(lambda: cluster.leader.state.guests["lab/big"].owner == ident("b"))


def test_a_leader_that_dies_in_the_middle_of_a_failover_is_followed_by_one_that_does_it_once() -> None:
    cluster = mesh("abcd", "abc")
    cluster.commit("a", guest("bound", "d"))
    cluster.run(0.5)
    first = cluster.leader
    cluster.crash("d")

    def drop(source: Host, _target: Host, message: Any) -> bool:
        """The first leader's decision never leaves it."""
        records = message.records if isinstance(message, messages.Append) else ()
        if source is first and any(b"fail-over-guest" in record.payload for record in records):
            cluster.at(cluster.now, lambda: cluster.crash(first.name))
            return True
        return False

    cluster.drop = drop
    cluster.until(lambda: not first.up)
    rest = [host for host in cluster.hosts.values() if host.up]
    cluster.until(lambda: all(host.state.guests["lab/bound"].epoch == 2 for host in rest))
    owner = rest[0].state.guests["lab/bound"].owner
    cluster.drop = lambda *_: False
    cluster.restart(first.name)
    cluster.run(5.0)
    assert {host.state.guests["lab/bound"].owner for host in cluster.hosts.values() if host.up} == {owner}
    assert {host.state.guests["lab/bound"].epoch for host in cluster.hosts.values() if host.up} == {2}


# The log is not kept for ever.


def test_the_log_is_compacted_and_a_newcomer_starts_from_a_snapshot() -> None:
    cluster = mesh("abc", "abc", Settings(compact_records=30, keep_records=5))
    for number in range(100):
        cluster.commit("b", token(f"t{number}"))
    cluster.run(0.5)
    assert len(cluster.records("a")) < 50
    assert cluster.hosts["a"].disk.stored.snapshot.index > 50
    cluster.join("d")
    cluster.until(lambda: cluster.hosts["d"].state == cluster.leader.state)
    cluster.crash("c")
    again = cluster.restart("c")
    cluster.until(lambda: again.state == cluster.leader.state)
