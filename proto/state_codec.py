# SPDX-License-Identifier: Apache-2.0
"""The catalog's whole state as bytes: what a snapshot of the log holds.

A map of the state's fields, preceded by a format number; its maps become lists of pairs in the order in which
the state has them, so that a peer that starts from a snapshot is in every respect like one that applied all
records, and so that all peers make the same bytes of the same log. What is read is validated like an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from proto import wire
from proto.api import OperationError
from proto.state import Session, State

FORMAT = 1

LIMIT = 1 << 30
"""Bytes of the largest state that is read."""

_STATE: TypeAdapter[State] = TypeAdapter(State)
_MAPS = {name for name, hint in get_type_hints(State).items() if get_origin(hint) is Mapping}


def encode(state: State) -> bytes:
    """The bytes of `state`."""
    return wire.pack(
        {"format": FORMAT} | {field.name: _plain(getattr(state, field.name)) for field in fields(state)}
    )


def _plain(value: Any) -> Any:
    """`value` as MessagePack can say it; a map of the state becomes a list of pairs."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="python")
    if isinstance(value, Session):
        return [value.boot, _plain(value.applied), _plain(value.refused)]
    if isinstance(value, Mapping):
        return [[key, _plain(item)] for key, item in value.items()]
    return value


def decode(data: bytes) -> State:
    """The state in `data`; raises `OperationError(unsupported)` for another format, else `bad-argument`."""
    try:
        value = wire.unpack(data, LIMIT)
    except wire.WireError as error:
        raise _damaged(str(error)) from None
    if not isinstance(value, dict):
        raise _damaged("it is not a map")
    format = value.pop("format", None)
    if format != FORMAT:
        raise OperationError(
            "unsupported",
            f"a snapshot of the catalog has format {format!r}; this version reads format {FORMAT}",
            "use the version of Mobitopolo that wrote it, or a newer one",
        )
    try:
        known = {field.name for field in fields(State)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise ValueError(f"{unknown[0]} is unknown")
        return _STATE.validate_python({name: _mapped(name, item) for name, item in value.items()})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _damaged(f"malformed at {place}: {first['msg']}") from None
    except (ValueError, TypeError) as error:
        raise _damaged(str(error)) from None


def _mapped(name: str, value: Any) -> Any:
    """A field of the state with its lists of pairs turned into maps again."""
    if name not in _MAPS:
        return tuple(value) if isinstance(value, list) else value
    if name != "sessions":
        return dict(cast("list[list[Any]]", value))
    return {
        peer: {
            "boot": boot,
            "applied": (known := dict(applied)),
            "refused": dict(refused),
            "newest": max(known, default=0),
        }
        for peer, (boot, applied, refused) in value
    }


def _damaged(reason: str) -> OperationError:
    return OperationError("bad-argument", f"a snapshot of the catalog cannot be read: {reason}")
