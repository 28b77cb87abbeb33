# SPDX-License-Identifier: Apache-2.0
"""A changed lab file against the lab that runs: the difference is found, costs are right, the rest stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import entries
from proto.api import OperationError
from proto.catalog import apply
from proto.deploy import Choices, lab_entries, taken_macs
from proto.lab import Lab, guests
from proto.labcheck import parse_lab
from proto.labdiff import Difference, difference, images_to_find
from proto.scale import scaled
from proto.state import State

TOKYO, VIRGINIA = "a" * 16, "b" * 16
HASH = "0" * 64

Model = dict[str, Any]

BASE: Model = {
    "name": "net",
    "topology": {
        "defaults": {"image": "mini", "memory": "64M"},
        "nodes": {"a": {}, "b": {"env": {"COLOUR": "red"}}, "c": {"place": "tokyo"}},
        "links": [{"endpoints": ["a:eth1", "b:eth1"], "subnet": "10.1.0.0/24", "delay": "5ms"}],
        "networks": {"lan": {"members": ["a", "b", "c"], "subnet": "10.2.0.0/24"}},
    },
}


def member(id: str, name: str, site: str = "") -> entries.Member:
    return entries.Member(id=id, name=name, site=site, address="127.0.0.1:1", certificate=b"")


def grown(state: State, *new: entries.AnyEntry) -> State:
    for entry in new:
        state = apply(state, state.index + 1, entries.Proposal(entry=entry, time=100.0))
    return state


def choices(lab: Lab, mark: str = "") -> Choices:
    everyone = guests(scaled(lab).lab)
    return Choices(
        owners={one.name: TOKYO for one in everyone},
        images={one.image: (one.image, HASH) for one in everyone},
        ids={one.name: f"{one.name}{mark}" for one in everyone},
    )


def deployed(model: Model) -> State:
    """A mesh of two peers in which this lab runs, all of it at tokyo."""
    members = {TOKYO: member(TOKYO, "tokyo", "japan"), VIRGINIA: member(VIRGINIA, "virginia")}
    state = State(mesh="m", members=members)
    lab = parse_lab(model)
    state = grown(state, lab_entries(lab, "net.yaml", choices(lab), frozenset()))
    for guest in list(state.guests.values()):
        state = grown(state, report(guest, "running"))
    return state


def report(guest: entries.Guest, seen: entries.GuestState) -> entries.Report:
    return entries.Report(guest=guest.key, owner=guest.owner, epoch=guest.epoch, state=seen)


def compared(state: State, model: Model) -> Difference:
    lab = parse_lab(model)
    return difference(state, lab, {ref: (ref, HASH) for ref in images_to_find(state, lab)})


def applied(state: State, model: Model) -> State:
    found = compared(state, model)
    names = [one.name for one in found.to_place]
    owners = dict.fromkeys(names, VIRGINIA)
    ids = {name: f"{name}-{state.index}" for name in names}
    return grown(state, found.batch("net.yaml", owners, ids))


def changed(change: Callable[[Model], object]) -> Model:
    model = copy.deepcopy(BASE)
    change(model["topology"])
    return model


def costs(found: Difference) -> dict[str, str]:
    return {change.name: change.how for change in found.changes}


def test_the_same_file_changes_nothing() -> None:
    found = compared(deployed(BASE), BASE)
    assert found.empty
    assert (found.untouched, found.to_place) == (3, ())


CASES: list[tuple[Callable[[Model], object], dict[str, str]]] = [
    (lambda t: t["nodes"].update(d={}), {"d": "add"}),
    (lambda t: t["nodes"]["b"]["env"].update(COLOUR="blue"), {"b": "live"}),
    (lambda t: t["nodes"]["b"].update(exec=["true"]), {"b": "live"}),
    (lambda t: t["nodes"]["b"].update({"restart-policy": "never"}), {"b": "live"}),
    (lambda t: t["nodes"]["b"].update(memory="96M"), {"b": "restart"}),
    (lambda t: t["nodes"]["b"].update({"on-partition": "freeze"}), {"b": "restart"}),
    (lambda t: t["nodes"]["b"].update(disk="16M"), {"b": "anew"}),
    (lambda t: t["nodes"]["b"].update(image="other"), {"b": "anew"}),
    (lambda t: t["nodes"]["b"].update(image="other", memory="96M", env={}), {"b": "anew"}),
    (lambda t: t["nodes"]["c"].update(place="virginia"), {"c": "move"}),
    (lambda t: t["nodes"]["c"].update(place={"site": "japan"}), {}),
    (lambda t: t["nodes"]["c"].update(place="virginia", memory="96M"), {"c": "restart"}),
    (lambda t: t["links"][0].update(delay="20ms"), {"a-eth1--b-eth1": "live"}),
    (lambda t: t["links"][0].pop("delay"), {"a-eth1--b-eth1": "live"}),
    (lambda t: t["links"].clear(), {"a": "restart", "b": "restart", "a-eth1--b-eth1": "remove"}),
    (
        lambda t: t["links"].append({"endpoints": ["b:eth5", "c:eth5"]}),
        {"b": "restart", "c": "restart", "b-eth5--c-eth5": "add"},
    ),
    (
        lambda t: t["links"][0].update(subnet="10.3.0.0/24"),
        {"a": "restart", "b": "restart", "a-eth1--b-eth1": "live"},
    ),
    (lambda t: t["networks"]["lan"]["members"].remove("a"), {"a": "restart", "lan": "live"}),
    (lambda t: t["networks"]["lan"]["members"].reverse(), {}),
    (lambda t: t["nodes"]["a"].update(mtu=1300), {"a": "restart", "lan": "live", "a-eth1--b-eth1": "live"}),
]


@pytest.mark.parametrize(("change", "expected"), CASES)
def test_each_change_has_its_cost_and_nothing_else_is_touched(
    change: Callable[[Model], object], expected: dict[str, str]
) -> None:
    state, model = deployed(BASE), changed(change)
    found = compared(state, model)
    assert costs(found) == expected
    after = applied(state, model)
    touched = {c.name for c in found.changes if c.what == "guest" and c.how not in ("add", "move")}
    for guest in state.guests.values():
        if guest.name not in touched:
            assert after.guests[guest.key] == guest
    assert compared(after, model).empty
    assert after.labs["net"].revision == 2


def test_a_new_member_gets_what_is_free_and_the_others_keep_theirs() -> None:
    state = deployed(BASE)
    before = {g.name: g.interfaces for g in state.guests.values()}

    def change(t: Model) -> None:
        t["nodes"]["0-first"] = {}
        t["networks"]["lan"]["members"] = ["0-first", "c", "b"]

    after = applied(state, changed(change))
    assert after.guests["net/c"].interfaces == before["c"]
    assert after.guests["net/b"].interfaces == before["b"]
    [new] = after.guests["net/0-first"].interfaces
    assert new.addresses == ("10.2.0.1/24",), "a left the network, and its address is free again"
    lan, old = after.networks["net:lan"], state.networks["net:lan"]
    assert lan.id == old.id
    assert len(lan.members) == 3


def test_an_interface_chosen_for_a_member_keeps_its_name() -> None:
    state = deployed(BASE)
    assert [i.name for i in state.guests["net/a"].interfaces] == ["eth1", "eth2"]
    after = applied(state, changed(lambda t: t["links"].clear()))
    assert [(i.name, i.addresses) for i in after.guests["net/a"].interfaces] == [("eth2", ("10.2.0.1/24",))]


def test_a_guest_made_anew_keeps_its_addresses_and_begins_with_an_empty_disk() -> None:
    state = deployed(BASE)
    found = compared(state, changed(lambda t: t["nodes"]["b"].update(image="other")))
    assert ([one.name for one in found.to_place], found.stay) == (["b"], {"b": TOKYO})
    after = applied(state, changed(lambda t: t["nodes"]["b"].update(image="other")))
    old, new = state.guests["net/b"], after.guests["net/b"]
    assert (new.interfaces, new.epoch, new.state) == (old.interfaces, 1, "pending")
    assert new.id != old.id


def test_an_image_that_was_built_anew_does_not_touch_an_unchanged_file() -> None:
    state, lab = deployed(BASE), parse_lab(BASE)
    assert images_to_find(state, lab) == {}
    grown_lab = parse_lab(changed(lambda t: t["nodes"].update(d={})))
    assert images_to_find(state, grown_lab) == {"mini": "d"}
    found = difference(state, grown_lab, {"mini": ("mini", "f" * 64)})
    assert costs(found) == {"d": "add"}
    assert found.made["d"][1] == ("mini", "f" * 64)


def test_a_guest_moved_by_hand_stays_where_it_is() -> None:
    state = deployed(BASE)
    moved = state.guests["net/c"].model_copy(update={"owner": VIRGINIA, "epoch": 2})
    state = State(**{**state.__dict__, "guests": {**state.guests, "net/c": moved}})
    assert compared(state, BASE).empty
    assert costs(compared(state, changed(lambda t: t["nodes"]["a"].update(memory="96M")))) == {"a": "restart"}


def test_what_failed_is_started_and_what_was_lost_is_placed_again() -> None:
    state = deployed(BASE)
    failed = entries.Batch(
        entries=(report(state.guests["net/a"], "failed"), entries.SetWanted(guest="net/a", wanted="stopped"))
    )
    state = grown(state, failed, report(state.guests["net/b"], "lost"))
    found = compared(state, BASE)
    assert costs(found) == {"a": "start", "b": "start"}
    after = applied(state, BASE)
    assert after.guests["net/a"].wanted == "running"
    lost = after.guests["net/b"]
    assert (lost.owner, lost.epoch, lost.state) == (VIRGINIA, 2, "pending")


def test_a_guest_that_was_stopped_stays_stopped() -> None:
    state = deployed(BASE)
    state = grown(
        state,
        entries.SetWanted(guest="net/a", wanted="stopped"),
        report(state.guests["net/a"], "stopped"),
    )
    assert compared(state, BASE).empty


def test_an_impairment_set_by_hand_is_put_back_to_the_file_s() -> None:
    state = deployed(BASE)
    link = state.networks["net:a-eth1--b-eth1"]
    slow = (entries.Impairment(delay=1.0), link.impairments[1])
    state = grown(state, entries.SetImpairments(network=link.key, impairments=slow))
    [change] = compared(state, BASE).changes
    assert change.details == ("delay 1s → 5ms for a:eth1",)


def test_another_change_meanwhile_is_noticed() -> None:
    state = deployed(BASE)
    model = changed(lambda t: t["links"][0].update(delay="20ms"))
    batch = compared(state, model).batch("net.yaml", {}, {})
    state = applied(state, changed(lambda t: t["nodes"]["b"].update(env={})))
    with pytest.raises(OperationError, match="changed meanwhile"):
        grown(state, batch)


def test_a_scale_adds_and_takes_away_at_the_end() -> None:
    def sized(count: int) -> Model:
        return {
            "name": "net",
            "topology": {
                "nodes": {"web": {"image": "mini", "scale": count}, "db": {"image": "mini"}},
                "links": [{"endpoints": ["web-1:eth7", "db:eth7"]}],
                "networks": {"lan": {"members": ["web", "db"], "subnet": "10.2.0.0/24"}},
            },
        }

    state = deployed(sized(2))
    assert sorted(state.guests) == ["net/db", "net/web-1", "net/web-2"]
    assert costs(compared(state, sized(4))) == {"web-3": "add", "web-4": "add", "lan": "live"}
    after = applied(state, sized(4))
    for key, guest in state.guests.items():
        assert after.guests[key] == guest
    assert costs(compared(after, sized(1))) == {
        **dict.fromkeys(("web-2", "web-3", "web-4"), "remove"),
        "lan": "live",
    }
    assert after.labs["net"].model["topology"]["nodes"]["web"]["scale"] == 4


NODES = st.dictionaries(
    st.sampled_from("abcd"),
    st.fixed_dictionaries(
        {},
        optional={
            "memory": st.sampled_from(["32M", "64M"]),
            "image": st.sampled_from(["one", "two"]),
            "disk": st.sampled_from(["16M", "32M"]),
            "env": st.dictionaries(st.sampled_from("XY"), st.sampled_from("12"), max_size=2),
            "place": st.sampled_from(["tokyo", "virginia"]),
            "scale": st.integers(1, 3),
        },
    ),
    min_size=1,
)


@st.composite
def models(draw: st.DrawFn) -> Model:
    nodes = draw(NODES)
    networks = {}
    for index, name in enumerate(draw(st.sets(st.sampled_from(["n", "m"])))):
        members = draw(st.lists(st.sampled_from(sorted(nodes)), min_size=1, unique=True))
        networks[name] = {"members": members, "subnet": f"10.{index}.0.0/{draw(st.sampled_from([16, 24]))}"}
    return {
        "name": "net",
        "topology": {"defaults": {"image": "mini"}, "nodes": nodes, "networks": networks},
    }


@given(st.lists(models(), min_size=2, max_size=4))
def test_any_file_after_any_other_becomes_true_at_once_and_then_nothing_is_left(files: list[Model]) -> None:
    state = deployed(files[0])
    for model in files[1:]:
        before, state = state, applied(state, model)
        lab = scaled(parse_lab(model)).lab
        assert {g.name for g in state.guests.values()} == {one.name for one in guests(lab)}
        again = compared(state, model)
        assert [c for c in again.changes if c.how != "move"] == []
        addresses = [a for g in state.guests.values() for i in g.interfaces for a in i.addresses]
        assert len(set(addresses)) == len(addresses)
        assert len(taken_macs(state)) == sum(len(g.interfaces) for g in state.guests.values())
        for key, guest in state.guests.items():
            old = before.guests.get(key)
            if old is not None:
                macs = {i.name: i.mac for i in old.interfaces}
                assert all(macs.get(i.name, i.mac) == i.mac for i in guest.interfaces)
