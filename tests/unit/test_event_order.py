# SPDX-License-Identifier: Apache-2.0
"""One order of events: stamps that respect causes, and streams merged by them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import hlc
from proto.event_order import Merge

# Stamps.


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.floats(0, 500)), max_size=60))
def test_what_follows_from_something_has_a_larger_stamp(steps: list[tuple[int, int, float]]) -> None:
    """Three peers whose clocks show what they like; each step sends a message from one to another."""
    clocks = [hlc.Clock() for _ in range(3)]
    for source, target, wall in steps:
        sent = clocks[source].tick(wall)
        clocks[target].witness(sent, wall)
        assert clocks[target].tick(0.0) > sent


def test_a_stamp_stays_close_to_the_time_of_day() -> None:
    clock = hlc.Clock()
    first = clock.tick(1_800_000_000.123)
    assert hlc.time_of(first) == pytest.approx(1_800_000_000.123, abs=0.001)
    assert clock.tick(1_800_000_000.123) == first + 1
    assert hlc.time_of(clock.tick(1_800_000_007.0)) == pytest.approx(1_800_000_007.0, abs=0.001)


def test_a_clock_that_is_simply_wrong_is_not_followed() -> None:
    clock = hlc.Clock()
    clock.witness(hlc.of_time(5_000_000_000.0), 1_800_000_000.0)
    assert hlc.time_of(clock.tick(1_800_000_000.0)) < 1_800_000_001


def test_a_full_counter_carries_on() -> None:
    clock = hlc.Clock((1 << hlc.COUNTER_BITS) - 1)
    assert clock.tick(0.0) == 1 << hlc.COUNTER_BITS


# Merging.


def released(merge: Merge, now: float, limit: float = float("inf")) -> list[tuple[Any, bool]]:
    merge.silent(now)
    return [(event["n"], late) for event, late in merge.release(now, limit)]


def two() -> Merge:
    merge = Merge(hold=2.0)
    merge.expect("a", 0.0)
    merge.expect("b", 0.0)
    return merge


def test_an_event_waits_until_nothing_can_come_before_it() -> None:
    merge = two()
    merge.event("a", 10, {"n": 10}, 0.1)
    assert released(merge, 0.2) == []
    merge.event("b", 7, {"n": 7}, 0.2)
    assert released(merge, 0.3) == [(7, False)]
    merge.heartbeat("b", 12, 0.4)
    assert released(merge, 0.4) == [(10, False)]


def test_a_silent_peer_holds_nobody_up_for_long_and_comes_late() -> None:
    merge = two()
    merge.heartbeat("a", 5, 0.0)
    merge.heartbeat("b", 5, 0.0)
    for now in range(1, 4):
        merge.event("a", 10 * now, {"n": 10 * now}, float(now))
    assert merge.silent(3.0) == ["b"]
    assert merge.silent(3.1) == []
    assert released(merge, 3.1) == [(10, False), (20, False), (30, False)]
    merge.event("b", 15, {"n": 15}, 3.2)
    merge.heartbeat("b", 40, 3.2)
    assert released(merge, 3.2) == [(15, True)]
    merge.event("a", 35, {"n": 35}, 3.3)
    assert released(merge, 3.3) == [(35, False)]


def test_what_comes_twice_is_printed_once() -> None:
    merge = two()
    merge.end("b")
    for _ in range(2):
        merge.event("a", 3, {"n": 3}, 0.0)
    assert released(merge, 0.0) == [(3, False)]
    assert merge.position("a") == 3
    assert not merge.ended
    merge.end("a")
    assert merge.ended


def test_a_reader_that_goes_on_gets_only_what_is_new() -> None:
    merge = Merge(2.0)
    merge.expect("a", 0.0, after=5)
    merge.event("a", 4, {"n": 4}, 0.0)
    merge.event("a", 6, {"n": 6}, 0.0)
    assert released(merge, 0.0) == [(6, False)]


def test_a_wrong_clock_makes_no_other_event_late() -> None:
    merge = two()
    merge.event("a", 10**9, {"n": "wrong"}, 0.0)
    merge.heartbeat("b", 10, 2.5)
    assert released(merge, 2.5, limit=1000) == [("wrong", True)]
    merge.event("b", 20, {"n": 20}, 2.6)
    merge.end("a")
    assert released(merge, 2.6, limit=1000) == [(20, False)]


STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=40)


@given(STEPS, st.lists(st.integers(0, 2), max_size=80), st.lists(st.integers(0, 2), max_size=80))
def test_all_followers_print_the_same_whatever_the_network_does(
    made: list[tuple[str, int]], one: list[int], other: list[int]
) -> None:
    """Events of three peers reach two followers, each stream in order, the streams mixed in any way."""
    streams: dict[str, list[int]] = {peer: [] for peer in "abc"}
    stamps = dict.fromkeys("abc", 0)
    for peer, step in made:
        stamps[peer] += step + 1
        streams[peer].append(stamps[peer])
    seen = []
    for mixing in (one, other):
        merge, printed = Merge(hold=2.0), []
        for peer in "abc":
            merge.expect(peer, 0.0)
        left = {peer: list(stream) for peer, stream in streams.items()}
        for choice in [*mixing, *(n % 3 for n in range(3 * len(made)))]:
            peer = "abc"[choice]
            if left[peer]:
                stamp = left[peer].pop(0)
                merge.event(peer, stamp, {"n": (stamp, peer)}, 0.0)
            printed += released(merge, 0.0)
        for peer in "abc":
            merge.heartbeat(peer, 10**6, 0.0)
        printed += released(merge, 0.0)
        seen.append(printed)
    assert seen[0] == seen[1]
    assert [key for key, _ in seen[0]] == sorted((stamp, peer) for peer in "abc" for stamp in streams[peer])
    assert not any(late for _, late in seen[0])
