# SPDX-License-Identifier: Apache-2.0
"""How much may be under way: what is learned from how long answers take."""

from __future__ import annotations

from proto.raft.pace import Pace


def answer(pace: Pace, number: int, took: float) -> int:
    pace.sent(number, 100.0)
    pace.answered(number, 100.0 + took)
    return pace.window


def test_quick_answers_make_the_window_wide_and_slow_ones_narrow() -> None:
    pace = Pace(10, 80, 1.0)
    assert [answer(pace, number, 0.1) for number in range(5)] == [20, 40, 80, 80, 80]
    assert answer(pace, 5, 0.4) == 80
    assert [answer(pace, number, 3.0) for number in range(6, 11)] == [40, 20, 10, 10, 10]


def test_only_the_answer_to_the_timed_message_counts() -> None:
    pace = Pace(10, 80, 1.0)
    pace.sent(5, 0.0)
    pace.sent(6, 2.9)
    assert not pace.answered(4, 0.1)
    assert pace.window == 10
    assert pace.answered(7, 0.2)
    assert pace.window == 20
    assert pace.answered(7, 0.3)
    assert pace.window == 20


def test_what_is_sent_from_the_beginning_again_is_timed_anew() -> None:
    pace = Pace(10, 80, 1.0)
    pace.sent(500, 0.0)
    pace.sent(10, 50.0)
    pace.answered(10, 50.1)
    assert pace.window == 20


def test_what_is_asked_for_again_was_too_much() -> None:
    pace = Pace(10, 80, 1.0)
    answer(pace, 1, 0.1)
    pace.asked_again()
    pace.asked_again()
    assert pace.window == 10


def test_a_window_that_grew_meanwhile_is_not_doubled_for_an_older_answer() -> None:
    pace = Pace(10, 1000, 1.0)
    answer(pace, 1, 0.001)
    pace.sent(2, 0.0)
    pace.arrived(30)
    pace.answered(2, 0.2)
    assert pace.window == 50


def test_what_arrives_makes_room_only_while_nothing_waits() -> None:
    pace = Pace(10, 80, 1.0)
    pace.arrived(10)
    assert pace.window == 10
    answer(pace, 1, 0.001)
    pace.arrived(10)
    assert pace.window == 30
    answer(pace, 2, 0.2)
    pace.arrived(10)
    assert pace.window == 60


def test_a_way_that_is_only_long_is_no_slow_one() -> None:
    small, large = Pace(10, 80, 1.0, small=True), Pace(10, 80, 1.0)
    assert [answer(small, number, 0.9) for number in range(3)] == [20, 40, 80]
    assert answer(small, 3, 1.5) == 40
    assert [answer(large, number, 0.9) for number in range(3)] == [10, 10, 10]


def test_it_begins_again_with_little() -> None:
    pace = Pace(10, 80, 1.0)
    answer(pace, 1, 0.1)
    pace.restart()
    assert pace.window == 10
