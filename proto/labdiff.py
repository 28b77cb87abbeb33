# SPDX-License-Identifier: Apache-2.0
"""What a changed lab file asks of the lab that runs: the difference, and nothing else.

`difference` compares what a file says with what the catalog has. Whatever both agree on is not touched:
guests keep their processes and connections, names their addresses. What differs is sorted by what it costs:

* `add`, `remove`: a guest or network appears or goes (a guest with its disk).
* `live`: carried out while the guest runs (a link's quality, an environment for programs started from now on,
  policies) or when it starts the next time (`exec`).
* `start`: it had failed or was lost, and is wanted.
* `move`: the file names another place; a running guest goes there live.
* `restart`: the guest ends in order and starts anew with the disk it has (memory, cpus, interfaces,
  on-partition).
* `anew`: a new guest with an empty disk in the old one's place (image, size of the disk).

Two keys mean something only where the file itself has changed. An image is a name whose content may be built
anew any day, and a guest may have been moved by hand from the place where it began; applying an unchanged
file must neither make every guest anew nor move it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from proto import addresses, deploy, entries
from proto.lab import Guest, Lab, dump_lab, guests
from proto.labcheck import LabError, parse_lab
from proto.labfields import Place
from proto.scale import scaled
from proto.state import State
from proto.units import format_percentage, format_rate, format_size, format_time

How = Literal["add", "live", "start", "move", "restart", "anew", "remove"]

_COSTS: Sequence[How] = ("live", "start", "move", "restart", "anew")

Image = tuple[str, str]
"""An image's name and the SHA-256 of its root."""


@dataclass(frozen=True, slots=True)
class Change:
    """One guest or network that differs; `details` are for people."""

    what: Literal["guest", "network"]
    name: str
    how: How
    details: tuple[str, ...] = ()

    @property
    def sign(self) -> str:
        return {"add": "+", "remove": "-", "anew": "-/+"}.get(self.how, "~")

    def as_dict(self) -> dict[str, Any]:
        """The change as JSON has it."""
        return {
            "sign": self.sign,
            "what": self.what,
            "name": self.name,
            "how": self.how,
            "details": list(self.details),
        }


@dataclass(frozen=True)
class Difference:
    """What has to change, and how many guests do not."""

    file: Lab
    old: entries.Lab
    changes: tuple[Change, ...] = ()
    untouched: int = 0
    to_place: tuple[Guest, ...] = ()
    """New guests, those made anew, and lost ones: they need an owner."""
    stay: Mapping[str, str] = field(default_factory=dict)
    """Of guests to be placed: where (peer's id) they are."""
    moves: Mapping[str, Place] = field(default_factory=dict)
    """Running guests that move live once all else is done, by name."""
    made: Mapping[str, tuple[tuple[entries.Interface, ...], Image]] = field(default_factory=dict)
    """Interfaces and image of new guests and those made anew."""
    lost: Mapping[str, entries.Guest] = field(default_factory=dict)
    before: tuple[entries.AnyEntry, ...] = ()
    """What comes before the guests that are placed."""
    after: tuple[entries.AnyEntry, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether the lab is as the file says."""
        return not self.changes

    def batch(self, source: str, owners: Mapping[str, str], ids: Mapping[str, str]) -> entries.Batch:
        """All of it as one entry; `owners` (peers' ids) and `ids` are of the guests in `to_place`.

        Refused with `conflict` if the lab was changed by somebody else meanwhile.
        """
        lab = self.file.name
        parts = list(self.before)
        for one in self.to_place:
            if one.name in self.lost:
                lost = self.lost[one.name]
                parts.append(entries.MoveGuest(guest=lost.key, epoch=lost.epoch, owner=owners[one.name]))
                continue
            interfaces, image = self.made[one.name]
            made = deploy.guest_of(
                lab, one, interfaces, image=image, id=ids[one.name], owner=owners[one.name]
            )
            parts.append(entries.AddGuest(guest=made))
        parts += self.after
        wanted = entries.Lab(name=lab, model=dump_lab(self.file), source=source)
        parts.append(entries.PutLab(lab=wanted, replace=True, revision=self.old.revision))
        return entries.Batch(entries=tuple(parts))


def images_to_find(state: State, file: Lab) -> dict[str, str]:
    """Image reference → a guest that wants it, of all whose content must be known for `difference`."""
    old = _old_guests(state.labs.get(file.name))
    found: dict[str, str] = {}
    for one in guests(scaled(file).lab):
        if not _same_image(old.get(one.name), one) or f"{file.name}/{one.name}" not in state.guests:
            found.setdefault(one.image, one.name)
    return found


def difference(state: State, file: Lab, images: Mapping[str, Image]) -> Difference:
    """What must change for the lab of this name, which exists, to be what `file` says.

    `images` has what `images_to_find` named.
    """
    return _Comparison(state, file, images).result()


def _old_guests(lab: entries.Lab | None) -> dict[str, Guest]:
    """The guests of the file that was applied last, by name; none if it cannot be read any more."""
    if lab is None:
        return {}
    try:
        before = scaled(parse_lab(lab.model)).lab
    except LabError:
        return {}
    return {one.name: one for one in guests(before)}


def _same_image(old: Guest | None, new: Guest) -> bool:
    return old is not None and old.image == new.image


class _Comparison:
    """One comparison: what there is, what is wanted, and what was found so far."""

    def __init__(self, state: State, file: Lab, images: Mapping[str, Image]) -> None:
        self.state, self.file, self.images = state, file, images
        self.name = file.name
        self.lab = scaled(file).lab
        self.before = _old_guests(state.labs[file.name])
        self.guests = {g.name: g for g in state.guests.values() if g.lab == self.name}
        segments = addresses.segments(
            self.lab, deploy.taken_macs(state, self.name), kept(list(self.guests.values()))
        )
        self.interfaces = deploy.interfaces_of(self.lab, segments)
        self.networks = {network.key: network for network in deploy.networks_of(self.lab, segments)}
        self.changes: list[Change] = []
        self.removed: list[entries.AnyEntry] = []
        self.changed: list[entries.AnyEntry] = []
        self.to_place: list[Guest] = []
        self.stay: dict[str, str] = {}
        self.moves: dict[str, Place] = {}
        self.lost: dict[str, entries.Guest] = {}

    def result(self) -> Difference:
        wanted = guests(self.lab)
        for one in wanted:
            self._guest(one)
        for name in self.guests.keys() - {one.name for one in wanted}:
            self._remove(self.guests[name])
        touched = len({c.name for c in self.changes if c.what == "guest" and c.how != "add"})
        put, dropped = self._networks()
        order = {"+": 0, "~": 1, "-/+": 2, "-": 3}
        return Difference(
            file=self.file,
            old=self.state.labs[self.name],
            changes=tuple(sorted(self.changes, key=lambda c: (c.what, order[c.sign], _natural(c.name)))),
            untouched=len(self.guests) - touched,
            to_place=tuple(self.to_place),
            stay=self.stay,
            moves=self.moves,
            made={
                one.name: (self.interfaces[one.name], self._image(one))
                for one in self.to_place
                if one.name not in self.lost
            },
            lost=self.lost,
            before=(*self.removed, *put, *self.changed),
            after=tuple(dropped),
        )

    # Guests.

    def _image(self, one: Guest) -> Image:
        """What its image is; the running guest's where the file has not changed it."""
        there = self.guests.get(one.name)
        if there is not None and _same_image(self.before.get(one.name), one):
            return there.image, there.image_hash
        return self.images[one.image]

    def _guest(self, one: Guest) -> None:
        there = self.guests.get(one.name)
        if there is None:
            self.to_place.append(one)
            self.changes.append(Change("guest", one.name, "add", tuple(self._description(one))))
            return
        found = list(self._costs(one, there))
        if not found:
            return
        how = max((cost for cost, _ in found), key=_COSTS.index)
        details = tuple(text for _, text in found if text)
        self.changes.append(Change("guest", one.name, how, details))
        if how == "anew":
            self.removed.append(entries.RemoveGuest(guest=there.key))
            self.to_place.append(one)
            self.stay[one.name] = there.owner
            return
        self._ask(one, there)
        if there.state == "lost":
            self.lost[one.name] = there
            self.to_place.append(one)
        if any(cost == "start" for cost, _ in found):
            self.changed.append(entries.SetWanted(guest=there.key, wanted="running"))
        if any(cost == "move" for cost, _ in found) and one.place is not None:
            self.moves[one.name] = one.place

    def _description(self, one: Guest) -> Iterator[str]:
        yield f"image {one.image}"
        yield f"memory {format_size(one.memory)}"
        if one.disk:
            yield f"disk {format_size(one.disk)}"
        if one.place is not None:
            yield f"place {one.place}"
        for interface in self.interfaces[one.name]:
            yield f"{interface.name} {', '.join(interface.addresses) or 'without an address'}"

    def _costs(self, one: Guest, there: entries.Guest) -> Iterator[tuple[How, str]]:
        """Everything that differs about a guest, and what that costs."""
        image = self._image(one)
        if image != (there.image, there.image_hash):
            yield "anew", f"image {there.image} → {one.image}"
        if (one.disk or 0) != there.disk:
            yield "anew", f"disk {_size(there.disk)} → {_size(one.disk or 0)}"
        if one.memory != there.memory:
            yield "restart", f"memory {format_size(there.memory)} → {format_size(one.memory)}"
        if one.cpus != there.cpus:
            yield "restart", f"cpus {there.cpus} → {one.cpus}"
        for text in _interface_changes(there.interfaces, self.interfaces[one.name]):
            yield "restart", text
        if one.exec != there.exec:
            yield "live", "exec (at its next start)"
        if dict(one.env) != there.env:
            yield "live", _env_change(there.env, one.env)
        if one.on_partition != there.on_partition:
            yield "restart", f"on-partition {there.on_partition} → {one.on_partition}"
        if one.restart_policy != there.restart_policy:
            yield "live", f"restart-policy {there.restart_policy} → {one.restart_policy}"
        yield from self._place_cost(one, there)
        if there.state in ("failed", "lost"):
            yield "start", f"is {there.state}"

    def _place_cost(self, one: Guest, there: entries.Guest) -> Iterator[tuple[How, str]]:
        old = self.before.get(one.name)
        if old is None or one.place is None or one.place == old.place:
            return
        owner = self.state.members.get(there.owner)
        if (
            owner is None
            or one.place.fits(owner.name, owner.site)
            or there.state not in ("running", "paused", "starting")
        ):
            return
        yield "move", f"place {owner.name} → {one.place}"

    def _ask(self, one: Guest, there: entries.Guest) -> None:
        """The entry that changes a guest which stays the same guest."""
        wanted = {
            "memory": one.memory,
            "cpus": one.cpus,
            "interfaces": self.interfaces[one.name],
            "exec": one.exec,
            "env": dict(one.env),
            "on_partition": one.on_partition,
            "restart_policy": one.restart_policy,
        }
        differing = {name: value for name, value in wanted.items() if getattr(there, name) != value}
        if differing:
            self.changed.append(entries.ChangeGuest.model_validate({"guest": there.key, **differing}))

    def _remove(self, there: entries.Guest) -> None:
        self.removed.append(entries.RemoveGuest(guest=there.key))
        where = self.state.peer_name(there.owner)
        self.changes.append(Change("guest", there.name, "remove", (f"at {where}, with its disk",)))

    # Networks.

    def _networks(self) -> tuple[list[entries.AnyEntry], list[entries.AnyEntry]]:
        """The entries that put and change networks, and those that remove them."""
        there = {key: network for key, network in self.state.networks.items() if network.lab == self.name}
        put: list[entries.AnyEntry] = []
        for key, network in self.networks.items():
            name = key.partition(":")[2]
            if key not in there:
                put.append(entries.PutNetwork(network=network))
                ends = ", ".join(_end(member) for member in network.members)
                details = (network.subnet, ends) if network.subnet else (ends,)
                self.changes.append(Change("network", name, "add", details))
            elif _plain(network) != _plain(there[key]):
                put.append(entries.ChangeNetwork(network=network))
                told = tuple(_network_changes(there[key], network))
                self.changes.append(Change("network", name, "live", told))
        gone = [key for key in there if key not in self.networks]
        for key in gone:
            self.changes.append(Change("network", key.partition(":")[2], "remove"))
        return put, [entries.RemoveNetwork(network=key) for key in gone]


def kept(running: Sequence[entries.Guest]) -> dict[addresses.End, addresses.Kept]:
    """What the interfaces of a lab's guests have."""
    return {
        (one.name, interface.name): addresses.Kept(
            interface.network.partition(":")[2], interface.mac, next(iter(interface.addresses), None)
        )
        for one in running
        for interface in one.interfaces
    }


def _natural(name: str) -> tuple[int, str]:
    """web-2 before web-10."""
    return len(name), name


def _size(size: int) -> str:
    return format_size(size) if size else "none"


def _end(member: entries.Endpoint) -> str:
    return f"{member[0].partition('/')[2]}:{member[1]}"


def _env_change(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return f"env {', '.join(names)} (for programs that start from now on)"


def _interface_changes(old: Sequence[entries.Interface], new: Sequence[entries.Interface]) -> Iterator[str]:
    before, after = {i.name: i for i in old}, {i.name: i for i in new}
    for name in sorted(before.keys() | after.keys(), key=_natural):
        was, is_ = before.get(name), after.get(name)
        if was == is_:
            continue
        if was is None or is_ is None:
            yield f"{name} is {'new' if was is None else 'gone'}"
            continue
        if was.network != is_.network:
            yield f"{name} joins {is_.network.partition(':')[2]}"
        if was.addresses != is_.addresses:
            yield f"{name} {', '.join(was.addresses) or 'no address'} → {', '.join(is_.addresses) or 'none'}"
        if was.mtu != is_.mtu:
            yield f"{name} mtu {was.mtu} → {is_.mtu}"


def _quality(network: entries.Network) -> dict[entries.Endpoint, entries.Impairment]:
    each = network.impairments or (entries.Impairment(),) * len(network.members)
    return dict(zip(network.members, each, strict=True))


def _plain(network: entries.Network) -> tuple[Any, ...]:
    return network.kind, _quality(network), network.subnet, network.mtu


_FORMS = {
    "delay": format_time,
    "jitter": format_time,
    "loss": format_percentage,
    "rate": lambda value: format_rate(value) if value else "unlimited",
    "reorder": format_percentage,
    "duplicate": format_percentage,
}


def _network_changes(old: entries.Network, new: entries.Network) -> Iterator[str]:
    before, after = _quality(old), _quality(new)
    joined = [_end(member) for member in new.members if member not in before]
    left = [_end(member) for member in old.members if member not in after]
    if joined:
        yield f"joined by {', '.join(joined)}"
    if left:
        yield f"left by {', '.join(left)}"
    if old.subnet != new.subnet:
        yield f"subnet {old.subnet or 'none'} → {new.subnet or 'none'}"
    if old.mtu != new.mtu:
        yield f"mtu {old.mtu} → {new.mtu}"
    told: dict[str, list[str]] = {}
    for member in new.members:
        for name, form in _FORMS.items():
            was, is_ = (getattr(q.get(member, after[member]), name) for q in (before, after))
            if was != is_:
                told.setdefault(f"{name} {form(was)} → {form(is_)}", []).append(_end(member))
    for text, ends in told.items():
        yield text if len(ends) == len(new.members) else f"{text} for {', '.join(ends)}"
