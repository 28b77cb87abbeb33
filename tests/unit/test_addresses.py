# SPDX-License-Identifier: Apache-2.0
"""What follows from a lab without a choice, and where its guests go."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.addresses import mac_address, segments, subnet_addresses
from proto.lab import Lab, guest
from proto.labcheck import parse_lab
from proto.labfields import parse_subnet
from proto.plan import Host, PlanError, place


def make(
    nodes: dict[str, Any], links: list[Any] | None = None, networks: dict[str, Any] | None = None
) -> Lab:
    topology: dict[str, Any] = {"defaults": {"image": "mini"}, "nodes": nodes}
    return parse_lab(
        {"name": "t", "topology": {**topology, "links": links or [], "networks": networks or {}}}
    )


UFS = make(
    {"content": {}, "protocol": {}, "client": {}},
    [
        {"endpoints": ["content:eth1", "protocol:eth1"], "subnet": "10.9.1.0/24"},
        {"endpoints": ["protocol:eth2", "client:eth1"], "subnet": "10.9.2.0/24"},
    ],
)


def test_links_have_names_and_addresses_in_the_order_of_their_endpoints() -> None:
    first, second = segments(UFS)
    assert (first.name, second.name) == ("content-eth1--protocol-eth1", "protocol-eth2--client-eth1")
    assert [port.address for port in first.ports + second.ports] == [
        "10.9.1.1/24",
        "10.9.1.2/24",
        "10.9.2.1/24",
        "10.9.2.2/24",
    ]


def test_members_get_the_first_free_interface() -> None:
    lab = make(
        {"a": {}, "b": {}},
        [{"endpoints": ["a:eth1", "b:eth2"]}],
        {"lan": {"members": ["a", "b"], "subnet": "fd00::/64"}},
    )
    lan = segments(lab)[1]
    assert [(port.guest, port.interface, port.address) for port in lan.ports] == [
        ("a", "eth2", "fd00::1/64"),
        ("b", "eth1", "fd00::2/64"),
    ]


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=15))
def test_macs_are_unicast_local_deterministic_and_never_collide(lab: str, name: str, interface: str) -> None:
    mac = mac_address(lab, name, interface)
    assert int(mac[:2], 16) & 3 == 2
    assert mac == mac_address(lab, name, interface) != mac_address(lab, name, interface, {mac})


@given(st.integers(20, 32))
def test_addresses_are_in_the_subnet_and_none_is_network_or_broadcast(length: int) -> None:
    subnet = parse_subnet(f"10.0.0.0/{length}")
    found = [address.partition("/")[0] for address in subnet_addresses(subnet)]
    assert (
        len(set(found)) == len(found) == (subnet.num_addresses - 2 if length < 31 else subnet.num_addresses)
    )
    assert length >= 31 or not {str(subnet[0]), str(subnet[-1])} & set(found)


def test_defaults_are_filled_in() -> None:
    lab = parse_lab(
        {
            "name": "t",
            "topology": {
                "defaults": {"image": "mini", "memory": "32M", "env": {"A": 1, "B": 2}},
                "nodes": {"a": {"env": {"B": 3}}},
            },
        }
    )
    a = guest(lab, "a")
    assert (a.image, a.memory, a.mtu, a.on_partition, a.env) == (
        "mini",
        32 << 20,
        1400,
        "run",
        {"A": "1", "B": "3"},
    )


HOSTS = [Host("tokyo", "asia", 200 << 20), Host("virginia", "us", 300 << 20)]


def test_placement_follows_place_and_spreads() -> None:
    lab = make({"a": {}, "b": {}, "c": {"place": "tokyo"}, "d": {"place": {"site": "us"}}})
    assert place(lab, HOSTS) == {"a": "virginia", "b": "virginia", "c": "tokyo", "d": "virginia"}


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"place": "tokio"}, "'a' is placed at 'tokio', which is no peer here; did you mean 'tokyo'?"),
        (
            {"place": {"site": "mars"}},
            "'a' is placed at the site 'mars', where no peer is; the sites are asia, us",
        ),
        (
            {"memory": "1G"},
            "'a' wants 1G of memory, and there is no room on any peer (free: tokyo 200M, virginia 300M)",
        ),
        ({"image": "minni"}, "'a' wants the image 'minni', which is not there; did you mean 'mini'?"),
    ],
)
def test_placement_refused_in_words(node: dict[str, Any], words: str) -> None:
    hosts = [Host(host.name, host.site, host.memory_free, ["mini"]) for host in HOSTS]
    with pytest.raises(PlanError) as error:
        place(make({"a": node}), hosts)
    assert [problem.message for problem in error.value.problems] == [words]
