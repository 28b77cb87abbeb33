# SPDX-License-Identifier: Apache-2.0
"""The catalog: what all peers agree on, as a pure function of a log.

`apply(state, index, proposal)` takes one record and gives the next state, or refuses by raising `Refused`,
in which case nothing changed. It is deterministic and total: every peer that applies the same records ends
in the same state, today from the log of a single voter, later from a replicated one. Time is the record's,
ids come with the entry or from a counter in the state.

The right to run a guest is (owner, epoch). It moves only by `Handover` and then `Done` (destination, epoch
+ 1), or `Failover` (back to the source, epoch + 2), or, for a guest that runs nowhere, `MoveGuest` (epoch +
1), or, for a guest bound to a lease that has run out, `FailOverGuest` (epoch + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from proto import entries as e
from proto.api import OperationError
from proto.identity import IdentityError, peer_id, public_key, verify
from proto.state import CLOSED_MIGRATIONS, REQUESTS, SESSION_WINDOW, Refusal, Refused, Session, State

__all__ = ["Refused", "State", "applied_index", "apply", "refusal", "skip"]

ValueT = TypeVar("ValueT")


def applied_index(state: State, client: str, boot: int, sequence: int) -> int | None:
    """The index at which this proposal was applied, None if it was not.

    Raises `Refused` if it is too old to say.
    """
    session = state.sessions.get(client)
    if not client or session is None or boot > session.boot:
        return None
    if boot < session.boot:
        raise Refused("conflict", f"a proposal of an earlier start of peer {client} came too late")
    if sequence in session.applied:
        return session.applied[sequence]
    if sequence <= session.floor():
        raise Refused("conflict", f"proposal {sequence} of peer {client} came too late")
    return None


def refusal(state: State, client: str, sequence: int) -> Refused | None:
    """Why this proposal, which `applied_index` knows, changed nothing; None if it became true."""
    session = state.sessions.get(client)
    words = session.refused.get(sequence) if session else None
    return Refused(*words) if words else None


def apply(state: State, index: int, proposal: e.Proposal) -> State:
    """The state after record `index`; raises `Refused` (then nothing changed, and `skip` gives the next
    state).

    A proposal that was applied before, or that repeats a command's step, changes nothing but the index.
    """
    if index != state.index + 1:
        raise ValueError(f"record {index} does not follow record {state.index}")
    time = max(state.time, proposal.time)
    if applied_index(state, proposal.client, proposal.boot, proposal.sequence) is not None:
        return replace(state, index=index, time=time)
    state = replace(state, index=index, time=time)
    if proposal.request in state.requests:
        return _remember(state, proposal, state.requests[proposal.request])
    state = _remember(_transition(state, proposal.entry, proposal.client), proposal, index)
    return _remember_request(state, proposal.request)


def skip(
    state: State, index: int, proposal: e.Proposal | None = None, error: OperationError | None = None
) -> State:
    """The state after a record that changes nothing.

    With the proposal that was refused, and why: it is remembered as refused, so that another copy of it
    further on in the log changes nothing either.
    """
    state = replace(state, index=index)
    if proposal is None or error is None:
        return state
    session = state.sessions.get(proposal.client, Session())
    stale = proposal.boot < session.boot or (
        proposal.boot == session.boot and proposal.sequence <= session.floor()
    )
    return state if stale else _remember(state, proposal, index, (error.code, error.message, error.hint))


def _remember(state: State, proposal: e.Proposal, index: int, words: Refusal | None = None) -> State:
    if not proposal.client:
        return state
    old = state.sessions.get(proposal.client)
    session = old if old and old.boot == proposal.boot else Session(proposal.boot)
    applied = {**session.applied, proposal.sequence: index}
    newest = max(session.newest, proposal.sequence)
    refused = session.refused if words is None else {**session.refused, proposal.sequence: words}
    if len(applied) > 2 * SESSION_WINDOW:
        floor = newest - SESSION_WINDOW
        applied = {sequence: at for sequence, at in applied.items() if sequence > floor}
        refused = {sequence: why for sequence, why in refused.items() if sequence > floor}
    session = Session(proposal.boot, applied, refused, newest)
    return replace(state, sessions=_with(state.sessions, proposal.client, session))


def _remember_request(state: State, request: str) -> State:
    """The step of a command was done; the oldest are forgotten, many at once so that it costs little."""
    if not request:
        return state
    requests = _with(state.requests, request, state.index)
    if len(requests) >= 2 * REQUESTS:
        newest = sorted(requests.items(), key=lambda item: (item[1], item[0]))[-REQUESTS:]
        requests = dict(newest)
    return replace(state, requests=requests)


def _with(mapping: Mapping[str, ValueT], key: str, value: ValueT) -> dict[str, ValueT]:
    return {**mapping, key: value}


def _without(mapping: Mapping[str, ValueT], key: str) -> dict[str, ValueT]:
    return {k: v for k, v in mapping.items() if k != key}


def _transition(state: State, entry: e.Entry, client: str) -> State:
    if isinstance(entry, e.Batch):
        for part in entry.entries:
            if isinstance(part, e.Batch):
                raise Refused("bad-argument", "a batch of entries cannot hold another batch")
            state = _transition(state, part, client)
        return state
    if not state.mesh and not isinstance(entry, e.Found):
        raise Refused("conflict", "the catalog's first entry must found the mesh")
    return _TRANSITIONS[type(entry)](state, entry, client)


# Peers, users and tokens.


def _found(state: State, entry: e.Found, _client: str) -> State:
    if state.mesh:
        raise Refused("exists", f"this catalog belongs to mesh {state.mesh} already")
    member = _checked_member(entry.member)
    return replace(
        state,
        mesh=entry.mesh,
        members={member.id: member.model_copy(update={"joined": state.time, "lease": 0.0})},
    )


def _checked_member(member: e.Member) -> e.Member:
    if _certificate_id(member.certificate) != member.id:
        raise Refused(
            "bad-argument", f"peer {member.name}: its certificate does not belong to id {member.id}"
        )
    return member


def _certificate_id(certificate: bytes) -> str:
    try:
        return peer_id(public_key(certificate))
    except IdentityError as error:
        raise Refused("bad-argument", f"a certificate cannot be used: {error}") from None


def _add_peer(state: State, entry: e.AddPeer, _client: str) -> State:
    member = _checked_member(entry.member)
    known = state.members.get(member.id)
    if known and known.status == "member":
        raise Refused("exists", f"peer {member.id} is a member already, as {known.name}")
    _free_id(state, member.id)
    for other in state.members.values():
        if other.status == "member" and other.name == member.name:
            raise Refused(
                "exists", f"there is a peer named {member.name} already", "choose another name with --name"
            )
    _speaks(state, member.name, member.facts)
    state = _spend(state, member.token, peer=True)
    update = {
        "joined": state.time,
        "status": "member",
        "draining": False,
        "lease": known.lease if known else 0.0,
    }
    member = member.model_copy(update=update)
    return replace(state, members=_with(state.members, member.id, member))


def _speaks(state: State, name: str, facts: e.Facts) -> None:
    """The version that all members speak never falls: entries of it may be in the log."""
    if facts.newest_protocol < state.protocol:
        raise Refused(
            "unsupported",
            f"{name} speaks version {facts.newest_protocol} of the protocol at most, this mesh "
            f"version {state.protocol}",
            "use a newer version of Mobitopolo there",
        )


def _free_id(state: State, id: str) -> None:
    if id in state.users:
        raise Refused("exists", f"the key {id} belongs to user {state.users[id].name} already")
    member = state.members.get(id)
    if member and member.status == "member":
        raise Refused("exists", f"the key {id} belongs to peer {member.name} already")


def _spend(state: State, token: str, *, peer: bool) -> State:
    """One use of a token; the one place where a token is judged."""
    found = state.tokens.get(token)
    again = "ask for a new one: mobictl peer token new"
    if found is None:
        raise Refused("unauthenticated", "this token is not known to the mesh", again)
    if found.revoked:
        raise Refused("unauthenticated", f"token {token} was revoked", again)
    if state.time >= found.expires:
        raise Refused("unauthenticated", f"token {token} has expired", again)
    if found.uses < 1:
        raise Refused("unauthenticated", f"token {token} is spent", again)
    if (found.role == "peer") is not peer:
        purpose = "admits a peer: mobictl peer join" if found.role == "peer" else "is a user's: mobictl login"
        raise Refused("unauthenticated", f"token {token} {purpose}")
    return replace(
        state, tokens=_with(state.tokens, token, found.model_copy(update={"uses": found.uses - 1}))
    )


def _member(state: State, peer: str) -> e.Member:
    member = state.members.get(peer)
    if member is None or member.status != "member":
        raise Refused("not-found", f"{state.peer_name(peer)} is no member of this mesh")
    return member


def _change_member(state: State, peer: str, **update: Any) -> State:
    member = _member(state, peer).model_copy(update=update)
    return replace(state, members=_with(state.members, peer, member))


def _update_peer(state: State, entry: e.UpdatePeer, _client: str) -> State:
    _speaks(state, state.peer_name(entry.peer), entry.facts)
    return _change_member(
        state,
        entry.peer,
        address=entry.address,
        site=entry.site,
        facts=entry.facts,
        gossip=entry.gossip,
    )


def _drain_peer(state: State, entry: e.DrainPeer, _client: str) -> State:
    return _change_member(state, entry.peer, draining=entry.draining)


def _remove_peer(state: State, entry: e.RemovePeer, _client: str) -> State:
    member = _member(state, entry.peer)
    if all(other.status == "left" or other.id == member.id for other in state.members.values()):
        raise Refused(
            "conflict",
            f"{member.name} is the only peer of its mesh and cannot leave it",
            "mobictl down ends it",
        )
    guests = state.guests_of(member.id)
    if guests and not entry.force:
        names = ", ".join(guest.key for guest in guests[:5])
        raise Refused(
            "conflict",
            f"{member.name} still has guests: {names}",
            f"move them: mobictl peer drain {member.name}",
        )
    opened = (m for m in state.migrations.values() if m.state == "open")
    coming = next((m for m in opened if m.destination == member.id), None)
    if coming and not entry.force:
        # It may run there already, and only the record of that is still to come.
        raise Refused(
            "conflict", f"{coming.guest} is being moved to {member.name}", "wait until that has ended"
        )
    for guest in guests:
        # What may run there until a lease is out waits for that, and the coordinator then decides.
        resting = guest.state in ("stopped", "failed", "lost")
        update = {"state": "fenced" if guest.ends_with_lease and not resting else "lost"}
        state = _change_guest(state, guest, message=f"{member.name} was evicted", **update)
    keys = tuple(key.model_copy(update={"stale": True}) for key in state.gossip_keys)
    return _change_member(replace(state, gossip_keys=keys), member.id, status="left")


def _rotate_gossip_key(state: State, entry: e.RotateGossipKey, _client: str) -> State:
    newest = state.gossip_keys[-1].generation if state.gossip_keys else 0
    if entry.generation != newest + 1:
        raise Refused("conflict", f"gossip key {entry.generation} does not follow {newest}")
    key = e.GossipKey(generation=entry.generation, key=entry.key, since=state.time)
    return replace(state, gossip_keys=(*state.gossip_keys, key)[-2:])


def _by_coordinator(client: str) -> None:
    if client:
        raise Refused("forbidden", "only the coordinator decides this, when a lease has run out or is set")


def _set_lease(state: State, entry: e.SetLease, client: str) -> State:
    _by_coordinator(client)
    member = _member(state, entry.peer)
    return _change_member(state, member.id, lease=max(member.lease, entry.duration))


def _add_user(state: State, entry: e.AddUser, _client: str) -> State:
    user = entry.user
    if _certificate_id(user.certificate) != user.id:
        raise Refused("bad-argument", f"user {user.name}: the certificate does not belong to id {user.id}")
    _free_id(state, user.id)
    state = _spend(state, user.token, peer=False)
    user = user.model_copy(update={"role": state.tokens[user.token].role})
    return replace(state, users=_with(state.users, user.id, user))


def _remove_user(state: State, entry: e.RemoveUser, _client: str) -> State:
    if entry.user not in state.users:
        raise Refused("not-found", f"there is no user {entry.user}")
    return replace(state, users=_without(state.users, entry.user))


def _add_token(state: State, entry: e.AddToken, _client: str) -> State:
    if entry.token.id in state.tokens:
        raise Refused("exists", f"there is a token {entry.token.id} already")
    kept = {id: token for id, token in state.tokens.items() if token.expires > state.time - 7 * 86400}
    return replace(state, tokens=_with(kept, entry.token.id, entry.token))


def _revoke_token(state: State, entry: e.RevokeToken, _client: str) -> State:
    token = state.tokens.get(entry.token)
    if token is None:
        raise Refused("not-found", f"there is no token {entry.token}", "mobictl peer token ls lists them")
    return replace(state, tokens=_with(state.tokens, token.id, token.model_copy(update={"revoked": True})))


# Labs and networks.


def _put_lab(state: State, entry: e.PutLab, _client: str) -> State:
    lab = entry.lab
    old = state.labs.get(lab.name)
    if old and not entry.replace:
        raise Refused(
            "exists", f"there is a lab {lab.name} already", f"mobictl lab down {lab.name} removes it"
        )
    found = old.revision if old else 0
    if entry.revision is not None and entry.revision != found:
        raise Refused("conflict", f"the lab {lab.name} was changed meanwhile", "look again, and try again")
    update = {"created": old.created if old else state.time, "revision": found + 1}
    return replace(state, labs=_with(state.labs, lab.name, lab.model_copy(update=update)))


def _remove_lab(state: State, entry: e.RemoveLab, _client: str) -> State:
    if entry.lab not in state.labs:
        raise Refused("not-found", f"there is no lab {entry.lab}")
    left = [guest.key for guest in state.guests.values() if guest.lab == entry.lab]
    left += [network.key for network in state.networks.values() if network.lab == entry.lab]
    if left:
        raise Refused("conflict", f"lab {entry.lab} still has {', '.join(left[:5])}")
    return replace(state, labs=_without(state.labs, entry.lab))


def _put_network(state: State, entry: e.PutNetwork, _client: str) -> State:
    network = entry.network
    if network.key in state.networks:
        raise Refused("exists", f"there is a network {network.key} already")
    _check_impairments(network, network.impairments)
    used = {other.id for other in state.networks.values()}
    span = 2**24 - 1
    id = next(
        (i for i in (_wrap(state.next_network + k, span) for k in range(len(used) + 1)) if i not in used), 0
    )
    if not id:
        raise Refused("no-room", "all 16,777,215 network ids are in use")
    return replace(
        state,
        networks=_with(state.networks, network.key, network.model_copy(update={"id": id})),
        next_network=_wrap(id + 1, span),
    )


def _check_impairments(network: e.Network, impairments: Sequence[e.Impairment]) -> None:
    if impairments and len(impairments) != len(network.members):
        raise Refused("bad-argument", f"network {network.key}: one impairment per member is needed")


def _change_network(state: State, entry: e.ChangeNetwork, _client: str) -> State:
    old = _network(state, entry.network.key)
    _check_impairments(entry.network, entry.network.impairments)
    network = entry.network.model_copy(update={"id": old.id})
    return replace(state, networks=_with(state.networks, network.key, network))


def _wrap(id: int, span: int) -> int:
    return (id - 1) % span + 1


def _network(state: State, key: str) -> e.Network:
    if key not in state.networks:
        raise Refused("not-found", f"there is no network {key}")
    return state.networks[key]


def _remove_network(state: State, entry: e.RemoveNetwork, _client: str) -> State:
    network = _network(state, entry.network)
    for guest in state.guests.values():
        if any(interface.network == network.key for interface in guest.interfaces):
            raise Refused("conflict", f"network {network.key} is still used by {guest.key}")
    return replace(state, networks=_without(state.networks, network.key))


def _set_impairments(state: State, entry: e.SetImpairments, _client: str) -> State:
    network = _network(state, entry.network)
    if len(entry.impairments) != len(network.members):
        raise Refused("bad-argument", f"network {network.key}: one impairment per member is needed")
    network = network.model_copy(update={"impairments": entry.impairments})
    return replace(state, networks=_with(state.networks, network.key, network))


# Guests.


def _guest(state: State, key: str) -> e.Guest:
    if key not in state.guests:
        raise Refused("not-found", f"there is no guest {key}")
    return state.guests[key]


def _change_guest(catalog: State, guest: e.Guest, **update: Any) -> State:
    if update.get("state", guest.state) != guest.state:
        update["state_since"] = catalog.time
    guests = _with(catalog.guests, guest.key, guest.model_copy(update=update))
    return replace(catalog, guests=guests)


def _give_guest(catalog: State, guest: e.Guest, owner: str, epoch: int, **update: Any) -> State:
    """The right to run: who gets it has applied this record, and so knows the guest's policy."""
    return _change_guest(catalog, guest, owner=owner, epoch=epoch, held_to=guest.on_partition, **update)


def _not_moving(state: State, key: str) -> None:
    migration = state.open_migration(key)
    if migration:
        member = state.members[migration.destination]
        mend = "wait until that has ended"
        if member.status != "member":
            mend = f"{member.name} is no member any more; if it will never run {key}: mobictl vm adopt {key}"
        raise Refused("conflict", f"{key} is being moved to {member.name}", mend)


def _add_guest(state: State, entry: e.AddGuest, _client: str) -> State:
    guest = entry.guest
    lab, _, name = guest.key.partition("/")
    if not lab or not name:
        raise Refused("bad-argument", f"a guest's key is LAB/NAME, not {guest.key!r}")
    if guest.key in state.guests:
        raise Refused(
            "exists", f"there is a guest {guest.key} already", f"mobictl vm rm {guest.key} removes it"
        )
    if any(other.id == guest.id for other in state.guests.values()):
        raise Refused("exists", f"the guest id {guest.id} is taken")
    owner = _member(state, guest.owner)
    if owner.draining:
        raise Refused("conflict", f"{owner.name} is being drained and takes no guests")
    for interface in guest.interfaces:
        _network(state, interface.network)
    if guest.epoch != 1:
        raise Refused("bad-argument", f"{guest.key}: a new guest has epoch 1")
    update = {"created": state.time, "state_since": state.time, "held_to": guest.on_partition}
    return replace(state, guests=_with(state.guests, guest.key, guest.model_copy(update=update)))


def _change_guest_entry(state: State, entry: e.ChangeGuest, _client: str) -> State:
    guest = _guest(state, entry.guest)
    _not_moving(state, guest.key)
    update = {
        name: value
        for name in e.ChangeGuest.model_fields
        if name not in ("kind", "guest") and (value := getattr(entry, name)) is not None
    }
    for interface in entry.interfaces or ():
        _network(state, interface.network)
    if entry.on_partition == "run":
        update["held_to"] = "run"
    return _change_guest(state, guest, **update)


def _remove_guest(state: State, entry: e.RemoveGuest, _client: str) -> State:
    guest = _guest(state, entry.guest)
    _not_moving(state, guest.key)
    return replace(state, guests=_without(state.guests, guest.key))


def _set_wanted(state: State, entry: e.SetWanted, _client: str) -> State:
    guest = _guest(state, entry.guest)
    _not_moving(state, guest.key)
    return _change_guest(state, guest, wanted=entry.wanted)


def _report(state: State, entry: e.Report, _client: str) -> State:
    guest = _guest(state, entry.guest)
    if (entry.owner, entry.epoch) != (guest.owner, guest.epoch):
        raise Refused(
            "conflict",
            f"{guest.key} belongs to {state.peer_name(guest.owner)} in epoch {guest.epoch}, "
            f"not to {state.peer_name(entry.owner)} in epoch {entry.epoch}",
        )
    optional = {"started", "restarts", "cpu_features", "xsave_size", "held_to"}
    update = {name: getattr(entry, name) for name in optional if getattr(entry, name) is not None}
    return _change_guest(
        state, guest, state=entry.state, exit_reason=entry.exit_reason, message=entry.message, **update
    )


def _move_guest(state: State, entry: e.MoveGuest, _client: str) -> State:
    guest = _guest(state, entry.guest)
    _not_moving(state, guest.key)
    if guest.epoch != entry.epoch:
        raise Refused("conflict", f"{guest.key} is in epoch {guest.epoch}, not {entry.epoch}")
    if guest.state not in ("pending", "stopped", "failed", "lost"):
        raise Refused(
            "conflict", f"{guest.key} is {guest.state}: only a guest that runs nowhere can be reassigned"
        )
    owner = _member(state, entry.owner)
    if owner.draining:
        raise Refused("conflict", f"{owner.name} is being drained and takes no guests")
    return _give_guest(state, guest, entry.owner, guest.epoch + 1, state="pending")


def _unowned(state: State, key: str, epoch: int) -> e.Guest:
    """The guest, for a decision that the coordinator made when it was in `epoch`."""
    guest = _guest(state, key)
    _not_moving(state, key)
    if guest.epoch != epoch:
        raise Refused("conflict", f"{key} is in epoch {guest.epoch}, not {epoch}")
    return guest


def _fail_over_guest(state: State, entry: e.FailOverGuest, client: str) -> State:
    _by_coordinator(client)
    guest = _unowned(state, entry.guest, entry.epoch)
    owner = _member(state, entry.owner)
    if not guest.ends_with_lease:
        raise Refused("conflict", f"{guest.key} runs on without a lease: nothing proves that it has ended")
    if guest.wanted != "running":
        raise Refused("conflict", f"{guest.key} is wanted {guest.wanted}, not running")
    if owner.id == guest.owner or owner.draining:
        raise Refused("conflict", f"{owner.name} cannot take {guest.key} over")
    return _give_guest(state, guest, owner.id, guest.epoch + 1, state="pending", message=entry.reason)


def _mark_guest(state: State, entry: e.MarkGuest, client: str) -> State:
    _by_coordinator(client)
    guest = _unowned(state, entry.guest, entry.epoch)
    return _change_guest(state, guest, state=entry.state, message=entry.message)


# Handovers.


def _handover(state: State, entry: e.Handover, _client: str) -> State:
    guest = _guest(state, entry.guest)
    _not_moving(state, guest.key)
    source, destination = _member(state, entry.source), _member(state, entry.destination)
    if entry.migration in state.migrations:
        raise Refused("conflict", f"migration {entry.migration} was begun before: its token is spent")
    if (guest.owner, guest.epoch) != (source.id, entry.epoch):
        raise Refused(
            "conflict",
            f"{guest.key} belongs to {state.peer_name(guest.owner)} in epoch {guest.epoch}, "
            f"not to {source.name} in epoch {entry.epoch}",
        )
    if destination.id == source.id:
        raise Refused("bad-argument", f"{guest.key} is at {source.name} already")
    if destination.draining:
        raise Refused("conflict", f"{destination.name} is being drained and takes no guests")
    migration = e.Migration(
        id=entry.migration,
        guest=guest.key,
        guest_id=guest.id,
        epoch=entry.epoch,
        source=source.id,
        destination=destination.id,
        timeout=entry.timeout,
        opened=state.time,
    )
    return replace(state, migrations=_with(_pruned(state.migrations), migration.id, migration))


def _pruned(migrations: Mapping[str, e.Migration]) -> Mapping[str, e.Migration]:
    closed = [migration for migration in migrations.values() if migration.state != "open"]
    if len(closed) < CLOSED_MIGRATIONS:
        return migrations
    return _without(migrations, min(closed, key=lambda migration: (migration.closed, migration.id)).id)


def _open(state: State, id: str) -> tuple[e.Migration, e.Guest]:
    migration = state.migrations.get(id)
    if migration is None:
        raise Refused("not-found", f"there is no migration {id}")
    if migration.state != "open":
        raise Refused("conflict", f"migration {id} of {migration.guest} is {migration.state} already")
    return migration, _guest(state, migration.guest)


def _close(catalog: State, migration: e.Migration, **update: Any) -> State:
    closed = migration.model_copy(update={"closed": catalog.time, **update})
    return replace(catalog, migrations=_with(catalog.migrations, migration.id, closed))


def _done(state: State, entry: e.Done, client: str) -> State:
    migration, guest = _open(state, entry.migration)
    if client != migration.destination:
        raise Refused("forbidden", f"only the destination can end migration {migration.id} well")
    epoch = migration.epoch + 1
    state = _give_guest(state, guest, migration.destination, epoch, state="running", message="")
    return _close(state, migration, state="done")


def _cancel(state: State, entry: e.Cancel, client: str) -> State:
    migration, _ = _open(state, entry.migration)
    if entry.refusal:
        text = e.refusal_text(migration.id, migration.guest, migration.epoch)
        destination = state.members[migration.destination]
        if not verify(destination.certificate, entry.refusal, text):
            raise Refused(
                "forbidden", f"the refusal of migration {migration.id} is not signed by {destination.name}"
            )
    elif not (client == entry.by == migration.source):
        raise Refused(
            "forbidden", f"only its source can cancel migration {migration.id} without a signed refusal"
        )
    return _close(state, migration, state="cancelled", reason=entry.reason, refusal=entry.refusal)


def _failover(state: State, entry: e.Failover, _client: str) -> State:
    migration, guest = _open(state, entry.migration)
    # The source goes on with the copy it froze, which may be older than a change of the guest's policy.
    state = _change_guest(state, guest, owner=migration.source, epoch=migration.epoch + 2)
    return _close(state, migration, state="failed-over", reason=entry.reason)


_TRANSITIONS: dict[type[e.Entry], Callable[[State, Any, str], State]] = {
    e.Found: _found,
    e.AddPeer: _add_peer,
    e.UpdatePeer: _update_peer,
    e.DrainPeer: _drain_peer,
    e.RemovePeer: _remove_peer,
    e.SetLease: _set_lease,
    e.RotateGossipKey: _rotate_gossip_key,
    e.AddUser: _add_user,
    e.RemoveUser: _remove_user,
    e.AddToken: _add_token,
    e.RevokeToken: _revoke_token,
    e.PutLab: _put_lab,
    e.RemoveLab: _remove_lab,
    e.PutNetwork: _put_network,
    e.ChangeNetwork: _change_network,
    e.RemoveNetwork: _remove_network,
    e.SetImpairments: _set_impairments,
    e.AddGuest: _add_guest,
    e.ChangeGuest: _change_guest_entry,
    e.RemoveGuest: _remove_guest,
    e.SetWanted: _set_wanted,
    e.Report: _report,
    e.MoveGuest: _move_guest,
    e.FailOverGuest: _fail_over_guest,
    e.MarkGuest: _mark_guest,
    e.Handover: _handover,
    e.Done: _done,
    e.Cancel: _cancel,
    e.Failover: _failover,
}
