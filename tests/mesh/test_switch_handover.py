# SPDX-License-Identifier: Apache-2.0
"""A guest's port moves between switches while others send to it: nothing is lost, doubled or reordered.

Every sender numbers its frames, and every fifth goes to all. The moving guest must see each sender's numbers
complete and in order, whatever the delays of the paths, with senders at the old place, the new place and a
third one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path as FilePath

import pytest

from tests.helperclient import HelperFailure
from tests.switch_rig import (
    BROADCAST,
    MARK,
    NETWORK,
    NetDriver,
    Path,
    SwitchProcess,
    mac,
    mesh,
    number_of,
    numbered,
)
from tests.waiting import wait_for

GUEST = mac(99)
PORT = 9


class Sender(threading.Thread):
    """Sends numbered frames to the guest until told to end, about one per millisecond."""

    def __init__(self, driver: NetDriver) -> None:
        super().__init__(daemon=True)
        self.driver = driver
        self.sent = 0
        self.ending = threading.Event()

    def run(self) -> None:
        while not self.ending.wait(0.001):
            to = BROADCAST if self.sent % 5 == 4 else GUEST
            self.driver.send(numbered(to, self.driver.address, self.sent))
            self.sent += 1


class Receiver:
    """What the guest saw, by sender."""

    def __init__(self) -> None:
        self.seen: dict[bytes, list[int]] = {}

    def take(self, driver: NetDriver) -> int:
        taken = 0
        while (got := driver.poll()) is not None:
            frame = got[1]
            self.seen.setdefault(frame[6:12], []).append(number_of(frame))
            taken += 1
        return taken

    def take_for(self, driver: NetDriver, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.take(driver)
            time.sleep(0.002)

    def complete(self, senders: list[Sender]) -> bool:
        return all((self.seen.get(s.driver.address) or [-1])[-1] == s.sent - 1 for s in senders)

    def finish(self, driver: NetDriver, senders: list[Sender], timeout: float = 20.0) -> None:
        for sender in senders:
            sender.ending.set()
            sender.join(10)

        def done() -> bool:
            self.take(driver)
            return self.complete(senders)

        wait_for(done, timeout, lambda: {a: (len(n), n[-1]) for a, n in self.seen.items()})
        self.take_for(driver, 0.3)
        for sender in senders:
            assert self.seen[sender.driver.address] == list(range(sender.sent)), (
                f"of {sender.sent} frames from {sender.driver.address.hex()}"
            )


class Field:
    """Switches X, S, D (1, 2, 3, …) with a sender at each, and the guest at S."""

    def __init__(self, binary: FilePath, directory: FilePath, stack: ExitStack, count: int = 3) -> None:
        self.stack = stack
        self.path = stack.enter_context(Path())
        self.switches = [stack.enter_context(SwitchProcess(binary, directory, n + 1)) for n in range(count)]
        mesh(*self.switches, path=self.path)
        self.drivers = [stack.enter_context(s.guest(1, mac(s.number))) for s in self.switches]
        for switch in self.switches:
            for other in self.switches:
                if other is not switch:
                    switch.mac_set(mac(other.number), peer=other.number)
            if switch.number != 2:
                switch.mac_set(GUEST, peer=2)
        self.guest = stack.enter_context(self.switches[1].guest(PORT, GUEST))
        self.senders = [Sender(d) for d in self.drivers]
        stack.callback(self.end)
        self.receiver = Receiver()

    def end(self) -> None:
        for sender in self.senders:
            sender.ending.set()
            if sender.is_alive():
                sender.join(10)

    def delays(self, *between: tuple[int, int, float]) -> None:
        for a, b, seconds in between:
            self.path.set_delay(self.switches[a - 1], self.switches[b - 1], seconds)

    def begin(self, seconds: float = 0.3) -> None:
        self.path.start()
        for sender in self.senders:
            sender.start()
        self.receiver.take_for(self.guest, seconds)

    def prepare(self, to: int, epoch: int, source: int) -> FilePath:
        for switch in self.switches:
            switch.mac_next(GUEST, peer=0 if switch.number == to else to, epoch=epoch)
        target = self.switches[to - 1]
        path = target.add_port(PORT, GUEST, epoch=epoch, state="incoming")
        target.expect(PORT, epoch, source)
        return path

    def freeze(self, source: int) -> None:
        self.switches[source - 1].call("hold", port=PORT)
        self.guest.freeze()
        self.receiver.take(self.guest)

    def resume(
        self, path: FilePath, to: int, epoch: int, source: int, *, announce_first: bool = False
    ) -> None:
        old, new = self.switches[source - 1], self.switches[to - 1]
        self.guest.close()
        redirect: Callable[[], object] = lambda: old.call("redirect", port=PORT, peer=to, epoch=epoch)  # noqa: E731
        if not announce_first:
            redirect()
        self.guest = self.stack.enter_context(NetDriver(path, GUEST))
        new.call("announce", port=PORT)
        if announce_first:
            self.receiver.take_for(self.guest, 0.05)
            redirect()

    def done(self, at: int, epoch: int) -> None:
        """The catalog says so to all."""
        for switch in self.switches:
            switch.mac_set(GUEST, peer=0 if switch.number == at else at, epoch=epoch)

    def finish(self) -> None:
        self.receiver.finish(self.guest, self.senders)


@pytest.fixture
def field(helper_binary: FilePath, socket_dir: FilePath) -> Iterator[Field]:
    with ExitStack() as stack:
        yield Field(helper_binary, socket_dir, stack)


@pytest.mark.parametrize("announce_first", [False, True], ids=["redirect-first", "announce-first"])
@pytest.mark.parametrize(
    "delays",
    [
        [],
        [(1, 2, 0.08), (2, 3, 0.01), (1, 3, 0.001)],
        [(1, 2, 0.001), (2, 3, 0.09), (1, 3, 0.001)],
        [(1, 2, 0.03), (2, 1, 0.03), (2, 3, 0.03), (3, 2, 0.03), (1, 3, 0.09), (3, 1, 0.001)],
    ],
    ids=["near", "slow-to-old", "slow-redirect", "slow-new"],
)
def test_a_move_keeps_every_frame_in_order(
    field: Field, delays: list[tuple[int, int, float]], announce_first: bool
) -> None:
    field.delays(*delays)
    field.begin()
    path = field.prepare(to=3, epoch=2, source=2)
    field.receiver.take_for(field.guest, 0.05)
    field.freeze(source=2)
    time.sleep(0.05)
    field.resume(path, to=3, epoch=2, source=2, announce_first=announce_first)
    field.receiver.take_for(field.guest, 0.3)
    field.done(at=3, epoch=2)
    field.receiver.take_for(field.guest, 0.2)
    field.finish()
    old, new = (field.switches[n].port_counters(PORT) for n in (1, 2))
    assert old["held"] > 0
    assert old["redirected"] > 0
    assert old["lost_held"] == new["lost_held"] == new["markers_missing"] == new["rx_dropped"] == 0
    assert new["redirected_rx"] == old["redirected"]
    assert old["tx_fenced"] == 0


def test_there_and_back(field: Field) -> None:
    """The second move begins while frames redirected by the first one are on their way."""
    field.delays((1, 2, 0.06), (2, 3, 0.04), (3, 2, 0.02), (1, 3, 0.01))
    field.begin()
    path = field.prepare(to=3, epoch=2, source=2)
    field.freeze(source=2)
    field.resume(path, to=3, epoch=2, source=2)
    field.receiver.take_for(field.guest, 0.02)
    wait_for(lambda: any(m["mac"] == GUEST and m["peer"] == 3 for m in field.switches[0].counters()["macs"]))
    # The frozen original at 2 is still there, so the guest goes on to a third place: 1.
    path = field.prepare(to=1, epoch=3, source=3)
    field.freeze(source=3)
    time.sleep(0.02)
    field.resume(path, to=1, epoch=3, source=3)
    field.receiver.take_for(field.guest, 0.3)
    field.done(at=1, epoch=3)
    field.finish()


def test_a_cancelled_hold_delivers_everything(field: Field) -> None:
    field.begin()
    field.switches[1].call("hold", port=PORT)
    field.receiver.take(field.guest)
    time.sleep(0.2)
    assert not field.receiver.take(field.guest)
    wait_for(lambda: field.switches[1].port_counters(PORT)["held_now"] > 300)
    field.switches[1].call("unhold", port=PORT)
    field.receiver.take_for(field.guest, 0.2)
    field.finish()
    assert field.switches[1].port_counters(PORT)["lost_held"] == 0


def test_lost_markers_cost_a_wait_only(field: Field) -> None:
    """All markers from X to S are lost: D stops waiting after two round trips without redirected frames."""
    x, s = field.switches[:2]
    way = field.path.port(x, s)
    field.path.lossy = lambda direction, packet: direction == way and packet[0] & 7 == MARK
    field.begin()
    path = field.prepare(to=3, epoch=2, source=2)
    field.freeze(source=2)
    field.resume(path, to=3, epoch=2, source=2)
    field.receiver.take_for(field.guest, 0.3)
    field.done(at=3, epoch=2)
    x_sender = field.senders[0]
    x_sender.ending.set()
    x_sender.join(10)

    # What X sends to all may be doubled here, since S goes on redirecting it; what is for the guest is not.
    def of_x() -> list[int]:
        field.receiver.take(field.guest)
        return [n for n in field.receiver.seen[mac(1)] if n % 5 != 4]

    sent = [n for n in range(x_sender.sent) if n % 5 != 4]
    wait_for(lambda: of_x() == sent, state=lambda: (len(of_x()), len(sent)))
    assert field.switches[2].port_counters(PORT)["markers_missing"] >= 1


def test_a_lost_announcement_is_made_up_by_the_catalog(field: Field) -> None:
    x, _, d = field.switches
    way = field.path.port(d, x)
    field.path.lossy = lambda direction, packet: direction == way
    field.begin()
    path = field.prepare(to=3, epoch=2, source=2)
    field.freeze(source=2)
    field.resume(path, to=3, epoch=2, source=2)
    field.receiver.take_for(field.guest, 0.3)
    entry = next(m for m in x.counters()["macs"] if m["mac"] == GUEST)
    assert entry["peer"] == 2, "X did not hear of it yet"
    field.done(at=3, epoch=2)
    field.receiver.take_for(field.guest, 0.2)
    field.finish()


def test_the_first_frame_moves_the_entry(field: Field) -> None:
    """A guest that sends runs: no announcement is needed."""
    field.begin()
    path = field.prepare(to=3, epoch=2, source=2)
    field.freeze(source=2)
    field.switches[1].call("redirect", port=PORT, peer=3, epoch=2)
    field.guest.close()
    field.guest = field.stack.enter_context(NetDriver(path, GUEST))
    field.guest.send(numbered(mac(1), GUEST, 5))
    wait_for(lambda: any(m["mac"] == GUEST and m["peer"] == 3 for m in field.switches[0].counters()["macs"]))
    field.receiver.take_for(field.guest, 0.2)
    field.finish()


def test_without_an_open_handover_nobody_takes_an_address(field: Field) -> None:
    x, s, d = field.switches
    field.path.start()
    d.add_port(PORT, GUEST, epoch=2, state="incoming")
    d.call("announce", port=PORT)
    wait_for(lambda: x.counters()["strays"] > 0 and s.counters()["strays"] > 0)
    for switch in (x, s):
        entry = next(m for m in switch.counters()["macs"] if m["mac"] == GUEST)
        assert (entry["peer"], entry["epoch"]) == (2 if switch is x else 0, 1)
    impostor = field.stack.enter_context(NetDriver(d.directory / f"v3-{PORT}", GUEST))
    impostor.send(numbered(mac(1), GUEST, 1))
    x.wait_peer(3, lambda p: p["spoofed"] == 1)
    assert field.drivers[0].silent()


def test_the_old_place_is_fenced_after_the_redirect(field: Field) -> None:
    field.begin(0.05)
    field.prepare(to=3, epoch=2, source=2)
    field.switches[1].call("hold", port=PORT)
    field.switches[1].call("redirect", port=PORT, peer=3, epoch=2)
    field.guest.send(numbered(mac(1), GUEST, 1))
    field.switches[1].wait_port(PORT, lambda p: p["tx_fenced"] == 1)
    for op in ("unhold", "announce"):
        with pytest.raises(HelperFailure, match=r"redirected|elsewhere"):
            field.switches[1].call(op, port=PORT)
    for sender in field.senders:
        sender.ending.set()


def test_what_is_held_is_bounded_and_the_rest_counted(helper_binary: FilePath, socket_dir: FilePath) -> None:
    with SwitchProcess(helper_binary, socket_dir, 1) as switch:
        switch.network()
        with switch.guest(1, mac(1)) as sender, switch.guest(PORT, GUEST) as guest:
            switch.call("hold", port=PORT)
            frame = numbered(GUEST, mac(1), 0, 1514)
            count = (64 << 20) // 1514 + 2000
            for _ in range(count // 50):
                sender.send(*[frame] * 50)
            switch.wait_port(1, lambda p: p["tx_frames"] == count // 50 * 50, timeout=30)
            held = switch.port_counters(PORT)
            assert held["lost_held"] > 0
            assert held["held"] + held["lost_held"] == count // 50 * 50
            assert held["held"] * 1514 <= 64 << 20
            switch.call("unhold", port=PORT)
            assert len(guest.receive_all(300)) == 300


def test_an_epoch_that_jumps_is_a_failover(field: Field) -> None:
    """No marker, no grace: what the old place still sends is refused at once."""
    x, s, _ = field.switches
    field.path.start()
    x.call("mac_set", network=NETWORK, mac=GUEST, peer=3, epoch=3)
    field.guest.send(numbered(mac(1), GUEST, 1))
    x.wait_peer(2, lambda p: p["spoofed"] == 1)
    assert s.counters()["strays"] == 0
