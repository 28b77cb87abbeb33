# SPDX-License-Identifier: Apache-2.0
"""The log's format: a torn tail is cut, damage in the middle is refused by name and offset."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import log
from proto.api import OperationError
from proto.log import Record

writes = st.lists(
    st.lists(
        st.tuples(st.binary(max_size=60), st.sampled_from(get_args(log.RecordKind))), min_size=1, max_size=3
    ),
    max_size=5,
)
"""What was appended: write by write, its records."""

Writes = list[list[tuple[bytes, log.RecordKind]]]


def file_of(contents: Writes, base: int = 0) -> tuple[bytes, list[Record], list[int]]:
    """A log's bytes, its records, and where each write begins."""
    data, records, begins = log.header(base, 1), list[Record](), list[int]()
    for content in contents:
        begins.append(len(data))
        index = base + len(records) + 1
        made = [Record(2, index + place, *one) for place, one in enumerate(content)]
        data += b"".join(log.encode_all(made))
        records += made
    return data, records, begins


@given(writes, st.integers(0, 2**40))
def test_what_was_written_is_read(contents: Writes, base: int) -> None:
    data, records, _ = file_of(contents, base)
    scan = log.scan(data, "f")
    assert (scan.base_index, scan.base_term, scan.records, scan.end) == (base, 1, records, len(data))
    for record, offset in zip(records, scan.offsets, strict=True):
        assert data[offset:].startswith(log.encode(record, record.index)[:4])


@given(writes)
def test_a_file_cut_at_any_byte_keeps_every_whole_record(contents: Writes) -> None:
    data, records, _ = file_of(contents)
    ends = [*log.scan(data, "f").offsets[1:], len(data)]
    for cut in range(log.HEADER_SIZE, len(data)):
        scan = log.scan(data[:cut], "f")
        assert scan.records == records[: sum(end <= cut for end in ends[: len(records)])]
        assert scan.end <= cut


@given(writes.filter(lambda contents: len(contents) > 1), st.data())
def test_damage_before_the_last_write_is_refused(contents: Writes, draw: st.DataObject) -> None:
    data, _, begins = file_of(contents)
    place = draw.draw(st.integers(log.HEADER_SIZE, begins[-1] - 1))
    bad = bytearray(data)
    bad[place] ^= 1 << draw.draw(st.integers(0, 7))
    with pytest.raises(log.DamagedError, match=r"catalog/log is damaged at byte \d+"):
        log.scan(bytes(bad), "catalog/log")


@given(writes.filter(bool), st.data())
def test_damage_in_the_last_write_is_a_torn_tail(contents: Writes, draw: st.DataObject) -> None:
    data, records, begins = file_of(contents)
    place = draw.draw(st.integers(begins[-1], len(data) - 1))
    bad = bytearray(data)
    bad[place] ^= 1
    scan = log.scan(bytes(bad), "f")
    assert begins[-1] <= scan.end <= place
    assert scan.records == records[: len(scan.records)]


def test_any_flipped_bit_of_the_header_is_refused() -> None:
    data, _, _ = file_of([[(b"x", "command")]])
    for place in range(log.HEADER_SIZE):
        for bit in range(8):
            bad = bytearray(data)
            bad[place] ^= 1 << bit
            with pytest.raises(OperationError, match=r"^f is"):
                log.scan(bytes(bad), "f")
    for cut in range(log.HEADER_SIZE):
        with pytest.raises(log.DamagedError):
            log.scan(data[:cut], "f")


def test_another_file_and_another_version_are_told_apart() -> None:
    with pytest.raises(log.DamagedError, match="f is damaged at byte 0: it does not begin with"):
        log.scan(b"something else entirely", "f")
    with pytest.raises(OperationError, match="f is of another version") as caught:
        log.scan(b"MOBITOPO LOG 1\n\0", "f")
    assert caught.value.code == "unsupported"


def test_a_missing_record_is_refused() -> None:
    data = log.header(0, 0) + log.encode(Record(1, 1, b"a"), 1) + log.encode(Record(1, 3, b"c"), 3)
    with pytest.raises(log.DamagedError, match="record 2 cannot be read, but record 3 follows"):
        log.scan(data, "f")


@given(st.binary(max_size=200), st.data())
def test_a_sealed_file_is_whole_or_refused(content: bytes, draw: st.DataObject) -> None:
    magic = b"MOBITOPO TEST2\n\0"
    data = log.seal(magic, content)
    assert log.unseal(magic, data, "f") == content
    bad = bytearray(data)
    bad[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    for wrong in (bytes(bad), data[: draw.draw(st.integers(0, len(data) - 1))]):
        with pytest.raises(OperationError, match=r"^f is"):
            log.unseal(magic, wrong, "f")
