# SPDX-License-Identifier: Apache-2.0
"""Network coordinates: they find the distances they are told of, and are not led astray."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from proto.vivaldi import DIMENSIONS, LEAST_HEIGHT, MOST_ERROR, SETTLED, Coordinate, Vivaldi, estimate


def spread(rtts: list[list[float]], rounds: int, noise: float = 0.0) -> list[Vivaldi]:
    """Peers with these round trips between them, after each has measured `rounds` random others."""
    rng = random.Random(7)
    peers = [Vivaldi(random.Random(seed)) for seed in range(len(rtts))]
    for _ in range(rounds):
        for a, peer in enumerate(peers):
            b = rng.choice([other for other in range(len(peers)) if other != a])
            sample = rtts[a][b] * (1 + noise * rng.random())
            peer.observe(str(b), peers[b].coordinate, sample)
    return peers


def errors(peers: list[Vivaldi], rtts: list[list[float]]) -> list[float]:
    return [
        abs(estimate(peers[a].coordinate, peers[b].coordinate) - rtts[a][b]) / rtts[a][b]
        for a in range(len(peers))
        for b in range(a)
    ]


def plane(count: int) -> list[list[float]]:
    """Peers on a plane of 100 ms by 100 ms, each with an access delay of 1 to 10 ms."""
    rng = random.Random(3)
    places = [(rng.random() / 10, rng.random() / 10, 0.001 + 0.009 * rng.random()) for _ in range(count)]
    return [[math.dist(a[:2], b[:2]) + a[2] + b[2] for b in places] for a in places]


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_estimates_come_close_to_what_was_measured(noise: float) -> None:
    rtts = plane(30)
    found = errors(spread(rtts, 300, noise), rtts)
    assert statistics.median(found) < 0.15


def test_two_sites_are_told_apart() -> None:
    rtts = [[0.001 if (a < 4) == (b < 4) else 0.15 for b in range(8)] for a in range(8)]
    peers = spread(rtts, 400)
    near = estimate(peers[0].coordinate, peers[1].coordinate)
    far = estimate(peers[0].coordinate, peers[5].coordinate)
    assert near < 0.02
    assert 0.12 < far < 0.18


def test_one_outlier_moves_nothing_far() -> None:
    rtts = plane(10)
    peers = spread(rtts, 300)
    before = peers[0].coordinate
    for _ in range(2):
        peers[0].observe("1", peers[1].coordinate, rtts[0][1])
    peers[0].observe("1", peers[1].coordinate, 9.0)
    assert peers[0].measured("1") == pytest.approx(rtts[0][1], rel=0.01)
    assert estimate(before, peers[0].coordinate) < 0.03


@pytest.mark.parametrize(
    "place",
    [
        Coordinate((math.nan,) * DIMENSIONS),
        Coordinate((1e9,) * DIMENSIONS),
        Coordinate((0.0,)),
        Coordinate(height=-1.0),
        Coordinate(error=0.0),
    ],
)
def test_rubbish_is_not_believed(place: Coordinate) -> None:
    peer = Vivaldi(random.Random(1))
    peer.observe("a", place, 0.1)
    assert peer.coordinate == Coordinate()
    assert peer.measured("a") is None


@pytest.mark.parametrize("rtt", [0.0, -1.0, 11.0, math.nan, math.inf])
def test_an_impossible_round_trip_is_ignored(rtt: float) -> None:
    peer = Vivaldi(random.Random(1))
    peer.observe("a", Coordinate(), rtt)
    assert peer.rtt("a") is None


def test_a_liar_cannot_throw_a_peer_out_of_the_space() -> None:
    peer = Vivaldi(random.Random(1))
    for number in range(2000):
        side = 9.9 if number % 2 else -9.9
        peer.observe("liar", Coordinate((side,) * DIMENSIONS, 1e-5, 1e-3), 0.001)
        assert peer.coordinate.sound


def test_peers_at_the_same_place_are_pushed_apart() -> None:
    peer = Vivaldi(random.Random(1))
    peer.observe("a", Coordinate((0.0,) * DIMENSIONS, LEAST_HEIGHT, MOST_ERROR), 0.1)
    assert estimate(peer.coordinate, Coordinate()) > 0.01


NEAR = Coordinate((0.0,) * DIMENSIONS, 0.001, 0.1)
FAR = Coordinate((0.1, 0.0, 0.0, 0.0), 0.001, 0.1)


def settled() -> Vivaldi:
    """A peer that is sure to be near `NEAR`."""
    peer = Vivaldi(random.Random(1))
    while peer.coordinate.error > SETTLED:
        peer.observe("a", NEAR, 0.01)
    return peer


def test_a_peer_never_measured_is_estimated_by_where_it_is_said_to_be_until_it_is_forgotten() -> None:
    peer = settled()
    assert peer.rtt("b") is None
    peer.hear("b", FAR, 5.0)
    assert peer.rtt("b") == estimate(peer.coordinate, FAR)
    assert peer.rtt("b") == pytest.approx(0.1, rel=0.2)
    peer.observe("b", FAR, 0.3)
    assert peer.rtt("b") == 0.3, "what was measured counts"
    peer.forget("b")
    assert peer.rtt("b") is None


def test_a_place_that_is_not_sure_yet_is_no_estimate() -> None:
    peer = settled()
    peer.hear("b", FAR._replace(error=2 * SETTLED), 5.0)
    assert peer.rtt("b") is None
    new = Vivaldi(random.Random(1))
    new.hear("b", FAR, 5.0)
    assert new.rtt("b") is None


def test_of_two_words_where_a_peer_is_the_newer_counts_however_late_the_other_comes() -> None:
    peer = settled()
    peer.hear("b", FAR, 5.0)
    peer.hear("b", NEAR, 4.0)
    assert peer.place("b") == (FAR, 5.0)
    peer.hear("b", NEAR, 6.0)
    assert peer.place("b") == (NEAR, 6.0)
    peer.hear("b", Coordinate((math.nan,) * DIMENSIONS), 7.0)
    assert peer.place("b") == (NEAR, 6.0)
