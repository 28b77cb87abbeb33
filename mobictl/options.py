# SPDX-License-Identifier: Apache-2.0
"""Options whose values have units, and the arguments of operations made from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from proto import units
from proto.api import Arguments, parse

ValueT = TypeVar("ValueT")
ArgumentsT = TypeVar("ArgumentsT", bound=Arguments)


def _parser(parse_unit: Callable[[object], ValueT], name: str) -> Callable[[Any], ValueT]:
    def read(text: Any) -> ValueT:
        # A default that was parsed already comes here again.
        if not isinstance(text, str):
            return text  # type: ignore[no-any-return]
        try:
            return parse_unit(text)
        except units.UnitError as error:
            raise typer.BadParameter(str(error)) from None

    read.__name__ = name
    return read


def _option(
    names: tuple[str, ...], help: str, metavar: str, default: str | None, parser: Callable[[Any], Any]
) -> Any:
    """`default` is how the default value is shown, with its unit."""
    return typer.Option(*names, help=help, metavar=metavar, parser=parser, show_default=default or False)


def size(*names: str, help: str, default: str | None = None) -> Any:
    """An option that takes a size, `64M`; its value is bytes."""
    return _option(names, help, "SIZE", default, _parser(units.parse_size, "size"))


def rate(*names: str, help: str, default: str | None = None) -> Any:
    """An option that takes a rate with its unit, `20mbit`; its value is bytes per second."""
    return _option(names, help, "RATE", default, _parser(units.parse_rate, "rate"))


def duration(*names: str, help: str, default: str | None = None) -> Any:
    """An option that takes a time with its unit, `50ms`; its value is seconds."""
    return _option(names, help, "TIME", default, _parser(units.parse_time, "time"))


def share(*names: str, help: str, default: str | None = None) -> Any:
    """An option that takes a percentage, `0.1%`; its value lies between 0 and 1."""
    return _option(names, help, "PERCENT", default, _parser(units.parse_percentage, "percentage"))


VmArgument = Annotated[
    str, typer.Argument(metavar="VM", help="The guest, NAME or LAB/NAME.", show_default=False)
]
LabArgument = Annotated[str, typer.Argument(metavar="LAB", help="The lab.", show_default=False)]
PeerArgument = Annotated[str, typer.Argument(metavar="PEER", help="A peer's name or id.", show_default=False)]


def build(model: type[ArgumentsT], op: str, **values: Any) -> ArgumentsT:
    """The arguments of `op`; None means left out. Raises OperationError(bad-argument) in words."""
    return parse(model, {key: value for key, value in values.items() if value is not None}, op)
