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

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from proto.api import Arguments, Nothing, Role

Route = Literal["here", "guest", "coordinator", "peer"]

DEFAULT_TIMEOUT = 60.0


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

    @property
    def role(self) -> Role: ...

    async def item(self, item: dict[str, Any]) -> None:
        """Send something to the caller before the result; waits while the connection is full."""
        ...

    async def input(self) -> dict[str, Any]:
        """The next thing the caller sends; waits for it. Ends only by cancellation."""
        ...


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


class Operations:
    """The registry of one peer."""

    def __init__(self) -> None:
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
        raise NotImplementedError
