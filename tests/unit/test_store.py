# SPDX-License-Identifier: Apache-2.0
"""What a replica keeps on disk: read back as it was written, whatever byte a crash comes at."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobid import config, logfile, store
from mobid.store import Store
from proto import log
from proto.api import OperationError
from proto.log import Record
from proto.raft.configuration import Configuration
from proto.raft.events import Ballot, Durable, Snapshot, Stored

SETTLED = Configuration(frozenset({"a", "b"}), frozenset(), frozenset({"c"}))


def records(term: int, first: int, count: int) -> tuple[Record, ...]:
    return tuple(Record(term, index, b"%d" % index) for index in range(first, first + count))


def reopened(directory: Path) -> Stored:
    again = Store(directory)
    again.close()
    return again.stored


def filled(directory: Path) -> list[Durable]:
    """A store with a bit of everything in it, and what was written."""
    snapshot = Snapshot(3, 1, SETTLED, b"state")
    batch = [
        Durable(ballot=Ballot(2, "b"), records=records(1, 1, 5)),
        Durable(snapshot=snapshot, keep=3),
        Durable(truncate=5, records=records(2, 5, 2)),
    ]
    made = Store(directory)
    for durable in batch:
        made.write([durable])
    made.close()
    return batch


def test_an_empty_store_and_a_full_one(tmp_path: Path) -> None:
    directory = tmp_path / "catalog"
    assert reopened(directory) == Stored()
    filled(directory)
    stored = reopened(directory)
    assert stored.ballot == Ballot(2, "b")
    assert stored.snapshot == Snapshot(3, 1, SETTLED, b"state")
    assert (stored.base_index, stored.base_term) == (2, 1)
    assert stored.records == [*records(1, 3, 2), *records(2, 5, 2)]
    assert not stored.recovering


def test_a_batch_ends_as_its_parts_one_by_one(tmp_path: Path) -> None:
    batch = filled(tmp_path / "one")
    together = Store(tmp_path / "all")
    together.write(batch)
    together.write(batch[-1:])
    together.close()
    assert reopened(tmp_path / "all") == reopened(tmp_path / "one")


def test_the_commit_index_is_kept(tmp_path: Path) -> None:
    made = Store(tmp_path / "c")
    made.write([Durable(records=records(1, 1, 3))])
    made.note_commit(2)
    made.close()
    assert reopened(tmp_path / "c").commit == 2
    (tmp_path / "c" / "commit").write_bytes(b"rubbish")
    assert reopened(tmp_path / "c").commit == 0


@pytest.mark.parametrize("what", ["flipped", "cut", "missing"])
def test_a_committed_record_that_is_gone_is_damage_and_no_torn_tail(tmp_path: Path, what: str) -> None:
    directory = tmp_path / "catalog"
    made = Store(directory)
    for index in range(1, 6):
        made.write([Durable(ballot=Ballot(1, "a"), records=records(1, index, 1))])
    made.note_commit(5)
    made.close()
    path = directory / "log"
    whole = path.read_bytes()
    size = len(log.encode(records(1, 5, 1)[0], 5))
    bad = {"flipped": whole[:-1] + bytes([whole[-1] ^ 1]), "cut": whole[:-1], "missing": whole[:-size]}[what]
    path.write_bytes(bad)
    for _ in range(2):
        with pytest.raises(log.DamagedError, match=f"{path} is damaged at byte {len(whole) - size}"):
            Store(directory)
        assert path.read_bytes() == bad


def test_a_snapshot_may_hold_what_is_committed_instead_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    made = Store(directory)
    made.note_commit(6)
    made.close()
    theirs = Durable(snapshot=Snapshot(20, 3, SETTLED, b"theirs"), keep=21)
    for copy in crash_points(directory, monkeypatch, theirs):
        assert reopened(copy).commit == 6
    made = Store(directory)
    made.note_commit(20)
    made.close()
    assert reopened(directory).commit == 20


changes = st.lists(
    st.tuples(
        st.sampled_from(["append", "truncate", "compact", "install", "ballot"]),
        st.integers(0, 4),
        st.integers(0, 4),
    ),
    max_size=14,
)


@settings(max_examples=60)
@given(changes, st.integers(1, 4))
def test_what_was_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, tried: list[Any], together: int
) -> None:
    """A model of the log beside the store, in any order of changes, several at once."""
    directory = tmp_path_factory.mktemp("store") / "catalog"
    base, term, kept = (0, 0), 1, list[Record]()
    snapshot, ballot, batch = Snapshot(), Ballot(), list[Durable]()
    for what, one, other in tried:
        last = base[0] + len(kept)
        if what == "append":
            more = records(term, last + 1, one)
            kept += more
            batch.append(Durable(records=more))
        elif what == "truncate" and last - one > max(base[0], snapshot.index):
            term += 1
            kept = kept[: last - one - base[0]]
            batch.append(Durable(truncate=last - one + 1))
        elif what == "compact" and last > snapshot.index:
            snapshot = Snapshot(last, (kept[-1].term if kept else base[1]), SETTLED, b"x" * one)
            keep = max(base[0] + 1, last - other + 1)
            before = [base[1], *(record.term for record in kept)][keep - 1 - base[0]]
            kept = kept[keep - 1 - base[0] :]
            base = (keep - 1, before)
            batch.append(Durable(snapshot=snapshot, keep=keep))
        elif what == "install":
            snapshot = Snapshot(last + 1 + one, term, SETTLED, b"y")
            base, kept = (snapshot.index, term), []
            batch.append(Durable(snapshot=snapshot, keep=snapshot.index + 1))
        elif what == "ballot":
            ballot = Ballot(ballot.term + 1, "v" * one)
            batch.append(Durable(ballot=ballot))
    made = Store(directory)
    for place in range(0, len(batch), together):
        made.write(batch[place : place + together])
    made.close()
    stored = reopened(directory)
    assert (stored.ballot, stored.snapshot) == (ballot, snapshot)
    assert (stored.base_index, stored.base_term, stored.records) == (*base, kept)


# Crashes.


class Crash(Exception):
    """The process ends here."""


def crash_points(directory: Path, monkeypatch: pytest.MonkeyPatch, last: Durable) -> list[Path]:
    """Copies of the directory as a crash before each system call of a write would leave it."""
    copies: list[Path] = []
    real = {name: getattr(os, name) for name in ("pwrite", "ftruncate", "fsync", "fdatasync", "rename")}

    def before(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            copy = directory.with_name(f"crash{len(copies)}")
            shutil.copytree(directory, copy)
            copies.append(copy)
            return real[name](*args)

        return call

    made = Store(directory)
    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, before(name))
        made.write([last])
    made.close()
    return copies


@pytest.mark.parametrize(
    "last",
    [
        Durable(records=records(2, 7, 3)),
        Durable(truncate=5, records=records(3, 5, 1)),
        Durable(ballot=Ballot(4, "a"), snapshot=Snapshot(6, 2, SETTLED, b"later"), keep=6),
        Durable(snapshot=Snapshot(20, 3, SETTLED, b"theirs"), keep=21, records=records(3, 21, 2)),
    ],
    ids=["append", "truncate", "compact", "install"],
)
def test_a_crash_between_any_two_steps_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: Durable
) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    old = reopened(directory)
    copies = crash_points(directory, monkeypatch, last)
    new = reopened(directory)
    assert len(copies) >= 2
    for copy in copies:
        found = reopened(copy)
        assert found.ballot in (old.ballot, new.ballot)
        assert found.snapshot in (old.snapshot, new.snapshot)
        acknowledged = old.records[: 2 if last.truncate else None]
        if found.snapshot.index < 20:
            there = {record.index: record for record in found.records}
            for record in acknowledged:
                assert record.index <= found.base_index or there[record.index] == record
        again = Store(copy)
        again.write([last])
        again.close()
        assert reopened(copy) == new


def test_a_founding_that_was_cut_short_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Durable(ballot=Ballot(1, "a"), records=records(1, 1, 2))
    for copy in crash_points(tmp_path / "catalog", monkeypatch, first):
        again = Store(copy)
        if not reopened(copy).records:
            assert again.empty
            again.write([first])
        again.close()
        assert reopened(copy) == reopened(tmp_path / "catalog")


def test_a_log_cut_at_any_byte_opens_or_names_its_place(tmp_path: Path) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    whole = (directory / "log").read_bytes()
    stored = reopened(directory)
    for cut in range(len(whole)):
        (directory / "log").write_bytes(whole[:cut])
        if cut < log.HEADER_SIZE:
            with pytest.raises(log.DamagedError, match=r"catalog/log is damaged at byte \d+"):
                Store(directory)
            continue
        made = Store(directory)
        last = made.stored.base_index + len(made.stored.records)
        if last < stored.snapshot.index:
            assert (made.stored.base_index, made.stored.records) == (stored.snapshot.index, [])
        else:
            assert made.stored.records == stored.records[: len(made.stored.records)]
            made.write([Durable(records=records(2, last + 1, 1))])
            assert reopened(directory).records == [*made.stored.records, *records(2, last + 1, 1)]
        made.close()


@pytest.mark.parametrize("name", ["ballot", "snapshot", "log"])
def test_a_flipped_bit_is_never_taken_for_good(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    whole = (directory / name).read_bytes()
    stored = reopened(directory)
    dice = random.Random(name)
    for _ in range(60):
        bad = bytearray(whole)
        bad[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        (directory / name).write_bytes(bad)
        with suppress(OperationError):
            found = reopened(directory)
            # In the last write it is a torn tail.
            assert name == "log"
            assert found.records == stored.records[: len(found.records)]
            assert len(found.records) >= 2


@pytest.mark.parametrize("name", ["ballot", "log"])
def test_a_missing_file_is_damage(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    (directory / name).unlink()
    with pytest.raises(log.DamagedError, match=f"{directory / name} is damaged at byte 0"):
        Store(directory)


def test_a_store_in_place_of_a_lost_one_says_so_until_it_has_recovered(tmp_path: Path) -> None:
    filled(tmp_path / "old")
    (tmp_path / "old" / "log").write_bytes(b"rubbish")
    made = Store(tmp_path / "catalog")
    made.mark_recovering(store.surviving_ballot(tmp_path / "old"))
    made.write([Durable(records=records(1, 1, 2))])
    made.close()
    found = reopened(tmp_path / "catalog")
    assert found.recovering
    assert found.ballot == Ballot(2, "b")
    again = Store(tmp_path / "catalog")
    again.write([Durable(recovered=True)])
    again.close()
    assert not reopened(tmp_path / "catalog").recovering


# Full and broken disks.


def failing(error: int) -> Callable[..., Any]:
    def call(*_args: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return call


def test_a_full_disk_leaves_nothing_of_the_batch_and_the_store_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    before = reopened(directory)
    made = Store(directory)
    real = os.pwrite

    def partly(fd: int, data: Any, offset: int) -> int:
        if offset > os.fstat(fd).st_size - 1 and len(data) < 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) // 2], offset)

    batch = [Durable(records=records(2, 7, 2)), Durable(ballot=Ballot(9, "c"))]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", partly)
        with pytest.raises(OperationError) as caught:
            made.write(batch)
    assert (caught.value.code, caught.value.hint) == ("no-room", "make room on the disk")
    assert reopened(directory).records == before.records
    assert reopened(directory).ballot == Ballot(9, "c")
    made.write(batch)
    made.close()
    assert reopened(directory).records == [*before.records, *records(2, 7, 2)]


LONG = [
    Durable(records=records(1, 1, 8)),
    Durable(truncate=6, records=records(2, 6, 2)),
    Durable(snapshot=Snapshot(4, 1, SETTLED, b"earlier"), keep=3),
    Durable(truncate=7, records=records(3, 7, 1)),
    Durable(snapshot=Snapshot(7, 3, SETTLED, b"later"), keep=7),
    Durable(records=records(3, 8, 2)),
]
"""What waits for room on a full disk: conflicts and snapshots among the records."""


@pytest.mark.parametrize("place", range(10))
def test_a_batch_that_a_full_disk_has_stopped_anywhere_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    whole = Store(tmp_path / "whole")
    for durable in LONG:
        whole.write([durable])
    whole.close()
    made = Store(tmp_path / "catalog")
    left = place

    def full_after(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full_after(os.pwrite))
        for module in (store, logfile):
            patch.setattr(module, "replace_file", full_after(config.replace_file))
        for again in range(2):
            with suppress(OperationError):
                made.write(LONG)
            shutil.copytree(tmp_path / "catalog", tmp_path / f"crash{again}")
    for again in range(2):
        reopened(tmp_path / f"crash{again}")
    made.write(LONG)
    made.close()
    assert reopened(tmp_path / "catalog") == reopened(tmp_path / "whole")


def test_what_another_process_wrote_is_durable_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been killed between writing and fsync, and what is read may be in the page cache alone."""
    filled(tmp_path / "catalog")
    synced: set[str] = set()
    real = os.fsync

    def note(fd: int) -> None:
        real(fd)
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note)
        made = Store(tmp_path / "catalog")
    made.close()
    assert {"log", "catalog"} <= synced


def test_a_vote_is_written_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "catalog"
    filled(directory)
    made = Store(directory)
    reserve = directory / "reserve"
    assert reserve.stat().st_size == store.RESERVE
    real = config.replace_file

    def only_without_reserve(*args: Any) -> None:
        if reserve.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store, "replace_file", only_without_reserve)
        made.write([Durable(ballot=Ballot(7, "c"))])
    made.close()
    assert reopened(directory).ballot == Ballot(7, "c")


def test_after_a_failed_fsync_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Store(tmp_path / "catalog")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(errno.EIO))
        with pytest.raises(OperationError, match="could not be made durable") as caught:
            made.write([Durable(records=records(1, 1, 1))])
    assert caught.value.code == "failed"
    with pytest.raises(OperationError, match="could not be made durable"):
        made.write([Durable(ballot=Ballot(1, "a"))])
    made.close()
