# SPDX-License-Identifier: Apache-2.0
"""What a target is: one parser, the errors it may raise, and inputs to start from.

Bytes that are changed at random seldom get past a format's outermost layer. So a target may name its *form*:
how its input is read as a tree of plain values and written again. Half of the changes are then made in the
tree (`changed`): a value becomes another one, is left out, or stands twice, and the bytes round it stay
right.
"""

from __future__ import annotations

import atexit
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from proto.api import OperationError

Check = Callable[[bytes], None]


@dataclass(frozen=True)
class Form:
    """How an input is a tree of values; `read` raises anything for one that is none."""

    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]


MESSAGEPACK = Form(msgpack.unpackb, msgpack.packb)
JSON = Form(json.loads, lambda value: json.dumps(value).encode())


@dataclass(frozen=True)
class Target:
    """`check` takes one input. What it raises is a finding unless it is one of `refuses`, the documented
    errors of the parser; an `OperationError` must also have one of `codes`.
    """

    name: str
    check: Check
    start: Callable[[], Iterable[bytes]]
    refuses: tuple[type[Exception], ...]
    codes: tuple[str, ...]
    form: Form | None
    longest: int

    def run(self, data: bytes) -> None:
        """Raises whatever is a finding."""
        try:
            self.check(data)
        except self.refuses as error:
            if isinstance(error, OperationError) and error.code not in self.codes:
                raise AssertionError(
                    f"refused with the code {error.code}, which is not documented"
                ) from error


TARGETS: dict[str, Target] = {}


def target(
    start: Callable[[], Iterable[bytes]],
    *refuses: type[Exception],
    codes: tuple[str, ...] = (),
    form: Form | None = None,
    longest: int = 4096,
) -> Callable[[Check], Check]:
    """Make a target of a function, under its name; `longest` is in bytes."""

    def register(check: Check) -> Check:
        TARGETS[check.__name__] = Target(check.__name__, check, start, refuses, codes, form, longest)
        return check

    return register


def same(one: object, other: object) -> None:
    """Raise unless the two are equal; a NaN is equal to itself here."""
    if one != other and repr(one) != repr(other):
        raise AssertionError(f"{one!r:.400} has become {other!r:.400}")


def examples(strategy: SearchStrategy[Any], count: int = 40) -> list[Any]:
    """Values that hypothesis makes of a strategy, always the same ones."""
    made: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate], deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def collect(value: Any) -> None:
        made.append(value)

    collect()
    return made


@cache
def room() -> Path:
    """A directory of this process for parsers that want a file, gone with it."""
    made = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, made)
    return made


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, 0.5, -1.0, 1e300,
    float("nan"), float("inf"), "", "x", "é\x00", "\ud800", "x" * 300, [], {}, [[]], {"x": []}, [0] * 20,
)  # fmt: skip


def altered(form: Form, data: bytes, rng: random.Random) -> bytes | None:
    """The input with one change in its tree; None if it is no tree, or none that can be written any more."""
    try:
        return form.write(changed(form.read(data), rng))
    except Exception:  # noqa: BLE001 - a form may raise anything
        return None


def changed(value: Any, rng: random.Random) -> Any:
    """The tree with one thing in it changed. `value` itself may be altered."""
    if isinstance(value, list | dict) and value and rng.random() < 0.9:
        keys = list(range(len(value))) if isinstance(value, list) else list(value)
        key = rng.choice(keys)
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1 if isinstance(value, dict):
                value[rng.choice(["", "x", "id"])] = value[key]
            case 1 if isinstance(value, list):
                value.insert(rng.randrange(len(value) + 1), value[key])
            case 2:
                value[key] = value[rng.choice(keys)]
            case _:
                value[key] = changed(value[key], rng)
        return value
    odd = [*ODD, b"", b"\xff" * 16]
    return rng.choice([value + 1, value - 1, value * 2, *odd] if isinstance(value, int) else odd)
