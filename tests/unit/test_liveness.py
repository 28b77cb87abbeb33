# SPDX-License-Identifier: Apache-2.0
"""Silence makes a peer suspect, then dead; an answer makes it alive."""

from __future__ import annotations

from proto.liveness import DEAD_AFTER, SUSPECT_AFTER, Answered, Liveness, Members, Ping, Tick, Turned


def test_silence_and_return() -> None:
    machine = Liveness()
    machine.handle(Members(frozenset({"a", "b"})), 0.0)
    assert machine.handle(Tick(), 0.5) == [Ping("a"), Ping("b")]
    machine.handle(Answered("a", 0.1), 1.0)
    assert Turned("b", "suspect") in machine.handle(Tick(), SUSPECT_AFTER)
    assert machine.state("a") == "alive"
    assert machine.handle(Tick(), DEAD_AFTER)[-2:] == [Turned("a", "suspect"), Turned("b", "dead")]
    assert machine.handle(Answered("b", 0.2), DEAD_AFTER + 1)[-1:] == [Turned("b", "alive")]


def test_the_round_trip_is_smoothed() -> None:
    machine = Liveness()
    machine.handle(Members(frozenset({"a"})), 0.0)
    assert machine.rtt("a") is None
    machine.handle(Answered("a", 0.8), 1.0)
    machine.handle(Answered("a", 1.6), 2.0)
    assert machine.rtt("a") == 0.8 + 0.8 / 8


def test_strangers_are_dead_and_their_answers_nothing() -> None:
    machine = Liveness()
    assert machine.handle(Answered("x", 0.1), 0.0) == []
    assert machine.state("x") == "dead"
    machine.handle(Members(frozenset({"x"})), 0.0)
    machine.handle(Members(frozenset()), 1.0)
    assert machine.rtt("x") is None
