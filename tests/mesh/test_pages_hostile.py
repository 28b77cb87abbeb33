# SPDX-License-Identifier: Apache-2.0
"""A sender that has the key and lies: every record is checked before any of it is applied."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tests.helperclient import HelperFailure, HelperProcess
from tests.mesh.page_regions import PAGE, Disk, Memory
from tests.mesh.test_pages import KEY, MIGRATION

PAGES = 64
HELLO, PAGE_RECORD, ZEROS, PASS, ROOT, RELEASE = range(1, 7)
ACCEPTED, REFUSED = 0x81, 0x82
RAW, ZSTD = 0, 1


def header(kind: int, detail: int = 0, count: int = 0, number: int = 0) -> bytes:
    return struct.pack("<BBHI", kind, detail, count, number)


def hello(*regions: tuple[int, int, int], version: int = 1, migration: bytes = MIGRATION) -> bytes:
    body = b"".join(struct.pack("<IIQII", id, disk, size, PAGE, 0) for id, disk, size in regions)
    return header(HELLO, version, len(regions)) + migration + body


def pages(numbers: list[int], data: bytes, region: int = 0, encoding: int = RAW) -> bytes:
    listed = b"".join(struct.pack("<I", number) for number in numbers)
    return header(PAGE_RECORD, encoding, len(numbers), region) + listed + data


def zeros(*runs: tuple[int, int], region: int = 0) -> bytes:
    return header(ZEROS, 0, len(runs), region) + b"".join(struct.pack("<II", *run) for run in runs)


def pass_end(number: int, content: int = 0, empty: int = 0) -> bytes:
    return header(PASS, 0, 0, number) + struct.pack("<QQ", content, empty)


class Liar:
    """The sending end of a stream in Python, and a real receiver."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self.memory, self.disk = Memory(PAGES), Disk(directory / "overlay", PAGES)
        self.receiver = HelperProcess(binary, "pages", control=directory / "d")
        self.end, far = socket.socketpair()
        self.end.settimeout(10)
        self.sealed = 0
        key = {
            way: HKDF(SHA256(), 32, MIGRATION, b"mobitopolo pages " + way).derive(KEY)
            for way in (b"S>D", b"D>S")
        }
        self.forth, self.back = AESGCM(key[b"S>D"]), AESGCM(key[b"D>S"])
        self.answers = 0
        with far:
            self.request = self.receiver.send(
                "receive",
                [far.fileno(), *self.memory.fds, *self.disk.fds],
                migration=MIGRATION,
                key=KEY,
                regions=[self.memory.describe(), self.disk.describe()],
            )

    def close(self) -> None:
        self.end.close()
        self.receiver.__exit__(None, None, None)
        self.memory.close()
        self.disk.close()

    def say(self, record: bytes) -> None:
        prefix = struct.pack("<I", len(record) + 16)
        nonce = b"S>D\0" + struct.pack("<Q", self.sealed)
        self.sealed += 1
        self.end.sendall(prefix + self.forth.encrypt(nonce, record, prefix))

    def hear(self) -> bytes:
        """The next answer, opened."""
        prefix = self.exactly(4)
        nonce = b"D>S\0" + struct.pack("<Q", self.answers)
        self.answers += 1
        return self.back.decrypt(nonce, self.exactly(struct.unpack("<I", prefix)[0]), prefix)

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.end.recv(count - len(data))
            assert more, "the receiver closed"
            data += more
        return data

    def greet(self) -> None:
        self.say(hello((0, 0, PAGES * PAGE), (1, 1, PAGES * PAGE)))
        assert self.hear()[0] == ACCEPTED
        self.receiver.reply(self.request)

    def refused(self) -> str:
        """What the receiver said when it ended the stream; nothing was applied, and it is still there."""
        answer = self.hear()
        assert answer[0] == REFUSED
        self.receiver.wait_event("broken")
        assert self.receiver.status()["state"] == "broken"
        assert self.memory.read() == bytes(PAGES * PAGE)
        assert self.disk.read() == {}
        return answer[8:].decode()


@pytest.fixture
def liar(helper_binary: Path, socket_dir: Path) -> Iterator[Liar]:
    made = Liar(helper_binary, socket_dir)
    yield made
    made.close()


DATA = b"x" * PAGE

WRONG = {
    "a page beyond the end": pages([PAGES], DATA),
    "the largest page number": pages([2**32 - 1], DATA),
    "pages not in order": pages([3, 2], DATA * 2),
    "a page twice": pages([3, 3], DATA * 2),
    "an unknown region": pages([1], DATA, region=7),
    "no pages at all": pages([], b""),
    "too many pages": pages(list(range(65)), DATA * 65),
    "a list cut short": header(PAGE_RECORD, RAW, 60, 0) + b"abc",
    "too little data": pages([1, 2], DATA),
    "too much data": pages([1], DATA * 2),
    "an unknown encoding": pages([1], DATA, encoding=9),
    "no zstd frame": pages([1], b"rubbish", encoding=ZSTD),
    "a zstd frame that unpacks to more": pages(
        [1], bytes.fromhex("28b52ffda0000000015400000001000100fe7f"), 0, ZSTD
    ),
    "one right page before a wrong one": pages([1, PAGES], DATA * 2),
    "zeros beyond the end": zeros((PAGES - 1, 2)),
    "zeros that wrap": zeros((1, 2**32 - 1)),
    "zeros out of order": zeros((5, 2), (6, 1)),
    "no zeros": zeros((5, 0)),
    "an empty list of runs": zeros(),
    "runs cut short": header(ZEROS, 0, 9, 0) + b"abcd",
    "the end of another pass": pass_end(2),
    "a pass of pages that did not come": pass_end(1, content=1),
    "a pass end cut short": header(PASS, 0, 0, 1),
    "a root before any pass": header(ROOT, 0, 0, 5) + bytes(16),
    "a root cut short": header(ROOT, 0, 0, 0) + bytes(15),
    "a release without a root": header(RELEASE) + MIGRATION,
    "a second greeting": hello((0, 0, PAGES * PAGE), (1, 1, PAGES * PAGE)),
    "an answer": header(ACCEPTED),
    "an unknown type": header(0),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_record_ends_the_stream_unapplied(liar: Liar, what: str) -> None:
    liar.greet()
    liar.say(WRONG[what])
    assert "record is wrong" in liar.refused()


@pytest.mark.parametrize(
    "greeting",
    [
        hello((0, 0, PAGES * PAGE), (1, 1, PAGES * PAGE), version=2),
        hello((0, 0, PAGES * PAGE), (1, 1, PAGES * PAGE), migration=bytes(16)),
        hello((0, 0, PAGES * PAGE)),
        hello((0, 1, PAGES * PAGE), (1, 0, PAGES * PAGE)),
        hello((0, 0, PAGES * PAGE), (1, 1, PAGES * PAGE)) + b"more",
        header(HELLO, 1, 2) + MIGRATION,
        pages([1], DATA),
    ],
)
def test_a_wrong_greeting_is_refused(liar: Liar, greeting: bytes) -> None:
    liar.say(greeting)
    with pytest.raises(HelperFailure) as refused:
        liar.receiver.reply(liar.request)
    assert refused.value.code == "mismatch"
    liar.refused()


def test_a_release_for_another_migration_or_after_more_pages(liar: Liar) -> None:
    liar.greet()
    liar.say(pass_end(1))
    liar.say(header(ROOT, 0, 0, 1) + bytes(16))
    liar.say(zeros((0, 1)))
    liar.say(header(RELEASE) + MIGRATION)
    liar.receiver.wait_event("complete", match=True)
    assert "does not follow its root" in liar.receiver.wait_event("broken")["message"]


def test_a_false_root_is_released_but_never_matches(liar: Liar) -> None:
    liar.greet()
    liar.say(pages([1], DATA))
    liar.say(pass_end(1, content=1))
    liar.say(header(ROOT, 0, 0, 1) + bytes(16))
    liar.say(header(RELEASE) + MIGRATION)
    assert liar.receiver.wait_event("released")["match"] is False


def test_random_records_never_crash_the_receiver(helper_binary: Path, socket_dir: Path) -> None:
    rng = random.Random(1)
    for number in range(60):
        directory = socket_dir / str(number)
        directory.mkdir()
        liar = Liar(helper_binary, directory)
        try:
            liar.greet()
            liar.end.settimeout(0.05)  # a receiver that has refused reads no more
            try:
                for _ in range(50):
                    base = bytearray(rng.choice(list(WRONG.values())) + rng.randbytes(rng.randrange(40)))
                    for _ in range(rng.randrange(4)):
                        base[rng.randrange(len(base))] = rng.randrange(256)
                    liar.say(bytes(base))
            except OSError:
                pass
            assert liar.receiver.status()["state"] in ("broken", "ready", "final")
            assert liar.receiver.process.poll() is None
        finally:
            liar.close()
