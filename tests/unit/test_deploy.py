# SPDX-License-Identifier: Apache-2.0
"""A lab becomes entries, and is gone again; guests are told who their neighbours are."""

from __future__ import annotations

from typing import Any

import pytest

from proto import entries
from proto.api import OperationError
from proto.catalog import apply
from proto.deploy import Choices, details, graph, lab_entries, removal_entries, row, settings, taken_macs
from proto.lab import Lab
from proto.labcheck import parse_lab
from proto.state import State

PEER = "a" * 16
LAB: dict[str, Any] = {
    "name": "ufs",
    "topology": {
        "defaults": {"memory": "64M", "restart-policy": "always"},
        "nodes": {
            "content": {"image": "ufs-content", "disk": "256M"},
            "protocol": {"image": "ufs-protocol", "memory": "192M"},
            "client": {"image": "ufs-client", "exec": ["mount-ufs"], "env": {"SHARE": "data"}},
        },
        "links": [
            {"endpoints": ["content:eth1", "protocol:eth1"], "subnet": "10.9.1.0/24", "delay": "5ms"},
            {"endpoints": ["protocol:eth2", "client:eth1"], "subnet": "10.9.2.0/24"},
        ],
    },
}


def lab(name: str = "ufs") -> Lab:
    return parse_lab({**LAB, "name": name})


def choices(suffix: str = "") -> Choices:
    nodes = LAB["topology"]["nodes"]
    return Choices(
        owners=dict.fromkeys(nodes, PEER),
        images={node["image"]: (node["image"], "0" * 64) for node in nodes.values()},
        ids={name: f"{name}{suffix}" for name in nodes},
    )


@pytest.fixture
def empty() -> State:
    member = entries.Member(id=PEER, name="tokyo", address="127.0.0.1:7400", certificate=b"")
    return State(mesh="m", members={PEER: member})


def grown(state: State, *new: entries.AnyEntry) -> State:
    for entry in new:
        state = apply(state, state.index + 1, entries.Proposal(entry=entry, time=100.0))
    return state


def test_a_lab_becomes_true_as_one_entry_and_is_gone_as_one(empty: State) -> None:
    state = grown(empty, lab_entries(lab(), "ufs.yaml", choices(), frozenset()))
    assert set(state.guests) == {"ufs/content", "ufs/protocol", "ufs/client"}
    protocol = state.guests["ufs/protocol"]
    assert [i.name for i in protocol.interfaces] == ["eth1", "eth2"]
    assert [i.network for i in protocol.interfaces] == [
        "ufs:content-eth1--protocol-eth1",
        "ufs:protocol-eth2--client-eth1",
    ]
    assert (protocol.memory, protocol.on_partition, protocol.restart_policy) == (
        192 << 20,
        "run",
        "always",
    )
    assert state.guests["ufs/content"].disk == 256 << 20
    slow = state.networks["ufs:content-eth1--protocol-eth1"]
    assert [i.delay for i in slow.impairments] == [0.005, 0.005]
    assert state.networks["ufs:protocol-eth2--client-eth1"].impairments == ()
    assert len({network.id for network in state.networks.values()}) == 2
    gone = grown(state, removal_entries(state, "ufs"))
    assert (gone.guests, gone.networks, gone.labs) == ({}, {}, {})


def test_a_lab_of_the_same_name_changes_nothing(empty: State) -> None:
    state = grown(empty, lab_entries(lab(), "ufs.yaml", choices(), frozenset()))
    with pytest.raises(OperationError, match="lab ufs already"):
        grown(state, lab_entries(lab(), "ufs.yaml", choices("2"), frozenset()))


def test_two_labs_share_no_mac(empty: State) -> None:
    state = grown(empty, lab_entries(lab("one"), "", choices("1"), frozenset()))
    state = grown(state, lab_entries(lab("two"), "", choices("2"), taken_macs(state)))
    assert len(taken_macs(state)) == 8


def test_a_guest_is_told_its_addresses_and_its_neighbours(empty: State) -> None:
    state = grown(empty, lab_entries(lab(), "", choices(), frozenset()))
    told = settings(state.guests["ufs/client"], state)
    assert told["hostname"] == "client"
    assert told["env"] == {"SHARE": "data"}
    [interface] = told["interfaces"]
    assert (interface["name"], interface["addresses"], interface["mtu"]) == ("eth1", ["10.9.2.2/24"], 1400)
    assert told["hosts"]["protocol"] == ["10.9.2.1", "10.9.1.2"]
    assert told["hosts"]["content"] == ["10.9.1.1"]
    assert told["hosts"]["client"] == ["10.9.2.2"]


def test_rows_have_the_names_of_the_contract(empty: State) -> None:
    state = grown(empty, lab_entries(lab(), "", choices(), frozenset()))
    report = entries.Report(guest="ufs/client", owner=PEER, epoch=1, state="running", started=140.0)
    state = grown(state, report)
    shown = row(state.guests["ufs/client"], state, now=150.0)
    assert list(shown) == [
        "vm",
        "lab",
        "peer",
        "epoch",
        "state",
        "memory",
        "addresses",
        "networks",
        "cpu_features",
        "uptime",
        "owner_state",
    ]
    assert (shown["vm"], shown["lab"], shown["peer"], shown["uptime"]) == ("client", "ufs", "tokyo", 10.0)
    assert row(state.guests["ufs/content"], state, now=150.0)["uptime"] is None
    assert details(state.guests["ufs/client"], state, 150.0)["exec"] == ["mount-ufs"]
    picture = graph("ufs", state)
    assert next(n["members"] for n in picture["networks"]) == ["content:eth1", "protocol:eth1"]
