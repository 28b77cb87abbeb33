# SPDX-License-Identifier: Apache-2.0
"""The log: a torn tail is cut, damage in the middle is refused by name and offset, nothing else is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobid.logfile import LogFile
from proto import log
from proto.api import OperationError
from proto.log import Record

payloads = st.lists(st.binary(max_size=60), max_size=8)


def file_of(contents: list[bytes]) -> tuple[bytes, list[Record]]:
    records = [Record(1, place + 1, payload) for place, payload in enumerate(contents)]
    return log.MAGIC + b"".join(log.encode(record) for record in records), records


@given(payloads)
def test_what_was_written_is_read(contents: list[bytes]) -> None:
    data, records = file_of(contents)
    assert log.scan(data, "f") == log.Scan(records, len(data))


@given(payloads.filter(bool), st.data())
def test_a_file_cut_anywhere_keeps_every_whole_record(contents: list[bytes], draw: st.DataObject) -> None:
    data, records = file_of(contents)
    cut = draw.draw(st.integers(0, len(data)))
    scan = log.scan(data[:cut], "f")
    assert scan.records == records[: len(scan.records)]
    assert scan.end <= cut
    whole = len(log.MAGIC)
    for place, record in enumerate(records):
        whole += len(log.encode(record))
        assert (len(scan.records) > place) == (whole <= cut)


@given(payloads.filter(lambda contents: len(contents) > 1), st.data())
def test_damage_before_the_last_record_is_refused(contents: list[bytes], draw: st.DataObject) -> None:
    data, records = file_of(contents)
    last = len(data) - len(log.encode(records[-1]))
    place = draw.draw(st.integers(len(log.MAGIC), last - 1))
    bad = bytearray(data)
    bad[place] ^= 1 << draw.draw(st.integers(0, 7))
    with pytest.raises(OperationError, match=r"catalog\.log is damaged at byte \d+"):
        log.scan(bytes(bad), "catalog.log")


@given(payloads.filter(bool), st.data())
def test_damage_in_the_last_record_is_a_torn_tail(contents: list[bytes], draw: st.DataObject) -> None:
    data, records = file_of(contents)
    last = len(data) - len(log.encode(records[-1]))
    bad = bytearray(data)
    bad[draw.draw(st.integers(last, len(data) - 1))] ^= 1
    assert log.scan(bytes(bad), "f") == log.Scan(records[:-1], last)


def test_another_file_is_refused() -> None:
    with pytest.raises(OperationError, match="is no log of this version"):
        log.scan(b"something else entirely", "f")


def test_a_missing_record_is_refused() -> None:
    data = log.MAGIC + log.encode(Record(1, 1, b"a")) + log.encode(Record(1, 3, b"c"))
    with pytest.raises(OperationError, match="record 2 cannot be read, but record 3 follows"):
        log.scan(data, "f")


def test_the_file_goes_on_after_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "catalog.log"
    data, records = file_of([b"one", b"two"])
    path.write_bytes(data[:-1])
    file = LogFile(path)
    assert file.records == records[:1]
    assert file.torn == len(log.encode(records[1])) - 1
    file.append([Record(1, 2, b"new")])
    file.close()
    assert log.scan(path.read_bytes(), "f").records == [records[0], Record(1, 2, b"new")]


def test_a_full_disk_leaves_nothing_of_the_batch_behind() -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("there is no /dev/full")
    path = Path("/dev/full")
    file = LogFile.__new__(LogFile)
    file.path, file._failed, file._end = path, "", 0
    file._fd = os.open(path, os.O_RDWR)
    with pytest.raises(OperationError) as caught:
        file.append([Record(1, 1, b"x")])
    assert caught.value.code == "no-room"
    file.close()
