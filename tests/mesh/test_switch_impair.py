# SPDX-License-Identifier: Apache-2.0
"""Impairments of a link: counted frames and minimum times, which hold on a busy machine as well."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import pytest

from tests.switch_rig import MakeSwitch, NetDriver, SwitchProcess, mac, number_of, numbered
from tests.waiting import wait_for

A, B = mac(1), mac(2)


class Link:
    def __init__(self, switch: SwitchProcess, stack: ExitStack) -> None:
        self.switch = switch
        switch.network()
        self.a: NetDriver = stack.enter_context(switch.guest(1, A))
        self.b: NetDriver = stack.enter_context(switch.guest(2, B))
        self.taken = 0

    def impair(self, **what: Any) -> None:
        self.switch.call("impair", port=1, **what)

    def counter(self, name: str) -> int:
        return int(self.switch.port_counters(1)[name])

    def pass_through(self, count: int, size: int = 60) -> list[int]:
        """The numbers that arrive of `count` frames sent, in order of arrival."""
        arrived: list[int] = []
        sent = self.counter("tx_frames")
        for start in range(0, count, 50):
            self.a.send(*(numbered(B, A, n, size) for n in range(start, min(start + 50, count))))
            self._collect(arrived)
        self.switch.wait_port(1, lambda p: p["tx_frames"] == sent + count and p["impaired_now"] == 0, 30)

        def taken() -> bool:
            before = self.switch.port_counters(2)
            self._collect(arrived)
            return bool(before["backlog"] == 0 and before["rx_frames"] - self.taken == len(arrived))

        wait_for(taken)
        self.taken += len(arrived)
        return arrived

    def _collect(self, arrived: list[int]) -> None:
        while (got := self.b.poll()) is not None:
            arrived.append(number_of(got[1]))


@pytest.fixture
def link(make: MakeSwitch, stack: ExitStack) -> Link:
    return Link(make(1), stack)


def test_delay_and_order(link: Link) -> None:
    link.impair(delay_us=60_000)
    begin = time.monotonic()
    link.a.send(*(numbered(B, A, n) for n in range(20)))
    assert [number_of(f) for f in link.b.receive_all(20)] == list(range(20))
    assert time.monotonic() - begin >= 0.06
    assert link.counter("tx_frames") == 20


def test_jitter_keeps_order_and_spreads(link: Link) -> None:
    link.impair(delay_us=20_000, jitter_us=15_000)
    times = []
    for n in range(40):
        begin = time.monotonic()
        link.a.send(numbered(B, A, n))
        assert number_of(link.b.receive()) == n
        times.append(time.monotonic() - begin)
        link.taken += 1
    assert min(times) >= 0.005
    assert max(times) - min(times) > 0.005
    assert sum(t >= 0.02 for t in times) > 8
    assert link.pass_through(200) == list(range(200))


def test_loss(link: Link) -> None:
    link.impair(loss_ppm=100_000)
    arrived = link.pass_through(4000)
    lost = link.counter("impaired_lost")
    assert len(arrived) + lost == 4000
    assert 270 <= lost <= 530, "10 % ± 7 standard deviations"
    assert arrived == sorted(set(arrived))


def test_total_loss(link: Link) -> None:
    link.impair(loss_ppm=1_000_000)
    assert link.pass_through(100) == []
    assert link.counter("impaired_lost") == 100


def test_duplicates(link: Link) -> None:
    link.impair(duplicate_ppm=200_000)
    arrived = link.pass_through(2000)
    doubled = link.counter("impaired_duplicated")
    assert 280 <= doubled <= 520, "20 % ± 7 standard deviations"
    assert len(arrived) == 2000 + doubled
    assert sorted(set(arrived)) == list(range(2000))


def test_reordering(link: Link) -> None:
    link.impair(delay_us=30_000, reorder_ppm=250_000)
    arrived = link.pass_through(1000)
    early = link.counter("impaired_reordered")
    assert 150 <= early <= 350, "25 % ± 7 standard deviations"
    assert sorted(arrived) == list(range(1000))
    assert arrived != sorted(arrived)


def test_rate(link: Link) -> None:
    """A second's worth of frames at 300 kB/s takes no less than a second (the burst is two frames)."""
    link.impair(rate=300_000, limit_bytes=1 << 20)
    begin = time.monotonic()
    assert link.pass_through(300, 1000) == list(range(300))
    took = time.monotonic() - begin
    assert took >= 0.98
    assert link.counter("impaired_over_rate") == 0


def test_rate_has_a_bounded_queue(link: Link) -> None:
    link.impair(rate=100_000, limit_bytes=20_000)
    arrived = link.pass_through(200, 1000)
    dropped = link.counter("impaired_over_rate")
    assert dropped > 100
    assert len(arrived) == 200 - dropped
    assert arrived == sorted(arrived)


def test_what_is_queued_leaves_when_the_link_becomes_perfect(link: Link) -> None:
    link.impair(delay_us=100_000)
    link.a.send(*(numbered(B, A, n) for n in range(10)))
    link.impair()
    link.a.send(*(numbered(B, A, n) for n in range(10, 20)))
    assert [number_of(f) for f in link.b.receive_all(20)] == list(range(20))


def test_only_the_sending_port_is_impaired(link: Link) -> None:
    link.impair(loss_ppm=1_000_000)
    link.b.send(numbered(A, B, 1))
    assert number_of(link.a.receive()) == 1
