# SPDX-License-Identifier: Apache-2.0
"""Who belongs to the mesh: tokens, joining, logging in, leaving, and the lists of peers that people see.

A newcomer has no key that anybody knows. It shows a token's secret, over TLS to a peer whose key it pinned
from the token, and its certificate; one catalog entry spends a use of the token and lists the certificate.
From then on TLS knows it. Asking again with the same token and the same key, because the answer was lost,
gives the same answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import trio

from mobid.catalog import Catalog
from mobid.config import Times
from mobid.identity import Identity
from mobid.links import Links
from mobid.operations import Request, made_id, operation, step
from proto import api, entries, tokens
from proto.api import OperationError
from proto.identity import IdentityError, peer_id, public_key
from proto.state import State

DOORS = 5
"""Members that a token, or the answer to a newcomer, names."""

RELEASE_TIMEOUT = 20.0
RELEASE_PAUSE = 0.1


class Mesh:
    """The operations `peer.*`, `mesh.*` and `leader`."""

    def __init__(
        self,
        identity: Identity,
        catalog: Catalog,
        links: Links,
        *,
        times: Times,
        facts: Callable[[], dict[str, Any]],
        emit: Callable[..., None],
    ) -> None:
        """`times` are the mesh's. `facts()` is what a ping answers beside the time: `{memory_free, …}` of
        this host now. `emit` is that of the events."""
        self._identity = identity
        self._catalog = catalog
        self._links = links
        self._times = times
        self._facts = facts
        self._emit = emit

    # Looking.

    @operation("ping", role="viewer")
    async def ping(self, _request: Request, _args: api.Nothing) -> dict[str, Any]:
        """That this peer is here, and how its host does."""
        return self._facts()

    @operation("leader", role="viewer")
    async def leader(self, _request: Request, _args: api.Nothing) -> dict[str, Any]:
        """Who coordinates; `changing`: the voters are just becoming others.

        `missing` are the voters that do not answer, and for how many seconds.
        """
        state, now = self._catalog.state, self._catalog.leadership
        missing = self._catalog.quorum.missing()
        return {
            "leader": state.peer_name(now.leader) if now.leader else None,
            "term": now.term,
            "voters": sorted(state.peer_name(peer) for peer in self._catalog.voters),
            "changing": self._catalog.changing,
            "commit_index": state.index,
            "since": now.since,
            "missing": {state.peer_name(peer): round(silence, 1) for peer, silence in missing.items()},
        }

    @operation("peer.ls", role="viewer")
    async def ls(self, _request: Request, _args: api.Nothing) -> list[dict[str, Any]]:
        """All members, by name; those that left come last."""
        members = self._catalog.state.members.values()
        return [self._shown(m) for m in sorted(members, key=lambda m: (m.status != "member", m.name))]

    @operation("peer.show", role="viewer", args=api.PeerArguments)
    async def show(self, _request: Request, args: api.PeerArguments) -> dict[str, Any]:
        """One member, with what its host is and the guests it owns."""
        state = self._catalog.state
        member = state.find_peer(args.peer)
        return {
            **self._shown(member),
            "memory": member.facts.memory,
            "cpus": member.facts.cpus,
            "xsave_size": member.facts.xsave_size,
            "joined": member.joined,
            "gossip": member.gossip,
            "guest_names": sorted(guest.key for guest in state.guests_of(member.id)),
        }

    def _shown(self, member: entries.Member) -> dict[str, Any]:
        state = self._catalog.state
        sight = self._links.liveness(member.id)
        own = member.id == self._identity.id
        last = self._facts() if own else self._links.last_answer(member.id)
        return {
            "peer": member.id,
            "name": member.name,
            "site": member.site,
            "address": member.address,
            "state": sight.state if member.status == "member" else "left",
            "rtt_ms": None if sight.rtt is None else round(sight.rtt * 1000, 3),
            "voter": member.id in self._catalog.voters,
            "draining": member.draining,
            "guests": len(state.guests_of(member.id)),
            "memory_free": last.get("memory_free"),
            "cpu_features": list(member.facts.cpu_features),
            "version": member.facts.version,
        }

    @operation("peer.ping", role="viewer", args=api.PeerArguments)
    async def ping_peer(self, _request: Request, args: api.PeerArguments) -> dict[str, Any]:
        """One round trip from the peer that was asked to the one named."""
        member = self._catalog.state.find_peer(args.peer)
        return {"peer": member.name, "rtt_ms": round(await self._links.ping(member.id) * 1000, 3)}

    # Tokens.

    @operation("peer.token.new", role="admin", args=api.TokenNew)
    async def token_new(self, request: Request, args: api.TokenNew) -> dict[str, Any]:
        """Make a token; its text is shown once and kept nowhere.

        Every attempt of one command makes the same token: its secret follows from the command's key, which
        no log holds.
        """
        id = made_id(request, "token", 8)
        secret = bytes.fromhex(made_id(request, "token secret", 2 * tokens.SECRET_SIZE))
        token = entries.Token(
            id=id,
            secret_hash=tokens.hash_secret(id, secret),
            role=args.role,
            uses=args.uses,
            expires=time.time() + args.ttl,
            created_by=self._catalog.state.peer_name(self._identity.id),
        )
        if self._catalog.applied(step(request)) is None:
            await self._catalog.propose(entries.AddToken(token=token), request=step(request))
            self._emit("token.made", token=id, role=args.role, uses=args.uses)
        made = self._catalog.state.tokens.get(id, token)
        return self._new_token(id, secret, args, made.expires)

    def _new_token(self, id: str, secret: bytes, args: api.TokenNew, expires: float) -> dict[str, Any]:
        state, members = self._catalog.state, self._doors()
        text = tokens.encode(
            tokens.Token(
                id,
                secret,
                state.mesh,
                args.role,
                expires,
                tuple((member.address, public_key(member.certificate)) for member in members),
            )
        )
        return {"token": text, "id": id, "expires": expires}

    @operation("peer.token.ls", role="admin")
    async def token_ls(self, _request: Request, _args: api.Nothing) -> list[dict[str, Any]]:
        """All tokens, without their secrets, which nobody has any more."""
        now = time.time()
        return [
            {
                "id": token.id,
                "role": token.role,
                "uses": token.uses,
                "expires": token.expires,
                "state": _token_state(token, now),
                "created_by": token.created_by,
            }
            for token in sorted(self._catalog.state.tokens.values(), key=lambda token: token.expires)
        ]

    @operation("peer.token.revoke", role="admin", args=api.TokenRevoke)
    async def token_revoke(self, request: Request, args: api.TokenRevoke) -> dict[str, Any]:
        """Make a token worthless; who came in with it stays."""
        id = tokens.decode(args.token).id if args.token.startswith(tokens.PREFIX) else args.token
        await self._catalog.propose(entries.RevokeToken(token=id), request=step(request))
        self._emit("token.revoked", token=id)
        return {"id": id, "state": "revoked"}

    def _doors(self) -> list[entries.Member]:
        """Members that a newcomer may turn to: this one, then voters, then others, those alive first."""
        state, voters = self._catalog.state, self._catalog.voters

        def order(member: entries.Member) -> tuple[bool, bool, bool, str]:
            alive = self._links.liveness(member.id).state == "alive"
            return member.id != self._identity.id, not alive, member.id not in voters, member.id

        return sorted((m for m in state.members.values() if m.status == "member"), key=order)[:DOORS]

    # Coming in.

    @operation("mesh.join", role="anonymous", args=api.MeshJoin, route="coordinator")
    async def join(self, _request: Request, args: api.MeshJoin) -> dict[str, Any]:
        """Let a newcomer with a token in; tells it some of the members, from whom it gets the catalog, the
        times of the mesh, and whether its key may have been a member's before."""
        state = await self._catalog.read()
        token = self._checked_token(args.token, args.secret)
        known = state.members.get(_id_of(args.certificate))
        again = known and (known.certificate, known.token, known.status) == (
            args.certificate,
            token.id,
            "member",
        )
        if not again:
            member = entries.Member(
                id=_id_of(args.certificate),
                name=args.name,
                site=args.site,
                address=args.address,
                certificate=args.certificate,
                token=token.id,
                facts=entries.Facts(
                    oldest_protocol=args.oldest_protocol, newest_protocol=args.newest_protocol
                ),
            )
            await self._catalog.propose(entries.AddPeer(member=member))
            self._emit("peer.admitted", name=member.name, token=token.id)
        state = self._catalog.state
        newcomer = state.members[_id_of(args.certificate)]
        return {
            "mesh": state.mesh,
            "times": asdict(self._times),
            "returning": known is not None,
            "members": [member.model_dump(mode="python") for member in (newcomer, *self._doors())],
        }

    @operation("mesh.login", role="anonymous", args=api.MeshLogin, route="coordinator")
    async def login(self, _request: Request, args: api.MeshLogin) -> dict[str, Any]:
        """Enrol a user's key; tells it which peers, with which keys, it may talk to."""
        token = self._checked_token(args.token, args.secret)
        id = _id_of(args.certificate)
        known = self._catalog.state.users.get(id)
        if not (known and (known.certificate, known.token) == (args.certificate, token.id)):
            role = token.role if token.role != "peer" else "viewer"
            user = entries.User(
                id=id, name=args.name, role=role, certificate=args.certificate, token=token.id
            )
            await self._catalog.propose(entries.AddUser(user=user))
            self._emit("user.enrolled", name=user.name, role=role, token=token.id)
        state = self._catalog.state
        return {
            "mesh": state.mesh,
            "user": id,
            "role": state.users[id].role,
            "members": _doors(state),
        }

    @operation("mesh.doors", role="viewer")
    async def doors(self, _request: Request, _args: api.Nothing) -> dict[str, Any]:
        """Which other peers, with which keys, a user may go on with when this one dies."""
        state = self._catalog.state
        return {"mesh": state.mesh, "members": _doors(state)}

    def _checked_token(self, id: str, secret: bytes) -> entries.Token:
        """The token, if the secret is right.

        Whether it may still be used is judged by the catalog's entry.
        """
        token = self._catalog.state.tokens.get(id)
        if token is None or not tokens.secret_matches(id, secret, token.secret_hash):
            raise OperationError(
                "unauthenticated",
                "this token is not known to the mesh",
                "ask for a new one: mobictl peer token new",
            )
        return token

    # Going.

    @operation("peer.evict", role="admin", args=api.PeerArguments)
    async def evict(self, request: Request, args: api.PeerArguments) -> dict[str, Any]:
        """A member's key opens nothing any more.

        Its guests are lost; a lease-bound one that runs is fenced, and started anew elsewhere once the lease
        is out by every clock.
        """
        if self._catalog.applied(step(request)) is None:
            member = self._catalog.state.find_peer(args.peer)
            await self.release(member)
            entry = entries.RemovePeer(peer=member.id, force=True)
            await self._catalog.propose(entry, request=step(request))
            self._emit("peer.removed", name=member.name)
            return self._shown(self._catalog.state.members[member.id])
        for member in self._catalog.state.members.values():
            if args.peer in (member.name, member.id):
                return self._shown(member)
        raise OperationError("not-found", f"there is no peer {args.peer!r} any more")

    async def release(self, member: entries.Member) -> None:
        """See to it that the mesh can decide without this peer; raises `OperationError(conflict)`.

        A peer that is being drained gives its vote to another one, if there is one to take it.
        """
        if self._catalog.quorum.dispensable(member.id):
            return
        drained = member.draining
        if not drained:
            await self._catalog.propose(entries.DrainPeer(peer=member.id, draining=True))
        for _ in range(int(RELEASE_TIMEOUT / RELEASE_PAUSE)):
            if self._catalog.quorum.dispensable(member.id):
                return
            await trio.sleep(RELEASE_PAUSE)
        if not drained:
            await self._catalog.propose(entries.DrainPeer(peer=member.id, draining=False))
        raise self._indispensable(member)

    def _indispensable(self, member: entries.Member) -> OperationError:
        state = self._catalog.state
        missing = ", ".join(state.peer_name(peer) for peer in self._catalog.quorum.missing())
        others = (m for m in state.members.values() if m.status == "member" and m.id != member.id)
        drained = [other.name for other in others if other.draining]
        message = f"without {member.name} too few of the mesh's voters would answer"
        if missing:
            hint = "start the missing peers, or evict them first"
            return OperationError("conflict", f"{message}; missing: {missing}", hint)
        if drained:
            hint = f"let one of them be used again: mobictl peer drain {drained[0]} --undo"
            return OperationError("conflict", f"{message}; draining: {', '.join(drained)}", hint)
        return OperationError("conflict", message, "let another peer join first")


def _doors(state: State) -> list[dict[str, Any]]:
    return [
        {"name": m.name, "address": m.address, "key": public_key(m.certificate)}
        for m in state.members.values()
        if m.status == "member"
    ]


def _token_state(token: entries.Token, now: float) -> str:
    if token.revoked:
        return "revoked"
    if token.uses == 0:
        return "spent"
    return "expired" if now >= token.expires else "valid"


def _id_of(certificate: bytes) -> str:
    try:
        return peer_id(public_key(certificate))
    except IdentityError as error:
        raise OperationError("bad-argument", f"the certificate cannot be used: {error}") from None
