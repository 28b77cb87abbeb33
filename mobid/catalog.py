# SPDX-License-Identifier: Apache-2.0
"""The catalog of a live peer: the log on disk, the state it makes, and how others get both.

One peer, the coordinator, appends; an entry is answered only after fsync. The other members follow: they
stream the records they lack, append them to a log of their own and apply them, so that every peer answers
questions from its own state, also when it starts alone. What a peer proposes goes to the coordinator with a
sequence number, so that a proposal whose answer was lost can be sent again and is applied once.

Proposals that come while the disk is busy share the next fsync.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

import structlog
import trio
from pydantic import Field

from mobid.lease import Lease
from mobid.logfile import LogFile
from mobid.operations import Request, operation
from mobid.signal import Changed
from mobid.stamps import HybridClock
from proto import entries, versions, wire
from proto.api import Arguments, OperationError
from proto.catalog import Refused, State, applied_index, apply, skip
from proto.log import Record
from proto.state import SESSION_WINDOW

TERM = 1
"""With a single voter there is one term for ever; an election will count them."""

BATCH = 128
"""Proposals that share one fsync."""

QUEUE = SESSION_WINDOW // 2
"""Proposals that wait for the disk.

A peer has at most so many outstanding, so none is forgotten too early.
"""

FOLLOW_BYTES = 1 << 20
"""Bytes of records in one item to a follower."""

ATTEMPT_TIMEOUT = 5.0
RETRY_PAUSE = 0.2
LONGEST_PAUSE = 3.0

log = structlog.get_logger()


class Propose(Arguments):
    """`catalog.propose`, from a member to the coordinator: an encoded `Proposal` of that member."""

    proposal: Annotated[bytes, Field(max_length=wire.LIMIT)]


class Follow(Arguments):
    """`catalog.follow`: items `{records: [[term, index, payload], …]}` after index `after`, for ever."""

    after: Annotated[int, Field(ge=0)]


class Reaching(Protocol):
    """What the catalog needs of the links."""

    async def call(self, peer: str, op: str, args: Arguments, timeout: float) -> Any: ...

    def stream(self, peer: str, op: str, args: Arguments) -> Any: ...


@dataclass
class _Pending:
    """A proposal that waits for the disk."""

    proposal: entries.Proposal
    done: trio.Event = field(default_factory=trio.Event)
    index: int = 0
    error: OperationError | None = None


class Catalog:
    """The one object through which everything shared is read and changed.

    `bootstrap` is what a newcomer was told when it joined: enough of a state to find the coordinator, until
    the first records have come.
    """

    def __init__(
        self,
        path: Path,
        own: str,
        links: Reaching,
        bootstrap: State | None = None,
        *,
        clock: Callable[[], float] = time.time,
        stamps: HybridClock | None = None,
    ) -> None:
        """Opens and replays the log; raises `OperationError` if it is damaged."""
        self.lease = Lease()
        self._own = own
        self._links = links
        self._clock = clock
        self._stamps = stamps or HybridClock(clock)
        self._file = LogFile(path) if path.exists() else LogFile.create(path)
        self._state = bootstrap or State()
        self._applied: list[entries.Proposal | None] = []
        self._records: list[Record] = []
        self._changed = Changed()
        self._proposals_in, self._proposals = trio.open_memory_channel[_Pending](QUEUE)
        self._slots = trio.CapacityLimiter(QUEUE)
        self._sequence = 0
        for record in self._file.records:
            self._take(record)
        self._boot = self._next_boot()
        if self._file.torn:
            log.warning("catalog.torn", bytes=self._file.torn, index=self._state.index)

    def _next_boot(self) -> int:
        session = self._state.sessions.get(self._own)
        return max(time.time_ns(), session.boot + 1 if session else 0)

    @property
    def state(self) -> State:
        """What this peer knows by now; a value that never changes under its reader."""
        return self._state

    @property
    def changed(self) -> Changed:
        """Set after every applied record."""
        return self._changed

    @property
    def leads(self) -> bool:
        """Whether this peer is the coordinator."""
        return self._state.coordinator == self._own

    def found(self, mesh: str, member: entries.Member) -> None:
        """Write the first record; only on an empty log. Blocks."""
        if self._records:
            raise ValueError("the catalog is not empty")
        self._state = State()
        first = entries.Proposal(entry=entries.Found(mesh=mesh, member=member), time=self._clock())
        record = self._made(self._state, first)
        self._keep([record])
        self._take(record)

    def _keep(self, records: list[Record]) -> None:
        self._file.append(records)
        self._file.sync()

    # Reading.

    async def wait(self, predicate: Callable[[State], bool], timeout: float | None = None) -> State:
        """The first state, from now on, for which `predicate` holds; raises `OperationError(timeout)`."""
        with trio.move_on_after(float("inf") if timeout is None else timeout):
            await self._changed.wait_until(lambda: predicate(self._state))
            return self._state
        raise OperationError("timeout", f"the catalog did not come to the awaited state within {timeout:g} s")

    async def changes(
        self, after: int | None = None
    ) -> AsyncGenerator[tuple[int, entries.Proposal, State], None]:
        """Every entry applied after index `after` (default: now), for ever, with the newest state.

        A slow reader loses no entry; the state may be newer than the entry. Refused entries are left out.
        """
        position = self._state.index if after is None else after
        while True:
            while position < len(self._applied):
                proposal = self._applied[position]
                position += 1
                if proposal is not None:
                    yield position, proposal, self._state
            await self._changed.wait()

    # Proposing.

    def applied(self, request: str) -> int | None:
        """The index at which this step of a command was applied, None if it was not (or is forgotten)."""
        return self._state.requests.get(request) if request else None

    async def propose(self, entry: entries.Entry, timeout: float = 10.0, *, request: str = "") -> int:
        """Make `entry` true in the mesh; returns its index once it is durable *and applied here*.

        `request` is the step of a command (`operations.step`): one that was applied before changes nothing.

        Raises `OperationError`: the code of a refusal if it contradicts the state; `no-leader` or `timeout`
        if the coordinator did not answer (then it may still become true).
        """
        versions.check_entry(self._state, entry)
        reason = "the coordinator did not answer"
        with trio.move_on_after(timeout):
            async with self._slots:
                self._sequence += 1
                proposal = entries.Proposal(
                    entry=entry,
                    client=self._own,
                    boot=self._boot,
                    sequence=self._sequence,
                    request=request,
                    stamp=self._stamps.now(),
                )
                while True:
                    try:
                        return await self._commit(proposal)
                    except OperationError as error:
                        if error.code not in ("unreachable", "timeout", "no-leader"):
                            raise
                        reason = error.message
                    await trio.sleep(RETRY_PAUSE)
        raise OperationError(
            "no-leader",
            f"the catalog could not be changed within {timeout:g} s: {reason}",
            "is the coordinator up?",
        )

    async def _commit(self, proposal: entries.Proposal) -> int:
        """The index, once the coordinator has it on disk and this peer has applied it."""
        if self.leads:
            return await self._append(proposal)
        if not self._state.coordinator:
            raise OperationError("no-leader", "this peer does not know its mesh's coordinator yet")
        args = Propose(proposal=entries.encode(proposal))
        answer = await self._links.call(
            self._state.coordinator, "catalog.propose", args, timeout=ATTEMPT_TIMEOUT
        )
        index = int(answer["index"])
        await self._changed.wait_until(lambda: self._state.index >= index)
        return index

    @operation("catalog.propose", role="peer", args=Propose, route="coordinator")
    async def answer_proposal(self, request: Request, args: Propose) -> dict[str, int]:
        """A member's proposal; only its own, so that no peer can speak for another."""
        proposal = entries.decode(args.proposal)
        if proposal.client != request.caller.id:
            raise OperationError("forbidden", "a peer can only propose in its own name")
        if isinstance(proposal.entry, entries.Found):
            raise OperationError("forbidden", "a mesh is founded once")
        return {"index": await self._append(proposal)}

    async def _append(self, proposal: entries.Proposal) -> int:
        pending = _Pending(proposal)
        await self._proposals_in.send(pending)
        await pending.done.wait()
        if pending.error is not None:
            raise pending.error
        return pending.index

    async def _write(self) -> None:
        """The coordinator's only writer."""
        while True:
            batch = [await self._proposals.receive()]
            while len(batch) < BATCH:
                try:
                    batch.append(self._proposals.receive_nowait())
                except trio.WouldBlock:
                    break
            await self._write_batch(batch)

    async def _write_batch(self, batch: list[_Pending]) -> None:
        records: list[Record] = []
        state = self._state
        for pending in batch:
            try:
                state = self._judge(state, pending, records)
            except OperationError as error:
                pending.error = error
        try:
            if records:
                await trio.to_thread.run_sync(self._keep, records)
        except OperationError as error:
            for pending in batch:
                pending.error = pending.error or error
        else:
            for record in records:
                self._take(record)
        for pending in batch:
            pending.done.set()

    def _judge(self, state: State, pending: _Pending, records: list[Record]) -> State:
        """The state with this proposal, which gets its record; raises if it is refused."""
        proposal = pending.proposal
        known = applied_index(state, proposal.client, proposal.boot, proposal.sequence)
        if known is None and proposal.request:
            known = state.requests.get(proposal.request)
        if known is not None:
            pending.index = known
            return state
        proposal = proposal.model_copy(update={"time": max(state.time, self._clock())})
        after = apply(state, state.index + 1, proposal)
        records.append(self._made(state, proposal))
        pending.index = after.index
        return after

    @staticmethod
    def _made(state: State, proposal: entries.Proposal) -> Record:
        return Record(TERM, state.index + 1, entries.encode(proposal))

    def _take(self, record: Record) -> None:
        """Apply a durable record."""
        proposal: entries.Proposal | None = entries.decode(record.payload)
        before = self._state if self._records else State()
        try:
            assert proposal is not None
            self._stamps.witness(proposal.stamp)
            self._state = apply(before, record.index, proposal)
        except Refused:
            self._state = skip(before, record.index)
            proposal = None
        self._records.append(record)
        self._applied.append(proposal)
        self._changed.set()

    # Following.

    @operation("catalog.follow", role="peer", args=Follow, timeout=None)
    async def feed(self, request: Request, args: Follow) -> None:
        """Stream the records that a member lacks, for ever."""
        position = args.after
        if position > len(self._records):
            raise OperationError(
                "conflict",
                f"a follower has {position} records of the catalog, the coordinator {len(self._records)}",
                "the coordinator's directory was put back to an older state; restore the newest copy",
            )
        while True:
            while position < len(self._records):
                part = self._part(position)
                position += len(part)
                await request.item({"records": part})
            await self._changed.wait()

    def _part(self, position: int) -> list[list[Any]]:
        part: list[list[Any]] = []
        size = 0
        for record in self._records[position : position + 1000]:
            size += len(record.payload)
            if part and size > FOLLOW_BYTES:
                break
            part.append([record.term, record.index, record.payload])
        return part

    async def _follow(self) -> None:
        pause = RETRY_PAUSE
        while True:
            try:
                args = Follow(after=len(self._records))
                async with self._links.stream(self._state.coordinator, "catalog.follow", args) as stream:
                    async for item in stream:
                        await self._take_in(item)
                        pause = RETRY_PAUSE
            except OperationError as error:
                level = log.error if error.code in ("conflict", "failed", "no-room") else log.info
                level("catalog.follow.lost", reason=error.message, hint=error.hint)
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _take_in(self, item: dict[str, Any]) -> None:
        try:
            records = [
                Record(int(term), int(index), bytes(payload)) for term, index, payload in item["records"]
            ]
        except (KeyError, TypeError, ValueError):
            raise OperationError("failed", "the coordinator sent records that cannot be read") from None
        for place, record in enumerate(records):
            if record.index != len(self._records) + 1 + place:
                raise OperationError("failed", f"record {record.index} of the catalog came out of order")
            entries.decode(record.payload)
        await trio.to_thread.run_sync(self._keep, records)
        for record in records:
            self._take(record)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write, or follow, as long as the peer lasts."""
        task_status.started()
        if self.leads:
            await self._write()
        else:
            await self._follow()

    def close(self) -> None:
        """Close the file; nothing may be proposed any more."""
        self._file.close()
