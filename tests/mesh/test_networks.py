# SPDX-License-Identifier: Apache-2.0
"""Networks of real peers: whole `Peer` objects in this process, with their TLS links and real switches.

The guests are stopped as far as the catalog goes; their network drivers are played by the test, so that only
the part under test decides what happens to frames.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mobid import config as configuration
from mobid.identity import load_or_create
from mobid.peer import Outcome, Peer, load
from mobid.switch import Switch
from proto import entries
from tests.switch_rig import BROADCAST, NetDriver, mac, number_of, numbered

A, B, C = "default/a", "default/b", "default/c"
NET = "default:lan"
TIMEOUT = 30.0


def interface(n: int) -> entries.Interface:
    return entries.Interface(name="eth1", mac=mac(n).hex(":"), network=NET)


class Meshwork:
    """Peers of one mesh in this process."""

    def __init__(self, base: Path, nursery: trio.Nursery, stack: AsyncExitStack) -> None:
        self.base = base
        self.nursery = nursery
        self.stack = stack
        self.peers: list[Peer] = []
        self.drivers: list[NetDriver] = []
        self.reconnected: list[str] = []
        self.ended: dict[str, trio.Event] = {}

    async def start(self, name: str, join: str | None = None) -> Peer:
        config = configuration.Config(
            directory=self.base / name, name=name, listen=("127.0.0.1", 0), join=join
        )
        self.stack.callback(configuration.prepare(config).release)
        identity = load_or_create(config.path("identity.pem"))
        peer = load(config, identity)
        await peer.open()
        if peer.outcome is Outcome.REPLACED:
            await peer.close()
            peer = load(configuration.Config(config.directory, listen=("127.0.0.1", 0)), identity)
            await peer.open()
        ready = trio.Event()
        self.nursery.start_soon(self.run, peer, ready)
        with trio.fail_after(TIMEOUT):
            await ready.wait()

        async def reconnect(guest: str) -> None:
            self.reconnected.append(guest)

        peer.networks.reconnect = reconnect
        self.peers.append(peer)
        return peer

    async def run(self, peer: Peer, ready: trio.Event) -> None:
        self.ended[peer.id] = trio.Event()
        try:
            await peer.run(ready.set)
        finally:
            with trio.CancelScope(shield=True):
                await peer.close()
            self.ended[peer.id].set()

    async def end(self, peer: Peer) -> None:
        """The peer ends, as by a signal; its switch goes on."""
        ended = self.ended[peer.id]
        peer.end()
        with trio.fail_after(TIMEOUT):
            await ended.wait()
        self.peers.remove(peer)

    async def put(self, peer: Peer, *wanted: entries.Entry) -> None:
        for entry in wanted:
            await peer.catalog.propose(entry)
        index = peer.catalog.state.index
        for other in self.peers:
            await other.catalog.wait(lambda state: state.index >= index, TIMEOUT)

    async def guest(self, peer: Peer, key: str, n: int) -> NetDriver:
        """A guest of this peer, as the catalog says, with a running driver."""
        guest = entries.Guest(
            key=key, id=f"g{n}", image="none", memory=1 << 20, owner=peer.id, wanted="stopped",
            interfaces=(interface(n),),
        )  # fmt: skip
        await self.put(peer, entries.AddGuest(guest=guest))
        return await self.driver(peer, key, n)

    async def driver(self, peer: Peer, key: str, n: int, *, incoming: bool = False) -> NetDriver:
        guest = peer.catalog.state.guests[key]
        path = await peer.networks.add_port(guest, interface(n), incoming=incoming)
        driver = NetDriver(path, mac(n))
        self.stack.callback(driver.close)
        return driver


async def arrives(driver: NetDriver, accept: Callable[[bytes], bool] = lambda _frame: True) -> bytes:
    with trio.fail_after(TIMEOUT):
        while True:
            got = driver.poll()
            if got is not None and accept(got[1]):
                return got[1]
            if got is None:
                await trio.sleep(0.005)


async def gets_through(source: NetDriver, to: NetDriver, number: int) -> None:
    """Sends until one arrives: tunnels come up by themselves after a change."""
    with trio.fail_after(TIMEOUT):
        while True:
            source.send(numbered(to.address, source.address, number))
            for _ in range(20):
                await trio.sleep(0.005)
                got = to.poll()
                if got is not None and number_of(got[1]) == number:
                    return


async def comes_true(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(TIMEOUT):
        while True:
            if await condition():
                return
            await trio.sleep(0.02)


@asynccontextmanager
async def meshwork(base: Path, names: tuple[str, ...]) -> AsyncGenerator[Meshwork, None]:
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        made = Meshwork(base, nursery, stack)
        try:
            first = await made.start(names[0])
            network = entries.Network(
                key=NET, lab="default", kind="network", members=((A, "eth1"), (B, "eth1"))
            )
            for name in names[1:]:
                token = await first.links.call(
                    first.id, "peer.token.new", {"ttl": 600.0, "uses": 1, "role": "peer"}
                )
                await made.start(name, token["token"])
            await made.put(first, entries.PutNetwork(network=network))
            yield made
        finally:
            with trio.CancelScope(shield=True):
                for peer in made.peers:
                    await peer.networks.close()
            nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def environment(helper_binary: Path, socket_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBI_HELPER", str(helper_binary))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_dir / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(socket_dir / "cache"))
    (socket_dir / "run").mkdir()


async def test_frames_between_peers(socket_dir: Path) -> None:
    async with meshwork(socket_dir, ("one", "two")) as mesh:
        one, two = mesh.peers
        a, b = await mesh.guest(one, A, 1), await mesh.guest(two, B, 2)
        await gets_through(a, b, 1)
        await gets_through(b, a, 2)
        a.send(numbered(BROADCAST, a.address, 3))
        assert number_of(await arrives(b, lambda f: number_of(f) == 3)) == 3
        rows = await one.links.call(one.id, "net.ls")
        assert rows[0]["network"] == NET
        assert rows[0]["members"] == ["a:eth1", "b:eth1"]
        shown = await two.links.call(two.id, "net.show", {"network": "lan"})
        assert [p["endpoint"] for p in shown["ports"]] == ["a:eth1", "b:eth1"]
        assert all(p["counters"]["tx_frames"] > 0 for p in shown["ports"])
        assert await one.networks.add_port(one.catalog.state.guests[A], interface(1))
        assert len(one.networks.ports) == 1, "the same port again"


async def test_impairments_of_a_link(socket_dir: Path) -> None:
    async with meshwork(socket_dir, ("one", "two")) as mesh:
        one, two = mesh.peers
        a, b = await mesh.guest(one, A, 1), await mesh.guest(two, B, 2)
        await gets_through(a, b, 1)
        row = await two.links.call(two.id, "net.impair", {"link": NET, "loss": 1.0, "endpoint": "a:eth1"})
        assert row["loss"] == 1.0

        async def loses() -> bool:
            a.send(numbered(b.address, a.address, 9))
            return bool((await one.networks.port_counters())[0]["impaired_lost"])

        await comes_true(loses)
        await gets_through(b, a, 2)
        await one.links.call(one.id, "net.impair", {"link": NET, "loss": 0.0})
        await gets_through(a, b, 3)
        with pytest.raises(Exception, match="endpoint"):
            await one.links.call(one.id, "net.impair", {"link": NET, "loss": 0.0, "endpoint": "x:eth1"})


async def test_a_killed_switch_is_replaced(socket_dir: Path) -> None:
    async with meshwork(socket_dir, ("one", "two")) as mesh:
        one, two = mesh.peers
        a, b = await mesh.guest(one, A, 1), await mesh.guest(two, B, 2)
        await gets_through(a, b, 1)
        switch = one.networks._switch
        assert switch is not None
        os.kill(switch.helper.pid, signal.SIGKILL)

        async def reconnected() -> bool:
            return mesh.reconnected == [A]

        await comes_true(reconnected)
        a = await mesh.driver(one, A, 1)
        await gets_through(a, b, 2)
        await gets_through(b, a, 3)
        kinds = [event["kind"] for event in one.events.since(None)]
        assert kinds.count("switch.lost") == 1
        assert kinds.count("switch.started") == 2


async def migrate(mesh: Meshwork, source: Peer, to: Peer, old: NetDriver) -> NetDriver:
    """B moves; what the migration shell asks of the networks, in its order."""
    key, n = B, 2
    epoch = source.catalog.state.guests[key].epoch
    token = f"{epoch:032x}"
    await mesh.put(
        source,
        entries.Handover(
            migration=token, guest=key, epoch=epoch, source=source.id, destination=to.id, timeout=1e12
        ),
    )
    guest = to.catalog.state.guests[key]
    path = await to.networks.add_port(guest, interface(n), incoming=True)
    await to.networks.expect(key, source.id, epoch + 1)
    await source.networks.hold(key)
    old.freeze()
    await trio.sleep(0.02)
    await source.networks.redirect(key, to.id, epoch + 1)
    new = NetDriver(path, mac(n))
    mesh.stack.callback(new.close)
    await to.networks.announce(key)
    await to.catalog.propose(entries.Done(migration=token))
    await source.networks.remove_port(key, "eth1")
    return new


async def test_a_guest_moves_between_peers_without_losing_a_frame(socket_dir: Path) -> None:
    async with meshwork(socket_dir, ("one", "two", "three")) as mesh:
        one, two, three = mesh.peers
        a, b = await mesh.guest(one, A, 1), await mesh.guest(two, B, 2)
        await gets_through(a, b, 1 << 20)
        await trio.sleep(0.05)
        seen: list[int] = []

        def take(driver: NetDriver) -> None:
            while (got := driver.poll()) is not None:
                seen.append(number_of(got[1]))

        take(b)
        seen.clear()
        sent = 0
        ending = False

        async def send() -> None:
            nonlocal sent
            while not ending:
                a.send(numbered(BROADCAST if sent % 7 == 0 else b.address, a.address, sent))
                sent += 1
                await trio.sleep(0.002)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.sleep(0.2)
            old = b
            b = await migrate(mesh, two, three, old)
            take(old)
            await trio.sleep(0.3)
            take(b)
            old = b
            b = await migrate(mesh, three, one, old)
            take(old)
            await trio.sleep(0.3)
            ending = True

        async def complete() -> bool:
            take(b)
            return len(seen) >= sent

        with trio.move_on_after(TIMEOUT):
            await comes_true(complete)
        assert seen == list(range(sent))
        frames = await two.networks.frames(B)
        assert frames.lost == 0
        assert frames.held > 0


async def test_a_cancelled_move_delivers_what_was_held(socket_dir: Path) -> None:
    async with meshwork(socket_dir, ("one", "two")) as mesh:
        one, two = mesh.peers
        a, b = await mesh.guest(one, A, 1), await mesh.guest(two, B, 2)
        await gets_through(a, b, 1)
        await mesh.put(
            two,
            entries.Handover(
                migration="f" * 32, guest=B, epoch=1, source=two.id, destination=one.id, timeout=1e12
            ),
        )
        await one.networks.add_port(one.catalog.state.guests[B], interface(2), incoming=True)
        await one.networks.expect(B, two.id, 2)
        await two.networks.hold(B)
        a.send(numbered(b.address, a.address, 77))

        async def held() -> bool:
            return (await two.networks.frames(B)).held == 1

        await comes_true(held)
        await one.networks.remove_port(B, "eth1")
        await two.networks.unhold(B)
        await mesh.put(two, entries.Cancel(migration="f" * 32, by=two.id, reason="no"))
        assert number_of(await arrives(b, lambda f: number_of(f) == 77)) == 77
        await gets_through(a, b, 78)


async def test_the_switch_is_taken_back_by_the_next_peer(socket_dir: Path) -> None:
    """A peer ends by a signal: its switch, with the guests' connections, goes on and is adopted."""
    async with meshwork(socket_dir, ("one", "two")) as mesh:
        one, two = mesh.peers
        a, b = await mesh.guest(one, A, 1), await mesh.guest(two, B, 2)
        await gets_through(a, b, 1)
        switch = two.networks._switch
        assert switch is not None
        await mesh.end(two)
        await gets_through(a, b, 2)
        again = await restart(mesh, two)
        adopted = again.networks._switch
        assert adopted is not None
        assert adopted.adopted
        assert adopted.helper.pid == switch.helper.pid
        assert [(p.guest, p.epoch) for p in again.networks.ports] == [(B, 1)]
        await gets_through(a, b, 3)
        await gets_through(b, a, 4)


async def test_a_catalog_that_is_behind_costs_no_port(socket_dir: Path) -> None:
    """The note of what is committed is lost: at its start the peer does not know its guest, but it runs."""
    async with meshwork(socket_dir, ("one",)) as mesh:
        (one,) = mesh.peers
        a, b = await mesh.guest(one, A, 1), await mesh.guest(one, B, 2)
        await gets_through(a, b, 1)
        await mesh.end(one)
        (one.config.directory / "catalog" / "commit").unlink()
        again = await restart(mesh, one)
        await again.catalog.wait(lambda _state: again.catalog.fresh, TIMEOUT)

        async def both() -> bool:
            return {port.guest for port in again.networks.ports} == {A, B}

        await comes_true(both)
        await gets_through(a, b, 2)
        await gets_through(b, a, 3)


async def test_ports_of_guests_that_were_removed_meanwhile_go(socket_dir: Path) -> None:
    async with meshwork(socket_dir, ("one", "two")) as mesh:
        one, two = mesh.peers
        a, b = await mesh.guest(one, A, 1), await mesh.guest(two, B, 2)
        await gets_through(a, b, 1)
        await mesh.end(two)
        await mesh.put(one, entries.RemoveGuest(guest=B))
        (two.config.directory / "catalog" / "commit").unlink()
        again = await restart(mesh, two)

        async def gone() -> bool:
            switch = again.networks._switch
            return switch is None or not (await switch.counters())["ports"]

        await comes_true(gone)


async def restart(mesh: Meshwork, ended: Peer) -> Peer:
    config = configuration.Config(directory=ended.config.directory, listen=("127.0.0.1", 0))
    peer = load(config, ended.identity)
    await peer.open()
    ready = trio.Event()
    mesh.nursery.start_soon(mesh.run, peer, ready)
    with trio.fail_after(TIMEOUT):
        await ready.wait()
    mesh.peers.append(peer)
    return peer


async def test_tunnel_keys_are_renewed_without_losing_a_frame(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By age, and at once when somebody has been evicted, whose packets then count for nothing."""
    keys: list[tuple[str, int]] = []
    set_peer = Switch.set_peer

    async def noted(switch: Switch, peer: str, udp: tuple[str, int], key_id: int, key: bytes) -> None:
        await set_peer(switch, peer, udp, key_id, key)
        keys.append((peer, key_id))

    monkeypatch.setattr(Switch, "set_peer", noted)
    async with meshwork(socket_dir, ("one", "two", "three")) as mesh:
        one, two, three = mesh.peers
        a, b = await mesh.guest(one, A, 1), await mesh.guest(two, B, 2)
        c = await mesh.guest(three, C, 3)
        await gets_through(a, b, 1)
        await gets_through(c, a, 2)
        sent = arrived = 100
        for _ in range(40):
            one.networks.tunnels.renew()
            two.networks.tunnels.renew()
            for _ in range(10):
                sent += 1
                a.send(numbered(b.address, a.address, sent))
                await trio.sleep(0.002)
            while arrived < sent:
                arrived += 1
                assert number_of(await arrives(b, lambda f: number_of(f) > 100)) == arrived
        assert len({key for peer, key in keys if peer == two.id}) > 10
        before = len(keys)
        three_ended = mesh.ended[three.id]
        await one.links.call(one.id, "peer.evict", {"peer": "three"})
        mesh.peers.remove(three)

        async def gone_and_renewed() -> bool:
            partners = [peer.networks._switch for peer in (one, two)]
            known = any(switch is not None and switch.knows(three.id) for switch in partners)
            return not known and {one.id, two.id} <= {peer for peer, _ in keys[before:]}

        await comes_true(gone_and_renewed)
        await gets_through(a, b, 9999)
        with trio.fail_after(TIMEOUT):
            await three_ended.wait()


async def test_no_guest_no_switch(socket_dir: Path) -> None:
    async with meshwork(socket_dir, ("one",)) as mesh:
        (one,) = mesh.peers
        assert one.networks._switch is None
        assert not (one.config.runtime / "switch.sock").exists()
        facts: dict[str, Any] = await one.links.call(one.id, "net.show", {"network": NET})
        assert facts["ports"] == []
