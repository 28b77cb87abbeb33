# SPDX-License-Identifier: Apache-2.0
"""The registry of everything a peer can be asked, and how a request finds who carries it out.

A module marks its methods with `@operation(name, role=…, args=…, route=…)`; `Operations.add(part)` collects
them. A request is then checked once, here: is there such an operation, may the caller, are the arguments
right. The route says where it is carried out, so that every peer answers every operation:

* `here`: by the peer that was asked; * `guest`: by the owner of the guest in `args.vm`, which is replaced
by the full key LAB/NAME on the way; * `coordinator`: by the peer that keeps the catalog; * `peer`: by the
peer in `args.peer`, which is replaced by its id on the way.

Forwarding passes items, inputs, cancellation and the result through.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import trio

from mobid.tasks import background
from proto.api import Arguments, Nothing, OperationError, Role, parse
from proto.state import State
from proto.wire import MAX_HOPS

Route = Literal["here", "guest", "coordinator", "peer"]

DEFAULT_TIMEOUT = 60.0

LEADER_PATIENCE = 10.0
"""Seconds that a request waits for a coordinator to be elected."""

RETRY_PAUSE = 0.2


@dataclass(frozen=True)
class Caller:
    """Who asks. `id` is a peer's or user's id, empty for the local socket and for strangers."""

    role: Role
    id: str = ""
    name: str = ""


class Request(Protocol):
    """One request under way, as its handler sees it."""

    op: str
    caller: Caller
    hops: int
    key: str
    """Names the command of which this is an attempt; empty if it is not to be asked again."""
    cancelled: bool
    """Whether the caller takes it back; a caller whose connection was lost has not done so."""

    @property
    def role(self) -> Role: ...

    async def item(self, item: dict[str, Any]) -> None:
        """Send something to the caller before the result; waits while the connection is full."""
        ...

    async def input(self) -> dict[str, Any]:
        """The next thing the caller sends; waits for it. Ends only by cancellation."""
        ...


def step(request: Request, name: str = "") -> str:
    """What the catalog calls one step of a command, for `Catalog.propose` and `.applied`.

    It is a hash of KEY#NAME, since secrets of what a command makes may follow from its key. Empty for a
    request without key, which cannot be told from another.
    """
    return _hash(request.key, f"step {name or request.op}", 32) if request.key else ""


def made_id(request: Request, what: str, digits: int) -> str:
    """A new id for what a command makes: the same in every attempt, so that the next one recognises it."""
    if not request.key:
        return secrets.token_hex(digits // 2)
    return _hash(request.key, f"made {what}", digits)


def _hash(key: str, name: str, digits: int) -> str:
    return hashlib.sha256(f"{key}#{name}".encode()).hexdigest()[:digits]


def taken_back(request: Request) -> bool:
    """Whether what an interrupted request has begun shall be undone.

    Not if its caller has only lost its peer: it, or whoever has its key, will ask again.
    """
    return request.cancelled or not request.key


HandlerT = TypeVar("HandlerT", bound=Callable[..., Awaitable[Any]])


@dataclass(frozen=True)
class Operation:
    """What `@operation` says of a handler. `timeout` is in seconds, None for what may take for ever."""

    name: str
    role: Role
    args: type[Arguments]
    route: Route
    timeout: float | None


def operation(
    name: str,
    *,
    role: str,
    args: type[Arguments] = Nothing,
    route: Route = "here",
    timeout: float | None = DEFAULT_TIMEOUT,
) -> Callable[[HandlerT], HandlerT]:
    """Mark `async def method(self, request: Request, args: MODEL) -> result` as an operation.

    The result is anything MessagePack can say. A handler says no by raising `OperationError`.
    """
    made = Operation(name, Role.parse(role), args, route, timeout)

    def mark(handler: HandlerT) -> HandlerT:
        handler.__operation__ = made  # type: ignore[attr-defined]
        return handler

    return mark


class Stream(Protocol):
    """A request under way at another peer (`mobid.links.Stream`)."""

    abandoned: bool

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]: ...

    async def send(self, value: dict[str, Any]) -> None: ...

    async def result(self) -> Any: ...


class Forwarder(Protocol):
    """What forwarding needs of the links."""

    def stream(
        self, peer: str, op: str, args: Arguments | None = None, *, hops: int = 0, key: str = ""
    ) -> AbstractAsyncContextManager[Stream]: ...


class Operations:
    """The registry of one peer."""

    def __init__(
        self,
        own: str,
        state: Callable[[], State],
        links: Forwarder,
        leader: Callable[[float], Awaitable[str]],
        catch_up: Callable[[], Awaitable[None]],
    ) -> None:
        """`leader(timeout)` gives the coordinator's id, or raises `OperationError`. `catch_up()` brings this
        peer's state up to what the coordinator has answered, if that can be had soon."""
        self._own = own
        self._leader = leader
        self._catch_up = catch_up
        self._state = state
        self._links = links
        self._handlers: dict[str, tuple[Operation, Callable[..., Awaitable[Any]]]] = {}

    def add(self, part: object) -> None:
        """Register every marked method of `part`; a name taken twice is a programming error."""
        for attribute in dir(type(part)):
            made = getattr(getattr(type(part), attribute), "__operation__", None)
            if isinstance(made, Operation):
                if made.name in self._handlers:
                    raise ValueError(f"operation {made.name} is registered twice")
                self._handlers[made.name] = (made, getattr(part, attribute))

    async def run(self, request: Request, args: dict[str, Any]) -> Any:
        """Check and carry out a request, here or where it belongs; raises `OperationError`."""
        if request.op not in self._handlers:
            raise OperationError("unsupported", f"there is no operation {request.op!r}")
        made, handler = self._handlers[request.op]
        _check_role(made, request.caller)
        model = parse(made.args, args, made.name)
        with trio.move_on_after(math.inf if made.timeout is None else made.timeout):
            while True:
                target, model = await self._resolve(made, model)
                if target == self._own:
                    return await handler(request, model)
                try:
                    result = await self._forward(request, target, model)
                    if made.route == "coordinator":
                        # Who asked this peer asks it next about what has just been done.
                        await self._catch_up()
                    return result
                except _NotSentError as error:
                    if made.route != "coordinator":
                        raise error.reason from None
                # Perhaps another peer coordinates by now.
                await trio.sleep(RETRY_PAUSE)
        raise OperationError("timeout", f"{made.name} did not end within {made.timeout:g} s")

    async def _resolve(self, made: Operation, args: Arguments) -> tuple[str, Arguments]:
        """The peer that carries it out, and the arguments with names made exact."""
        state = self._state()
        match made.route:
            case "guest":
                guest = state.find_guest(getattr(args, "vm"))  # noqa: B009 - by the route's contract
                return guest.owner, args.model_copy(update={"vm": guest.key})
            case "peer":
                member = state.find_peer(getattr(args, "peer"))  # noqa: B009 - by the route's contract
                return member.id, args.model_copy(update={"peer": member.id})
            case "coordinator":
                return await self._leader(LEADER_PATIENCE), args
        return self._own, args

    async def _forward(self, request: Request, target: str, args: Arguments) -> Any:
        """Pass a request on; raises `_NotSentError` if it certainly did not arrive."""
        hops = request.hops + 1
        if hops > MAX_HOPS:
            raise OperationError(
                "conflict",
                f"{request.op} was passed on {MAX_HOPS} times without finding its place",
                "try again",
            )
        async with AsyncExitStack() as stack:
            opening = self._links.stream(target, request.op, args, hops=hops, key=request.key)
            try:
                stream = await stack.enter_async_context(opening)
            except OperationError as error:
                raise _NotSentError(error) from None

            async def pass_inputs() -> None:
                # When the connection is lost, the loop below says so.
                with suppress(OperationError):
                    while True:
                        await stream.send(await request.input())

            try:
                async with background(pass_inputs):
                    async for item in stream:
                        await request.item(item)
                    return await stream.result()
            except trio.Cancelled:
                stream.abandoned = not taken_back(request)
                raise


class _NotSentError(Exception):
    """A request did not leave this peer."""

    def __init__(self, reason: OperationError) -> None:
        super().__init__(reason.message)
        self.reason = reason


def _check_role(made: Operation, caller: Caller) -> None:
    if caller.role >= made.role:
        return
    if caller.role is Role.ANONYMOUS:
        raise OperationError(
            "unauthenticated",
            f"{made.name} needs a key this mesh knows",
            "enrol with mobictl login TOKEN, or use the peer's own socket",
        )
    raise OperationError(
        "forbidden",
        f"{made.name} needs role {made.role.label}; {caller.name or 'you'} has role {caller.role.label}",
        f"ask for a token with --role {made.role.label}",
    )
