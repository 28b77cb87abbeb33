# SPDX-License-Identifier: Apache-2.0
"""What a peer itself proposes, until the log says what became of it.

A proposal can get lost on its way, and so can the knowledge that it was appended; the log alone is certain.
So it is sent to whoever coordinates, again after a while and at once to a new coordinator, until it is seen
decided in the own copy of the log. The catalog applies it once however often it was appended
(`State.sessions`); since it remembers only the last proposals of each peer, no proposal is sent that is far
ahead of the oldest undecided one.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto import entries
from proto.api import OperationError
from proto.catalog import Refused, applied_index, refusal
from proto.entries import Proposal
from proto.state import SESSION_WINDOW, State

MOST = 4096
"""Undecided proposals of a peer; more are refused at once."""

AHEAD = SESSION_WINDOW // 2
"""How far a proposal that is sent may be ahead of the oldest undecided one."""

LARGEST = 3 << 20
"""Bytes of the largest proposal: with all that is around it, it must fit into one message."""

LONGEST = 4
"""The pauses before a proposal is sent again double up to so many times `resend`: a coordinator that is slow
must not get more to do by it."""

FORWARD_BYTES = 256 << 10
"""About how much goes into one message; a larger proposal has one of its own."""


@dataclass(slots=True)
class _Waiting:
    proposal: Proposal
    encoded: bytes
    sent: float | None = None
    pause: float = 0.0
    """From `sent` until it is sent again."""


class Outbox:
    """The undecided proposals of this peer, by sequence. `resend` in seconds."""

    def __init__(self, resend: float) -> None:
        self._resend = resend
        self._waiting: dict[int, _Waiting] = {}

    def add(self, proposal: Proposal) -> OperationError | None:
        """Take a proposal; the error if there are too many or it is too large ever to be sent."""
        encoded = entries.encode(proposal)
        if len(encoded) > LARGEST:
            return OperationError(
                "too-large",
                f"an entry of {len(encoded)} bytes is larger than the {LARGEST} the log takes",
                "make it in several steps",
            )
        if len(self._waiting) >= MOST:
            return OperationError(
                "no-room",
                f"{MOST} changes of this peer wait to be decided already",
                "mobictl leader says whether the mesh can decide anything now",
            )
        self._waiting[proposal.sequence] = _Waiting(proposal, encoded)
        return None

    def drop(self, sequence: int) -> None:
        """Nobody waits for it any more."""
        self._waiting.pop(sequence, None)

    def settle(self, proposal: Proposal) -> None:
        """This one of this peer is decided; it may be one of an earlier start, with the same sequence."""
        waiting = self._waiting.get(proposal.sequence)
        if waiting is not None and waiting.proposal.boot == proposal.boot:
            del self._waiting[proposal.sequence]

    def again(self) -> None:
        """Somebody else coordinates now: everything is to be sent anew."""
        for waiting in self._waiting.values():
            waiting.sent, waiting.pause = None, 0.0

    def due(self, now: float) -> list[Proposal]:
        """The proposals to send now, in their order; they count as sent."""
        due: list[Proposal] = []
        if not self._waiting:
            return due
        end = min(self._waiting) + AHEAD
        for sequence in sorted(self._waiting):
            waiting = self._waiting[sequence]
            if sequence < end and (waiting.sent is None or now >= waiting.sent + waiting.pause):
                waiting.pause = min(max(2 * waiting.pause, self._resend), LONGEST * self._resend)
                waiting.sent = now
                due.append(waiting.proposal)
        return due

    def wake_at(self) -> float | None:
        """When the next proposal is due again; None if there is none."""
        again = (w.sent + w.pause for w in self._waiting.values() if w.sent is not None)
        return min(again, default=None)

    def packed(self, proposals: list[Proposal]) -> list[tuple[bytes, ...]]:
        """These proposals of this outbox, encoded, in portions of the size of a message."""
        portions: list[tuple[bytes, ...]] = []
        portion: list[bytes] = []
        size = 0
        for proposal in proposals:
            encoded = self._waiting[proposal.sequence].encoded
            if portion and size + len(encoded) > FORWARD_BYTES:
                portions.append(tuple(portion))
                portion, size = [], 0
            portion.append(encoded)
            size += len(encoded)
        return [*portions, tuple(portion)] if portion else portions

    def decided(self, state: State) -> list[tuple[int, Proposal, OperationError | None]]:
        """What `state` says was decided meanwhile: index, proposal, and why it was refused. They go."""
        found: list[tuple[int, Proposal, OperationError | None]] = []
        for sequence in sorted(self._waiting):
            proposal = self._waiting[sequence].proposal
            try:
                index = applied_index(state, proposal.client, proposal.boot, sequence)
            except Refused as error:
                found.append((state.index, proposal, error))
                continue
            if index is not None:
                found.append((index, proposal, refusal(state, proposal.client, sequence)))
        for _, proposal, _ in found:
            del self._waiting[proposal.sequence]
        return found
