# SPDX-License-Identifier: Apache-2.0
"""Whether a history of operations could have happened one after the other.

A history is *linearizable* if every operation can be given one moment between its call and its return such
that, carried out in the order of these moments, each gives the answer that was seen (Herlihy and Wing 1990).
The search is Wing and Gong's, with Lowe's memory of what was tried (*Testing for linearizability*, 2016):
depth first over what could have come next, never twice from the same set of operations done and the same
state. A history over independent keys is linearizable if it is for each key (Herlihy and Wing's locality),
so each key is searched alone. An operation without an answer may have taken effect at any time after its
call, or never.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Operation:
    """`ask` and `answer` are of the model's choosing; without an answer `returned` is infinite."""

    key: Hashable
    called: float
    returned: float
    ask: Any
    answer: Any = None


Step = Callable[[Any, Any], tuple[Any, Any]]
"""The model: (state, ask) → (next state, answer). States can be hashed."""


def first_contradiction(history: Iterable[Operation], initial: Hashable, step: Step) -> Hashable | None:
    """The first key whose operations cannot be put in any order; None if there is none."""
    by_key: dict[Hashable, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    for key, operations in by_key.items():
        if not is_linearizable(operations, initial, step):
            return key
    return None


def is_linearizable(operations: list[Operation], initial: Hashable, step: Step) -> bool:
    """Whether the operations on one object have an order."""
    todo = sorted(operations, key=lambda operation: operation.called)
    answered = sum(1 << i for i, operation in enumerate(todo) if operation.returned < math.inf)
    seen: set[tuple[int, Hashable]] = set()
    stack: list[tuple[int, Hashable]] = [(0, initial)]
    while stack:
        done, state = stack.pop()
        if done & answered == answered:
            return True
        if (done, state) in seen:
            continue
        seen.add((done, state))
        stack.extend(_next(todo, done, state, step))
    return False


def _next(todo: list[Operation], done: int, state: Hashable, step: Step) -> list[tuple[int, Hashable]]:
    """Every operation that may come next: called before any other that is still to come has returned."""
    left = [(i, operation) for i, operation in enumerate(todo) if not done >> i & 1]
    limit = min(operation.returned for _, operation in left)
    found: list[tuple[int, Hashable]] = []
    for i, operation in left:
        if operation.called > limit:
            break
        after, answer = step(state, operation.ask)
        unknown = operation.returned == math.inf
        if (unknown and after != state) or (not unknown and answer == operation.answer):
            found.append((done | 1 << i, after))
    return found
