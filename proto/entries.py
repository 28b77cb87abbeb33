# SPDX-License-Identifier: Apache-2.0
"""What can be written into the catalog: the things it knows, and the entries that change them.

The catalog is a log, and its entries are the only way anything all peers must agree on ever changes. Each
entry is a frozen model; `encode` and `decode` carry it, with who proposed it and when, through MessagePack
and back unchanged. An entry says what shall become true, never how to compute it from a clock or a random
number, so that every peer that applies the same log ends in the same state (`proto/catalog.py`).

A new kind of entry, or a new optional field, raises nothing; a change of meaning raises `FORMAT`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proto import wire
from proto.api import Name, OperationError

FORMAT = 1

Endpoint = tuple[str, str]
"""A guest's key and its interface."""

GuestState = Literal[
    "pending",
    "starting",
    "running",
    "paused",
    "migrating",
    "frozen",
    "restoring",
    "fenced",
    "stopped",
    "lost",
    "failed",
]

WantedState = Literal["running", "paused", "stopped"]

RestartPolicy = Literal["never", "on-failure", "always"]

HandoverState = Literal["open", "done", "cancelled", "failed-over"]


class Thing(BaseModel):
    """Base of everything in the catalog: frozen, unknown keys refused, lists become tuples."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Facts(Thing):
    """What a peer says about its host; kept with the member so that placement need not ask.

    The protocol versions are those that it speaks (`proto/versions.py`).
    """

    version: str = ""
    memory: int = 0
    cpus: int = 0
    cpu_features: tuple[str, ...] = ()
    xsave_size: int = 0
    oldest_protocol: int = 1
    newest_protocol: int = 1


class Member(Thing):
    """A peer. `id` is the first 16 hex digits of SHA-256 of its public key, `address` is HOST:PORT, and so is
    `gossip`, its UDP socket for gossip (empty until it has told)."""

    id: str
    name: Name
    site: str = ""
    address: str
    certificate: bytes
    facts: Facts = Facts()
    status: Literal["member", "left"] = "member"
    draining: bool = False
    token: str = ""
    joined: float = 0.0
    lease: float = Field(default=0.0, ge=0.0)
    """Seconds of the longest lease this peer may ever have been granted; it never falls."""
    gossip: str = ""


class GossipKey(Thing):
    """A key that seals gossip, since `since`. `stale`: somebody who has left knows it."""

    generation: int = Field(ge=1)
    key: bytes = Field(min_length=32, max_length=32, repr=False)
    since: float = 0.0
    stale: bool = False


class User(Thing):
    """A person's key, enrolled with `mobictl login`; `id` is made as a peer's."""

    id: str
    name: Name
    role: Literal["viewer", "operator", "admin"]
    certificate: bytes
    token: str = ""


class Token(Thing):
    """What the catalog keeps of a token: never its secret, only the hash of it."""

    id: str
    secret_hash: bytes
    role: Literal["viewer", "operator", "admin", "peer"]
    uses: int = Field(ge=0)
    expires: float
    revoked: bool = False
    created_by: str = ""


class Interface(Thing):
    """A guest's network interface; `network` is the key of a `Network`, `mac` is `aa:bb:cc:dd:ee:ff`."""

    name: str
    mac: str
    network: str
    addresses: tuple[str, ...] = ()
    mtu: int = 1400


class Guest(Thing):
    """A guest: what was asked for, where it has the right to run, and what its owner last reported.

    `key` is LAB/NAME; `id` is a short name without meaning that never comes back (directories are named by
    it). `owner` is a peer's id, and with `epoch` it is the right to run: whoever acts for the guest with
    another epoch is wrong. `wanted` is what people asked for, `state` what the owner saw. `held_to` is the
    policy that its owner is known to carry out: one that has not heard yet of a change to `freeze` runs on
    when its lease is out, so that the guest must not be failed over.
    """

    key: str
    id: str
    image: str
    image_hash: str = ""
    memory: int
    disk: int = 0
    cpus: int = 1
    interfaces: tuple[Interface, ...] = ()
    exec: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    owner: str
    epoch: int = 1
    wanted: WantedState = "running"
    state: GuestState = "pending"
    state_since: float = 0.0
    exit_reason: str = ""
    message: str = ""
    restarts: int = 0
    on_partition: Literal["run", "freeze"] = "run"
    held_to: Literal["run", "freeze"] = "run"
    restart_policy: RestartPolicy = "on-failure"
    cpu_cap: str = ""
    cpu_features: tuple[str, ...] = ()
    xsave_size: int = 0
    created: float = 0.0
    started: float = 0.0

    @property
    def lab(self) -> str:
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        return self.key.partition("/")[2]

    @property
    def lease_bound(self) -> bool:
        """Whether it runs only while its owner has a lease."""
        return self.on_partition == "freeze"

    @property
    def ends_with_lease(self) -> bool:
        """Whether it surely stands still once its owner has no lease: it is bound to one, and its processes
        are held to that already."""
        return (self.on_partition, self.held_to) == ("freeze", "freeze")


class Impairment(Thing):
    """What a link does to frames in one direction: seconds, probabilities, bytes/s (0: no limit)."""

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: int = 0
    reorder: float = 0.0
    duplicate: float = 0.0


class Network(Thing):
    """An Ethernet segment. A link is a network with two members. `id` (24 bits) is given by the catalog.

    `key` is LAB:NAME. `impairments` has one entry per member (same order) or is empty.
    """

    key: str
    lab: str
    kind: Literal["link", "network"]
    id: int = 0
    members: tuple[Endpoint, ...] = ()
    impairments: tuple[Impairment, ...] = ()
    subnet: str = ""
    mtu: int = 1400


class Lab(Thing):
    """A lab as wanted: `model` is the validated lab file as plain values.

    `revision` is given by the catalog and grows whenever the lab is put.
    """

    name: Name
    model: dict[str, Any]
    source: str = ""
    created: float = 0.0
    revision: int = 0


class Migration(Thing):
    """One handover of the right to run, open or closed. `id` is 32 hex digits; `timeout` as in `Handover`.

    `guest_id` tells the guest `guest` from others that have its name later.
    """

    id: str
    guest: str
    guest_id: str
    epoch: int
    source: str
    destination: str
    timeout: float
    state: HandoverState = "open"
    opened: float = 0.0
    closed: float = 0.0
    reason: str = ""
    refusal: bytes = b""


# The entries.


class Entry(Thing):
    """Base of the entries; `kind` is the name on the wire."""


class Found(Entry):
    """The first entry of a mesh: its id and its only member."""

    kind: Literal["found"] = "found"
    mesh: str
    member: Member


class AddPeer(Entry):
    """A peer joins; one use of `member.token` is spent."""

    kind: Literal["add-peer"] = "add-peer"
    member: Member


class UpdatePeer(Entry):
    """A member tells where it is reached and what its host is."""

    kind: Literal["update-peer"] = "update-peer"
    peer: str
    address: str
    site: str
    facts: Facts
    gossip: str = ""


class DrainPeer(Entry):
    """Guests shall leave a peer, and no new ones come (or may again)."""

    kind: Literal["drain-peer"] = "drain-peer"
    peer: str
    draining: bool


class RemovePeer(Entry):
    """A peer left or was evicted: its key opens nothing any more.

    Refused while it owns guests or one is on its way there, unless `force`. Its guests are then lost; those
    that are lease-bound and run are fenced until the lease is out, and go to another peer if they are wanted
    running.
    """

    kind: Literal["remove-peer"] = "remove-peer"
    peer: str
    force: bool = False


class SetLease(Entry):
    """A peer may be granted leases of `duration` seconds; the longest ever allowed stays.

    Only the coordinator decides it.
    """

    kind: Literal["set-lease"] = "set-lease"
    peer: str
    duration: Annotated[float, Field(gt=0.0, le=3600.0)]


class RotateGossipKey(Entry):
    """Gossip is sealed with this key from now on; `generation` follows the newest one's (1 is the first)."""

    kind: Literal["rotate-gossip-key"] = "rotate-gossip-key"
    generation: int = Field(ge=1)
    key: bytes = Field(min_length=32, max_length=32, repr=False)


class AddUser(Entry):
    """A user's key is enrolled; one use of `user.token` is spent, and the token decides the role."""

    kind: Literal["add-user"] = "add-user"
    user: User


class RemoveUser(Entry):
    kind: Literal["remove-user"] = "remove-user"
    user: str


class AddToken(Entry):
    kind: Literal["add-token"] = "add-token"
    token: Token


class RevokeToken(Entry):
    kind: Literal["revoke-token"] = "revoke-token"
    token: str


class PutLab(Entry):
    """A lab is wanted; one of the same name must not exist unless `replace`.

    With `revision` (`conflict` otherwise) the lab that it replaces must be of that one.
    """

    kind: Literal["put-lab"] = "put-lab"
    lab: Lab
    replace: bool = False
    revision: int | None = None


class RemoveLab(Entry):
    """A lab is gone; refused while guests or networks of it remain."""

    kind: Literal["remove-lab"] = "remove-lab"
    lab: str


class PutNetwork(Entry):
    """A network appears; `network.id` is 0 and the catalog gives one that no network has."""

    kind: Literal["put-network"] = "put-network"
    network: Network


class ChangeNetwork(Entry):
    """The network of this key is another from now on, but for its id, which stays."""

    kind: Literal["change-network"] = "change-network"
    network: Network


class RemoveNetwork(Entry):
    kind: Literal["remove-network"] = "remove-network"
    network: str


class SetImpairments(Entry):
    """What each member's direction of a network does to frames, in the order of its members."""

    kind: Literal["set-impairments"] = "set-impairments"
    network: str
    impairments: tuple[Impairment, ...]


class AddGuest(Entry):
    """A guest appears, pending, with its owner and epoch 1."""

    kind: Literal["add-guest"] = "add-guest"
    guest: Guest


class ChangeGuest(Entry):
    """Something else is asked for of a guest; None leaves a field as it is. Refused while a handover is open.

    Its owner starts it anew, with the disks it has, when what its processes were made with (`memory`, `cpus`,
    `interfaces`, `on_partition`) is not what is asked for.
    """

    kind: Literal["change-guest"] = "change-guest"
    guest: str
    memory: int | None = None
    cpus: int | None = None
    interfaces: tuple[Interface, ...] | None = None
    exec: tuple[str, ...] | None = None
    env: dict[str, str] | None = None
    on_partition: Literal["run", "freeze"] | None = None
    restart_policy: RestartPolicy | None = None


class RemoveGuest(Entry):
    """A guest and all that is known of it is gone; refused while a handover is open."""

    kind: Literal["remove-guest"] = "remove-guest"
    guest: str


class SetWanted(Entry):
    """What people want a guest to be; refused while a handover is open."""

    kind: Literal["set-wanted"] = "set-wanted"
    guest: str
    wanted: WantedState


class Report(Entry):
    """What the owner saw; a report with another owner or epoch than the catalog's is refused (`conflict`).

    None leaves a field as it is. `cpu_features` and `xsave_size` are those of the host that booted it;
    `held_to` is the policy that its processes are held to from now on, after a change of `on_partition`.
    """

    kind: Literal["report"] = "report"
    guest: str
    owner: str
    epoch: int
    state: GuestState
    exit_reason: str = ""
    message: str = ""
    started: float | None = None
    restarts: int | None = None
    cpu_features: tuple[str, ...] | None = None
    xsave_size: int | None = None
    held_to: Literal["run", "freeze"] | None = None


class MoveGuest(Entry):
    """A guest that runs nowhere (stopped, failed, lost, pending) gets another owner; the epoch rises."""

    kind: Literal["move-guest"] = "move-guest"
    guest: str
    epoch: int
    owner: str


class FailOverGuest(Entry):
    """A lease-bound guest of a peer whose lease has run out starts anew at `owner`, one epoch later.

    Only the coordinator decides it, once that lease is out by every clock. `source` says from what the
    guest is made again.
    """

    kind: Literal["fail-over-guest"] = "fail-over-guest"
    guest: str
    epoch: int
    owner: str
    reason: str = ""
    source: Literal["image"] = "image"


class MarkGuest(Entry):
    """What is known of a guest whose owner cannot report: the coordinator's word in its place."""

    kind: Literal["mark-guest"] = "mark-guest"
    guest: str
    epoch: int
    state: Literal["fenced", "lost"]
    message: str = ""


class Handover(Entry):
    """Open a handover: `source` may give the right to run to `destination` as `epoch` + 1, once.

    `migration` is a token that is used up by this entry: the same one is never accepted again. `timeout` is
    in seconds: when the coordinator has seen it open for so long, it asks both sides to bring it to an end.
    It is no moment, because peers' clocks differ, some by days.
    """

    kind: Literal["handover"] = "handover"
    migration: str
    guest: str
    epoch: int
    source: str
    destination: str
    timeout: float


class Done(Entry):
    """The destination runs the guest: it owns it from here, one epoch later."""

    kind: Literal["done"] = "done"
    migration: str


class Cancel(Entry):
    """The handover comes to nothing. By the source as long as it has released nothing; after a release only
    with `refusal`, the destination's signature (`refusal_text`) that it never ran and never will run the
    guest."""

    kind: Literal["cancel"] = "cancel"
    migration: str
    by: str
    refusal: bytes = b""
    reason: str = ""


class Failover(Entry):
    """The destination was lost after the release: the source's frozen copy goes on, two epochs later."""

    kind: Literal["failover"] = "failover"
    migration: str
    reason: str = ""


class Batch(Entry):
    """Several entries that become true together or not at all."""

    kind: Literal["batch"] = "batch"
    entries: Annotated[tuple[AnyEntry, ...], Field(max_length=10_000)]


AnyEntry = Annotated[
    Found
    | AddPeer
    | UpdatePeer
    | DrainPeer
    | RemovePeer
    | SetLease
    | RotateGossipKey
    | AddUser
    | RemoveUser
    | AddToken
    | RevokeToken
    | PutLab
    | RemoveLab
    | PutNetwork
    | ChangeNetwork
    | RemoveNetwork
    | SetImpairments
    | AddGuest
    | ChangeGuest
    | RemoveGuest
    | SetWanted
    | Report
    | MoveGuest
    | FailOverGuest
    | MarkGuest
    | Handover
    | Done
    | Cancel
    | Failover
    | Batch,
    Field(discriminator="kind"),
]
Batch.model_rebuild()


class Proposal(Thing):
    """An entry and who proposes it, so that a proposal sent twice is applied once.

    `client` is a peer's id, `boot` a number that grows with each start of that peer, `sequence` grows with
    each proposal of one boot. `client` is empty for what the coordinator itself decides; `boot` is then its
    term, and such a proposal is sent only once. `time` is the coordinator's clock (seconds since 1970),
    stamped when it is appended; it never goes back within a log. `request` names the step of the command of a
    person that wants it, or is empty: of all proposals with the same one, only the first that is not refused
    changes anything. `stamp` is the proposer's hybrid logical clock (`proto/hlc.py`).
    """

    entry: AnyEntry
    client: str = ""
    boot: int = 0
    sequence: int = 0
    time: float = 0.0
    request: str = Field(default="", max_length=128)
    stamp: int = Field(default=0, ge=0)


def removed_peers(entry: Entry) -> set[str]:
    """The peers that are no members any more once this is true."""
    if isinstance(entry, Batch):
        return set().union(*map(removed_peers, entry.entries))
    return {entry.peer} if isinstance(entry, RemovePeer) else set()


def encode(proposal: Proposal) -> bytes:
    """The bytes of a log record's payload."""
    return wire.pack({"format": FORMAT, **proposal.model_dump(mode="python")})


def decode(data: bytes) -> Proposal:
    """The proposal in `data`.

    Raises `OperationError(unsupported)` for another format, else `bad-argument`.
    """
    try:
        value = wire.unpack(data)
    except wire.WireError as error:
        raise OperationError("bad-argument", f"an entry of the catalog cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise OperationError("bad-argument", "an entry of the catalog is not a map")
    format = value.pop("format", None)
    if format != FORMAT:
        raise OperationError(
            "unsupported",
            f"an entry of the catalog has format {format!r}; this version reads format {FORMAT}",
            "use the version of Mobitopolo that wrote it, or a newer one",
        )
    try:
        return Proposal.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise OperationError(
            "bad-argument", f"an entry of the catalog is malformed at {place}: {first['msg']}"
        ) from None


def refusal_text(migration: str, guest: str, epoch: int) -> bytes:
    """What a destination signs with its identity key to refuse a released guest for good."""
    return b"mobitopolo refusal\0" + wire.pack([migration, guest, epoch])
