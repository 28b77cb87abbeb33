# SPDX-License-Identifier: Apache-2.0
"""Messages put together say what they said one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proto.log import Record
from proto.peer_events import Forward
from proto.raft import coalesce as module
from proto.raft.coalesce import coalesce
from proto.raft.messages import Append, Appended, Lead


def append(term: int, prev: int, count: int, round: int = 0, commit: int = 0, *, size: int = 1) -> Append:
    records = tuple(Record(term, prev + 1 + place, bytes(size)) for place in range(count))
    return Append(term, prev, term, records, commit, round)


def test_appends_that_follow_one_another_become_one() -> None:
    made = coalesce([append(3, 4, 0, 1), append(3, 4, 2, 1, 5), append(3, 6, 1, 2, 4), append(3, 7, 0, 3)])
    assert made == [append(3, 4, 3, 3, 5)]


def test_what_does_not_follow_stays_as_it_is() -> None:
    for other in (append(3, 5, 1), append(3, 9, 1), append(4, 6, 1), Lead(3), Appended(3, True, 6, 0)):
        assert coalesce([append(3, 4, 2), other, append(3, 4, 2)]) == [
            append(3, 4, 2),
            other,
            append(3, 4, 2),
        ]


def test_one_append_does_not_grow_without_bound() -> None:
    half = module.MOST_BYTES // 2 + 1
    assert len(coalesce([append(3, at, 1, size=half) for at in range(4)])) == 4


def test_only_good_acknowledgements_are_put_together() -> None:
    good = [Appended(2, True, 5, 1), Appended(2, True, 7, 1), Appended(2, True, 6, 3)]
    assert coalesce(good) == [Appended(2, True, 7, 3)]
    bad = [Appended(2, True, 5, 1), Appended(2, False, 3, 1), Appended(2, True, 5, 1, recovering=True)]
    assert coalesce(bad) == bad


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)), max_size=12))
def test_the_records_of_a_run_are_all_there_in_order(parts: list[tuple[int, int, int]]) -> None:
    messages, at = [], 0
    for count, step_back, round in parts:
        at = max(0, at - step_back)
        messages.append(append(1, at, count, round))
        at += count
    made = coalesce(messages)
    assert [r for m in made for r in m.records] == [r for m in messages for r in m.records]
    assert max((m.round for m in made), default=0) == max((m.round for m in messages), default=0)
    for message in made:
        indexes = [record.index for record in message.records]
        assert indexes == list(range(message.prev_index + 1, message.prev_index + 1 + len(indexes)))


def test_proposals_on_their_way_go_together_up_to_a_bound() -> None:
    assert coalesce([Forward((b"a",)), Forward((b"b", b"c")), Lead(1), Forward((b"d",))]) == [
        Forward((b"a", b"b", b"c")),
        Lead(1),
        Forward((b"d",)),
    ]
    half = bytes(module.MOST_BYTES // 2 + 1)
    assert len(coalesce([Forward((half,)), Forward((half,))])) == 2
