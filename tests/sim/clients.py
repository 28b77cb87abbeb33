# SPDX-License-Identifier: Apache-2.0
"""People and their programs: they ask any peer, go to another when that dies, and note what they saw.

Each client has one command under way. What it asked, when, and what it was answered is a history that must
be linearizable (`linearizability.py`); what it was never answered may be true or not. The objects are labs,
which the catalog lets be created, replaced (also only if unchanged), removed and read. A command keeps its
key when it is asked of another peer, as `mobictl` does. A refusal of a command that was asked before is no
last word: the catalog remembers what became true under a key, not what was refused, and the earlier attempt
may come true yet.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from proto import entries
from proto.api import OperationError
from proto.state import State
from tests.sim.linearizability import Operation

if TYPE_CHECKING:
    from tests.sim.mesh_world import World
    from tests.sim.process import Process

KEYS = 3
PATIENCE = 15.0
"""Seconds after which a client gives up."""
ATTEMPT = 4.0
"""Seconds after which it asks another peer."""
NOTHING = (None, 0)


def step(state: tuple[Any, int], ask: tuple[Any, ...]) -> tuple[tuple[Any, int], Any]:
    """What a lab does, as far as clients see it: state is (value or None, revision)."""
    value, revision = state
    match ask:
        case ("read",):
            return state, state
        case ("put", new):
            return (new, revision + 1), "ok"
        case ("create", new):
            return ((new, revision + 1), "ok") if value is None else (state, "exists")
        case ("change", new, seen):
            return ((new, revision + 1), "ok") if revision == seen else (state, "conflict")
        case ("remove",):
            return (NOTHING, "ok") if value is not None else (state, "not-found")
    raise AssertionError(ask)


def seen(state: State, key: str) -> tuple[Any, int]:
    """A lab as a reader sees it."""
    lab = state.labs.get(key)
    return (lab.model["value"], lab.revision) if lab is not None else NOTHING


class Client:
    """One client; begins its next command a moment after the last one has ended."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.name = f"client{number}"
        self.history: list[Operation] = []
        self.busy = False
        self._number = number
        self._count = 0
        self._attempt = 0
        self._tries = 0
        self._revisions: dict[str, int] = {}
        self._ask: tuple[Any, ...] = ()
        self._key = ""
        self._called = 0.0
        self._pace = world.rng.choice((0.05, 0.3, 1.0))

    def begin(self) -> None:
        """The next command, unless faults are over."""
        if self.world.healing:
            return
        rng = self.world.rng
        self._count += 1
        self._key = f"reg{rng.randrange(KEYS)}"
        value = f"{self._number}.{self._count}"
        self._ask = rng.choice(
            (
                ("read",),
                ("read",),
                ("put", value),
                ("create", value),
                ("change", value, self._revisions.get(self._key, 0)),
                ("remove",),
            )
        )
        self._called = self.world.now
        self.busy = True
        self._tries = 0
        self._try()

    def _try(self) -> None:
        """Ask a peer, the one that was asked last not before others."""
        self._attempt += 1
        attempt = self._attempt
        if self.world.now > self._called + PATIENCE:
            self._end(math.inf, None)
            return
        process = self.world.some_process()
        if process is None:
            self.world.at(0.2, self._again, attempt)
            return
        self._tries += 1
        self.world.at(ATTEMPT, self._again, attempt)
        self._watch(process, attempt)
        process.after(0.001, self._asked, process, attempt)

    def _watch(self, process: Process, attempt: int) -> None:
        """A connection to a peer that dies is closed, and noticed."""
        if attempt != self._attempt:
            return
        if not process.alive:
            self._again(attempt)
        else:
            self.world.at(0.25, self._watch, process, attempt)

    def _again(self, attempt: int) -> None:
        if attempt == self._attempt and self.busy:
            self._try()

    def _asked(self, process: Process, attempt: int) -> None:
        """The peer has the command; it goes on with it whether or not the client still waits."""
        if self._ask == ("read",):
            process.read(lambda state: self._read(attempt, state))
            return
        ask, lab = self._ask, self._key
        request = f"{self._number:08d}{self._count:08d}#0"

        def decided(index: int, refused: OperationError | None) -> None:
            self.world.at(0.001, self._answered, attempt, index, refused)

        sequence = process.propose(entry_of(lab, ask), decided, request)
        process.after(ATTEMPT * 2, process.give_up, sequence)

    def _read(self, attempt: int, state: State | None) -> None:
        if attempt != self._attempt or not self.busy:
            return
        if state is None:
            self.world.at(0.1, self._again, attempt)
            return
        value = seen(state, self._key)
        self._revisions[self._key] = value[1]
        self._end(self.world.now, value)

    def _answered(self, attempt: int, index: int, refused: OperationError | None) -> None:
        if attempt != self._attempt or not self.busy:
            return
        self.world.invariants.acknowledged(index)
        if refused is not None and self._tries > 1:
            self._end(math.inf, refused.code)
        else:
            self._end(self.world.now, "ok" if refused is None else refused.code)

    def _end(self, returned: float, answer: Any) -> None:
        self.busy = False
        self._attempt += 1
        if not (returned == math.inf and self._ask == ("read",)):
            self.history.append(Operation(self._key, self._called, returned, self._ask, answer))
        self.world.say(self.name, self._key, self._ask, "→", answer)
        self.world.at(self._pace * self.world.rng.random(), self.begin)


def entry_of(lab: str, ask: tuple[Any, ...]) -> entries.AnyEntry:
    """The catalog's entry for a command."""
    if ask[0] == "remove":
        return entries.RemoveLab(lab=lab)
    return entries.PutLab(
        lab=entries.Lab(name=lab, model={"value": ask[1]}),
        replace=ask[0] != "create",
        revision=ask[2] if ask[0] == "change" else None,
    )
