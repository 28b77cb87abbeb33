# SPDX-License-Identifier: Apache-2.0
"""Who votes: how many, spread over sites, changed only for a reason, never beyond what can be committed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.entries import Member
from proto.raft.configuration import Configuration
from proto.raft.events import ChangeVoters, TransferTo
from proto.voters import Electorate, Look, choose, size, step

DEAD_AFTER = 10.0


def member(peer: str, site: str = "", **more: Any) -> Member:
    return Member(id=peer, name=f"peer-{peer}", site=site, address="h:1", certificate=b"", **more)


def electorate(members: str, voters: str, own: str = "a", dead: str = "", **more: Any) -> Electorate:
    """Members by letter, alive unless `dead` (for long); `sites` is one letter per member."""
    sites = more.pop("sites", "-" * len(members))
    fields = {"left": {"status": "left"}, "draining": {"draining": True}}
    flags = {name: more.pop(name, "") for name in fields}
    known = {}
    for peer, site in zip(members, sites, strict=True):
        extra: dict[str, Any] = {}
        for name, peers in flags.items():
            extra |= fields[name] if peer in peers else {}
        known[peer] = member(peer, site, **extra)
    looks = {peer: Look("dead" if peer in dead else "alive", 0.0, 0.001) for peer in members if peer != own}
    return Electorate(
        members=known,
        looks=more.pop("looks", looks),
        configuration=more.pop("configuration", Configuration(voters=frozenset(voters))),
        recovering=more.pop("recovering", ""),
        current=more.pop("current", members),
        lagging=more.pop("lagging", ""),
        own=own,
        now=more.pop("now", 100.0),
        dead_after=DEAD_AFTER,
    )


def change(voters: str) -> ChangeVoters:
    return ChangeVoters(frozenset(voters))


def test_the_number_of_voters() -> None:
    assert [size(members) for members in range(1, 8)] == [1, 1, 3, 3, 5, 5, 5]


@pytest.mark.parametrize(
    ("members", "voters", "wanted"),
    [
        ("a", "a", None),
        ("ab", "a", None),
        ("abc", "a", "abc"),
        ("abcd", "abc", None),
        ("abcde", "abc", "abcde"),
        ("abcdefg", "abcde", None),
    ],
)
def test_a_mesh_grows(members: str, voters: str, wanted: str | None) -> None:
    assert step(electorate(members, voters)) == (change(wanted) if wanted else None)


def test_a_mesh_shrinks() -> None:
    assert step(electorate("abcde", "abcde", left="e")) == change("acd")
    assert step(electorate("abcde", "abc", left="cde")) == change("a")
    assert step(electorate("ab", "ab")) == change("a")


def test_newcomers_come_in_pairs_and_alive() -> None:
    assert step(electorate("abc", "a", dead="c")) is None
    assert step(electorate("abcd", "a", dead="c")) == change("abd")
    assert step(electorate("abc", "a", looks={"b": Look("alive", 0.0)})) is None


def test_a_voter_is_replaced_if_somebody_can_take_its_place() -> None:
    assert step(electorate("abcd", "abc", dead="c")) == change("abd")
    assert step(electorate("abcd", "abc", draining="c")) == change("abd")
    assert step(electorate("abcd", "abc", left="c")) == change("abd")
    assert step(electorate("abc", "abc", dead="c")) is None
    assert step(electorate("abc", "abc", draining="c")) is None
    assert step(electorate("abcd", "abc", draining="cd")) is None


def test_one_that_drains_votes_if_there_are_too_few_others() -> None:
    assert step(electorate("abc", "ab", draining="c")) == change("abc")
    assert step(electorate("abcd", "abc", draining="c", looks={"d": Look("dead", 0.0)})) is None
    assert step(electorate("abcd", "abc", draining="c")) == change("abd")


def test_a_voter_that_is_silent_for_a_moment_stays() -> None:
    looks = {"b": Look("alive", 0.0), "c": Look("dead", 95.0), "d": Look("alive", 0.0)}
    assert step(electorate("abcd", "abc", looks=looks)) is None
    assert step(electorate("abcd", "abc", looks=looks, now=105.0)) == change("abd")


def test_a_voter_that_lost_records_goes_and_comes_back_as_a_learner() -> None:
    assert step(electorate("abc", "abc", recovering="c")) == change("ab")
    assert step(electorate("abc", "ab")) == change("abc")
    assert step(electorate("abcd", "abc", recovering="c")) == change("abd")


def test_nothing_is_tried_that_cannot_be_committed() -> None:
    assert step(electorate("abcd", "abc", dead="bc")) is None
    assert step(electorate("abcdefg", "abcde", dead="cde")) is None
    joint = Configuration(voters=frozenset("abd"), outgoing=frozenset("abc"))
    assert step(electorate("abcd", "", configuration=joint, dead="c")) is None


def test_voters_are_spread_over_sites() -> None:
    assert step(electorate("abcde", "abc", sites="xxxyz", left="b")) == change("ade")
    spread = electorate("abcdefg", "a", sites="xxxyyzz")
    assert spread.spread(choose(spread)) == (2, 2, 1)


def test_a_better_spread_is_worth_a_swap_only_if_everybody_is_alive() -> None:
    assert step(electorate("abcd", "abc", sites="xxyz")) == change("acd")
    assert step(electorate("abcd", "abc", sites="xyyz")) in (change("abd"), change("acd"))
    assert step(electorate("abcd", "abc", sites="xyzz")) is None
    looks = {"b": Look("suspect", 99.0), "c": Look("alive", 0.0), "d": Look("alive", 0.0)}
    assert step(electorate("abcd", "abc", sites="xxyz", looks=looks)) is None


def test_the_leader_hands_over_before_it_goes() -> None:
    near = {"b": Look("alive", 0.0, 0.050), "c": Look("alive", 0.0, 0.001), "d": Look("alive", 0.0, 0.1)}
    assert step(electorate("abcd", "abc", draining="a", looks=near)) == TransferTo("c")
    assert step(electorate("abcd", "abc", left="a", looks=near)) == TransferTo("c")
    assert step(electorate("abcd", "abc", own="c", left="a")) == change("bcd")


def test_the_only_voter_leaves_by_way_of_two() -> None:
    assert step(electorate("ab", "a", left="a")) == change("ab")
    assert step(electorate("ab", "ab", left="a")) == TransferTo("b")
    assert step(electorate("ab", "ab", own="b", left="a")) == change("b")
    assert step(electorate("ab", "a", draining="a")) == change("ab")
    assert step(electorate("a", "a", draining="a")) is None


meshes = st.builds(
    lambda rows, own, recovering: (rows, own, recovering),
    st.lists(
        st.tuples(
            st.sampled_from("xyz"),
            st.sampled_from(["member", "member", "member", "draining", "left"]),
            st.sampled_from(["alive", "alive", "suspect", "dead"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=9,
    ),
    st.integers(0, 8),
    st.sets(st.integers(0, 8), max_size=2),
)


@settings(max_examples=300)
@given(meshes)
def test_whatever_the_mesh_it_comes_to_rest_and_every_step_can_be_committed(mesh: Any) -> None:
    rows, first, recovering = mesh
    names = "abcdefghi"[: len(rows)]
    own = names[first % len(rows)]
    voters = {peer for peer, row in zip(names, rows, strict=True) if row[3]} | {own}
    voters = set(sorted(voters - {own})[:4]) | {own}
    members = {
        peer: member(
            peer, site, status="left" if status == "left" else "member", draining=status == "draining"
        )
        for peer, (site, status, _, _) in zip(names, rows, strict=True)
    }
    looks = {peer: Look(row[2], 0.0, 0.001) for peer, row in zip(names, rows, strict=True) if peer != own}
    ill = {names[place] for place in recovering if place < len(names)} - {own}
    for _ in range(12):
        configuration = Configuration(voters=frozenset(voters))
        now = Electorate(members, looks, configuration, ill & voters, names, "", own, 100.0, DEAD_AFTER)
        taken = step(now)
        assert step(now) == taken
        if taken is None:
            return
        if isinstance(taken, TransferTo):
            assert taken.peer in voters - {own}
            assert now.able(taken.peer)
            looks = {**looks, own: Look("alive", 0.0, 0.001)}
            own = taken.peer
            continue
        assert taken.voters != voters
        assert own in taken.voters
        for decisive in (voters, taken.voters):
            assert 2 * sum(now.able(peer) for peer in decisive) > len(decisive)
        voters = set(taken.voters)
        ill -= ill - voters
    pytest.fail(f"the voters never come to rest: {rows} {own} {voters}")
