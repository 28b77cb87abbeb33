# SPDX-License-Identifier: Apache-2.0
"""`mobi-helper pages`, both ends as real processes: either all of it arrives or none is believed."""

from __future__ import annotations

import random
import resource
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.helperclient import HelperFailure, HelperProcess
from tests.mesh.page_regions import PAGE, Disk, Memory, content

MIGRATION = bytes(range(16))
KEY = bytes(range(100, 132))

Region = Memory | Disk


class Pair:
    """A sender, a receiver, and the regions of both."""

    def __init__(self, binary: Path, directory: Path, pages: int = 600, disk_pages: int = 0) -> None:
        self.stack = ExitStack()
        self.source: list[Region] = [Memory(pages)]
        self.target: list[Region] = [Memory(pages)]
        if disk_pages:
            self.source.append(Disk(directory / "source.overlay", disk_pages))
            self.target.append(Disk(directory / "target.overlay", disk_pages))
        for region in self.source + self.target:
            self.stack.callback(region.close)
        start = self.stack.enter_context
        self.sender = start(HelperProcess(binary, "pages", control=directory / "s"))
        self.receiver = start(HelperProcess(binary, "pages", control=directory / "d"))
        self.ends = socket.socketpair()

    def close(self) -> None:
        self.hang_up()
        self.stack.close()

    def hang_up(self) -> None:
        """Closes this process's copies of the stream's sockets."""
        for end in self.ends:
            end.close()

    def ask(
        self, which: str, regions: list[Region], end: socket.socket, key: bytes = KEY, **more: Any
    ) -> tuple[HelperProcess, int]:
        helper = self.sender if which == "send" else self.receiver
        fds = [end.fileno(), *(fd for region in regions for fd in region.fds)]
        layout = [region.describe() for region in regions]
        arguments = {"migration": MIGRATION, "key": key, "regions": layout, **more}
        return helper, helper.send(which, fds, **arguments)

    def connect(self, **more: Any) -> None:
        receiver, receive_id = self.ask("receive", self.target, self.ends[1])
        sender, send_id = self.ask("send", self.source, self.ends[0], **more)
        self.hang_up()
        sender.reply(send_id)
        receiver.reply(receive_id)

    def sent_pass(self) -> dict[str, Any]:
        return self.sender.call("pass", timeout=30)[0]

    def final(self, release: bool = True) -> dict[str, Any]:
        return self.sender.call("final", release=release, timeout=30)[0]

    def assert_equal(self) -> None:
        for source, target in zip(self.source, self.target, strict=True):
            assert source.read() == target.read()

    def change(self, rng: random.Random, count: int) -> None:
        for region in self.source:
            region.change(rng, count)


@pytest.fixture
def pair(helper_binary: Path, socket_dir: Path) -> Iterator[Pair]:
    made = Pair(helper_binary, socket_dir, disk_pages=300)
    yield made
    made.close()


def use_tcp(pair: Pair) -> None:
    pair.hang_up()
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname(), 5)
        far, _ = server.accept()
    pair.ends = (near, far)


@pytest.mark.parametrize("seed", range(4))
def test_passes_then_release_carry_everything(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    use_tcp(pair)
    pair.change(rng, 500)
    pair.connect()
    for _ in range(3):
        first = pair.sent_pass()
        assert first["ram_bytes"] == first["ram_pages"] * PAGE
        pair.change(rng, 60)
        source = pair.source[0]
        assert isinstance(source, Memory)
        source.punch(rng.randrange(source.pages - 20), 20)
    last = pair.final()
    assert last["released"] == "yes"
    assert last["match"] is True
    assert last["message"] is None
    event = pair.receiver.wait_event("complete")
    assert event["match"] is True
    assert event["root"] == last["root"]
    assert pair.receiver.wait_event("released")["match"] is True
    pair.assert_equal()
    assert pair.sender.call("verify")[0] == {"id": pair.sender.last_id, "ok": True} | {
        "root": last["root"],
        "match": True,
    }
    assert pair.receiver.call("verify")[0]["match"] is True
    assert pair.sender.status()["state"] == "released"
    assert pair.receiver.status()["state"] == "released"


def test_second_pass_sends_only_what_changed(pair: Pair) -> None:
    rng = random.Random(5)
    for page in range(0, 600, 2):
        pair.source[0].write(page, rng.randbytes(PAGE))
    pair.source[1].write(7, rng.randbytes(PAGE))
    pair.connect()
    first = pair.sent_pass()
    assert (first["ram_pages"], first["disk_blocks"], first["zero_pages"]) == (300, 1, 0)
    assert first["sent_bytes"] > 300 * PAGE
    second = pair.sent_pass()
    assert (second["ram_pages"], second["disk_blocks"], second["zero_pages"]) == (0, 0, 0)
    pair.source[0].write(4, bytes(PAGE))
    pair.source[0].write(5, b"x" * PAGE)
    disk = pair.source[1]
    assert isinstance(disk, Disk)
    disk.write(7, disk.read()[7])
    third = pair.sent_pass()
    assert (third["ram_pages"], third["disk_blocks"], third["zero_pages"]) == (1, 0, 1)
    event = pair.receiver.wait_event("pass", **{"pass": 3})
    assert event["ram_pages"] == 1


def test_zero_blocks_of_a_disk_hide_its_base(pair: Pair) -> None:
    pair.source[1].write(3, bytes(PAGE))
    pair.source[1].write(299, b"e" * PAGE)
    pair.connect()
    pair.sent_pass()
    pair.source[1].write(299, bytes(PAGE))
    assert pair.final()["match"] is True
    assert pair.target[1].read() == {3: bytes(PAGE), 299: bytes(PAGE)}


def test_final_without_release_can_be_followed_by_passes(pair: Pair) -> None:
    rng = random.Random(6)
    pair.change(rng, 100)
    pair.connect()
    kept = pair.final(release=False)
    assert kept["released"] == "no"
    assert kept["match"] is True
    assert pair.sender.status()["state"] == "ready"
    pair.change(rng, 100)
    pair.sent_pass()
    assert pair.final()["released"] == "yes"
    pair.assert_equal()


def test_verify_notices_a_page_changed_after_the_root(pair: Pair) -> None:
    pair.change(random.Random(7), 100)
    pair.connect()
    assert pair.final()["released"] == "yes"
    pair.source[0].write(9, b"not the same" + bytes(PAGE - 12))
    assert pair.sender.call("verify")[0]["match"] is False
    pair.receiver.wait_event("released")
    assert pair.receiver.call("verify")[0]["match"] is True


def test_what_was_in_the_target_is_overwritten_or_noticed(pair: Pair) -> None:
    """The receiver's memory must be empty; a page that was not sent shows in its own verification."""
    pair.target[0].write(11, b"left over".ljust(PAGE))
    pair.source[0].write(1, b"new".ljust(PAGE))
    pair.connect()
    assert pair.final()["match"] is True
    pair.receiver.wait_event("released")
    assert pair.receiver.call("verify")[0]["match"] is False


def test_writes_during_a_pass_are_seen_by_the_next(pair: Pair) -> None:
    rng = random.Random(8)
    pair.change(rng, 600)
    pair.connect(bandwidth=2_000_000)
    for _ in range(2):
        request = pair.sender.send("pass")
        pair.change(rng, 300)
        pair.sender.reply(request, timeout=30)
    assert pair.final()["match"] is True
    pair.assert_equal()


class Relay:
    """Stands between the two ends and alters what goes forth."""

    def __init__(self, pair: Pair) -> None:
        self.forth_in, self.back_out = pair.ends[0], pair.ends[1]
        near, self.near = socket.socketpair()
        far, self.far = socket.socketpair()
        pair.hang_up()
        pair.ends = (near, far)
        for end in (self.near, self.far):
            end.settimeout(10)

    def close(self) -> None:
        self.near.close()
        self.far.close()

    def record(self, end: socket.socket) -> bytes:
        """The next sealed record from this end, length and all."""
        prefix = self.exactly(end, 4)
        return prefix + self.exactly(end, struct.unpack("<I", prefix)[0])

    def exactly(self, end: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = end.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def greet(self, pair: Pair) -> None:
        """Both ends agree on the regions."""
        receiver, receive_id = pair.ask("receive", pair.target, pair.ends[1])
        sender, send_id = pair.ask("send", pair.source, pair.ends[0])
        pair.hang_up()
        self.far.sendall(self.record(self.near))
        self.near.sendall(self.record(self.far))
        sender.reply(send_id)
        receiver.reply(receive_id)


@pytest.fixture
def relay(pair: Pair) -> Iterator[Relay]:
    made = Relay(pair)
    yield made
    made.close()


@pytest.mark.parametrize("position", [0, 4, 5, 30, -1])
def test_an_altered_record_is_not_applied(pair: Pair, relay: Relay, position: int) -> None:
    pair.source[0].write(2, random.Random(9).randbytes(PAGE))
    relay.greet(pair)
    request = pair.sender.send("pass")
    record = bytearray(relay.record(relay.near))
    record[position] ^= 0x01
    relay.far.sendall(record)
    if position == 0:  # a longer record was announced: the next one completes it
        relay.far.sendall(relay.record(relay.near))
    pair.receiver.wait_event("broken")
    assert pair.receiver.status()["state"] == "broken"
    relay.close()
    with pytest.raises(HelperFailure):
        pair.sender.reply(request)
    assert pair.target[0].read() == bytes(600 * PAGE)
    assert pair.sender.status()["state"] == "broken"


@pytest.mark.parametrize("fault", ["repeat", "swap", "omit"])
def test_records_cannot_be_repeated_swapped_or_left_out(pair: Pair, relay: Relay, fault: str) -> None:
    rng = random.Random(10)
    for page in range(200):
        pair.source[0].write(page, rng.randbytes(PAGE))
    relay.greet(pair)
    pair.sender.send("pass")
    one, two = relay.record(relay.near), relay.record(relay.near)
    relay.far.sendall({"repeat": one + one, "swap": two + one, "omit": two}[fault])
    pair.receiver.wait_event("broken")
    assert pair.receiver.status()["match"] is None


@pytest.mark.parametrize(
    ("prefix", "said"),
    [(b"\xff\xff\xff\x7f", "announced"), (b"\x03\0\0\0", "announced"), (b"\0\0\0\0", "announced")],
)
def test_impossible_lengths_break_the_stream(pair: Pair, relay: Relay, prefix: bytes, said: str) -> None:
    relay.greet(pair)
    relay.far.sendall(prefix + bytes(100))
    assert said in pair.receiver.wait_event("broken")["message"]


def test_a_truncated_record_breaks_the_stream(pair: Pair, relay: Relay) -> None:
    pair.source[0].write(2, b"abc".ljust(PAGE))
    relay.greet(pair)
    pair.sender.send("pass")
    relay.far.sendall(relay.record(relay.near)[:-3])
    relay.far.close()
    assert "middle of a record" in pair.receiver.wait_event("broken")["message"]
    assert pair.target[0].read() == bytes(600 * PAGE)


def test_a_stream_that_ends_without_release_is_broken(pair: Pair) -> None:
    pair.change(random.Random(11), 50)
    pair.connect()
    assert pair.final(release=False)["match"] is True
    pair.sender.call("cancel")
    assert pair.receiver.wait_event("broken")
    assert pair.sender.status()["state"] == "closed"


def test_wrong_key_is_refused_at_both_ends(pair: Pair) -> None:
    receiver, receive_id = pair.ask("receive", pair.target, pair.ends[1])
    sender, send_id = pair.ask("send", pair.source, pair.ends[0], key=bytes(32))
    pair.hang_up()
    with pytest.raises(HelperFailure) as refused:
        receiver.reply(receive_id)
    assert refused.value.code == "authentication"
    with pytest.raises(HelperFailure) as told:
        sender.reply(send_id)
    assert told.value.code == "authentication"


@pytest.mark.parametrize("what", ["size", "number", "count", "kind"])
def test_another_list_of_regions_is_refused_in_words(pair: Pair, what: str, socket_dir: Path) -> None:
    wrong: list[Region] = {
        "size": [Memory(599), pair.target[1]],
        "number": [Memory(600, region=5), pair.target[1]],
        "count": [pair.target[0]],
        "kind": [Disk(socket_dir / "kind", 600, region=0), pair.target[1]],
    }[what]
    receiver, receive_id = pair.ask("receive", wrong, pair.ends[1])
    sender, send_id = pair.ask("send", pair.source, pair.ends[0])
    pair.hang_up()
    for helper, request in ((receiver, receive_id), (sender, send_id)):
        with pytest.raises(HelperFailure) as refused:
            helper.reply(request)
        assert refused.value.code == "mismatch"
        assert "region" in refused.value.message


def test_arguments_that_do_not_fit_their_descriptors(pair: Pair) -> None:
    layout = pair.source[0].describe()
    for change, said in (
        ({"size": 601 * PAGE}, "shorter"),
        ({"size": 100}, "multiple"),
        ({"block_size": 512}, "block_size"),
        ({"kind": "tape"}, "kind"),
        ({"surprise": 1}, "surprise"),
    ):
        with pytest.raises(HelperFailure, match=said):
            pair.sender.call(
                "send",
                [pair.ends[0].fileno(), pair.source[0].fds[0]],
                migration=MIGRATION,
                key=KEY,
                regions=[layout | change],
            )
    disk = pair.source[1].describe()
    for change in ({"allocated_offset": 1 << 40}, {"dirty_offset": 4}, {"data_offset": 1 << 60}):
        with pytest.raises(HelperFailure):
            pair.sender.call(
                "send",
                [pair.ends[0].fileno(), *pair.source[1].fds],
                migration=MIGRATION,
                key=KEY,
                regions=[disk | change],
            )
    for fds, regions, said in (
        ([], [layout], "shorter"),
        (pair.source[0].fds * 2, [layout], "descriptors"),
        (pair.source[0].fds * 2, [layout, layout], "twice"),
        ([], [], "at least one"),
    ):
        with pytest.raises(HelperFailure, match=said):
            pair.sender.call(
                "send", [pair.ends[0].fileno(), *fds], migration=MIGRATION, key=KEY, regions=regions
            )
    pair.connect()
    with pytest.raises(HelperFailure, match="already"):
        pair.ask("send", pair.source, socket.socketpair()[0])[0].reply(pair.sender.last_id)


@pytest.mark.parametrize("who", ["sender", "receiver"])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_kill_of_either_end_releases_nothing(pair: Pair, who: str, passes: int) -> None:
    rng = random.Random(12)
    pair.change(rng, 200)
    pair.connect(bandwidth=1_000_000)
    for _ in range(passes):
        pair.sender.call("bandwidth", bandwidth=0)
        pair.sent_pass()
        pair.sender.call("bandwidth", bandwidth=100_000)
        pair.change(rng, 200)
    request = pair.sender.send("pass")
    victim, other = (pair.sender, pair.receiver) if who == "sender" else (pair.receiver, pair.sender)
    victim.process.kill()
    if who == "receiver":
        with pytest.raises(HelperFailure):
            pair.sender.reply(request)
    other.wait_event("broken")
    assert other.status()["state"] == "broken"
    if who == "receiver":
        with pytest.raises(HelperFailure) as refused:
            pair.final()
        assert refused.value.code == "bad-state"


def test_release_that_could_not_leave_is_no(pair: Pair, relay: Relay) -> None:
    """The socket is full and cut before the last records: none of the release was handed over."""
    rng = random.Random(13)
    for page in range(600):
        pair.source[0].write(page, rng.randbytes(PAGE))
    relay.greet(pair)
    request = pair.sender.send("final", release=True)
    relay.record(relay.near)
    relay.close()
    reply, _ = pair.sender.reply(request)
    assert reply["released"] == "no"
    assert reply["match"] is None
    assert reply["message"]
    assert pair.sender.status()["state"] == "broken"
    assert pair.receiver.wait_event("broken")


@pytest.mark.parametrize("forwarded", [True, False])
def test_release_without_an_answer_is_maybe(pair: Pair, relay: Relay, forwarded: bool) -> None:
    pair.source[0].write(1, b"one".ljust(PAGE))
    relay.greet(pair)
    request = pair.sender.send("final", release=True)
    records = [relay.record(relay.near) for _ in range(4)]  # pages, pass, root, release
    for record in records if forwarded else records[:3]:
        relay.far.sendall(record)
    if forwarded:
        pair.receiver.wait_event("released")
    else:
        pair.receiver.wait_event("complete")
    relay.close()
    reply, _ = pair.sender.reply(request)
    assert reply["released"] == "maybe"
    if not forwarded:
        pair.receiver.wait_event("broken")
    assert pair.receiver.status()["state"] == ("released" if forwarded else "broken")


def test_cancel_is_refused_after_the_release(pair: Pair) -> None:
    pair.connect()
    assert pair.final()["released"] == "yes"
    pair.receiver.wait_event("released")
    for helper in (pair.sender, pair.receiver):
        with pytest.raises(HelperFailure) as refused:
            helper.call("cancel")
        assert refused.value.code == "bad-state"


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_cancel_ends_a_pass_under_way(pair: Pair, who: str) -> None:
    rng = random.Random(14)
    for page in range(600):
        pair.source[0].write(page, rng.randbytes(PAGE))
    pair.connect(bandwidth=100_000)
    request = pair.sender.send("pass")
    helper, other = (pair.sender, pair.receiver) if who == "sender" else (pair.receiver, pair.sender)
    if who == "sender":
        cancel = helper.send("cancel")
    else:
        helper.call("cancel")
    with pytest.raises(HelperFailure):
        pair.sender.reply(request)
    if who == "sender":
        helper.reply(cancel)
    assert helper.status()["state"] == "closed"
    other.wait_event("broken")


def test_a_full_overlay_is_said_to_both_ends(pair: Pair) -> None:
    limit = (1 << 16) + 10 * PAGE
    resource.prlimit(pair.receiver.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    pair.source[1].write(200, b"far".ljust(PAGE))
    pair.connect()
    with pytest.raises(HelperFailure, match="cannot write"):
        pair.sent_pass()
    assert "cannot write" in pair.receiver.wait_event("broken")["message"]


def test_bandwidth_is_obeyed(pair: Pair) -> None:
    """By the sender's own figures: bytes over its duration, no clock of this test."""
    rng = random.Random(15)
    for page in range(300):
        pair.source[0].write(page, rng.randbytes(PAGE))
    pair.connect(bandwidth=2_000_000)
    done = pair.sent_pass()
    assert done["sent_bytes"] / done["duration"] < 2_000_000 * 1.05
    assert pair.sender.status()["bandwidth"] == 2_000_000


def test_ends_with_its_controller(pair: Pair) -> None:
    pair.connect()
    pair.sender.close()
    assert pair.sender.process.wait(10) == 0
    pair.receiver.wait_event("broken")


def test_a_release_under_way_is_finished_without_the_controller(pair: Pair, relay: Relay) -> None:
    pair.source[0].write(1, b"one".ljust(PAGE))
    relay.greet(pair)
    pair.sender.send("final", release=True)
    records = [relay.record(relay.near) for _ in range(4)]
    pair.sender.close()
    for record in records:
        relay.far.sendall(record)
    pair.receiver.wait_event("released")
    assert pair.sender.process.poll() is None
    relay.near.sendall(b"".join(relay.record(relay.far) for _ in range(3)))
    assert pair.sender.process.wait(10) == 0


def test_command_line_mistakes(helper_binary: Path) -> None:
    for arguments in ([], ["--control"], ["--surprise", "1"]):
        done = subprocess.run(
            [helper_binary, "pages", *arguments], capture_output=True, timeout=10, text=True
        )
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1


def test_larger_memory_over_tcp(helper_binary: Path, socket_dir: Path) -> None:
    rng = random.Random(16)
    pair = Pair(helper_binary, socket_dir, pages=16384, disk_pages=5000)
    try:
        use_tcp(pair)
        for page in range(0, 16384, 3):
            pair.source[0].write(page, content(rng))
        pair.change(rng, 2000)
        pair.connect()
        pair.sent_pass()
        pair.change(rng, 2000)
        assert pair.final()["released"] == "yes"
        pair.assert_equal()
    finally:
        pair.close()
