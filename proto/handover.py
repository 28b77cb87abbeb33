# SPDX-License-Identifier: Apache-2.0
"""The handover: how the right to run a guest moves from one peer to another, whatever fails on the way.

Three machines, one per place and migration. *Source* has the guest, *Destination* shall get it, *Coordinator*
watches that it comes to an end. What binds them is the log: `Handover` opens a migration, `Done`, `Cancel` or
`Failover` closes it, whichever is first. The rules that everything below serves:

1. Until the source hands `Release` to the stream, it alone decides and may thaw. Before the freeze it notes
   durably that it is about to release; a source that restarts with that note and a frozen guest cannot know
   whether the release left, and thaws only when the log says so.
2. After the release the source stays frozen until the log says `Done` (then its copy is only kept until the
   destination's is durable, or the log has removed the guest or sent it on: the destination may be gone for
   good), `Cancel` (which then carries the destination's signed refusal) or `Failover`.
3. The destination runs when all of the state is there with an equal root, the release came, and, for guests
   bound to a lease, its lease is valid. It asks nobody at that moment: no round trip stands in the downtime.
4. It refuses only what it never ran, and notes the refusal durably before anybody hears of it. So it notes
   "incoming" before it says that it is ready: a destination that restarts with that note and without a copy
   cannot know whether it ran, and says that the copy is lost instead.

An event that a state's row does not name is of no meaning there and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

from proto.entries import Cancel, Done, Failover, Guest, HandoverState, Migration
from proto.handover_events import (
    Abort,
    Adopt,
    Adopted,
    AskDurable,
    Begin,
    CancelStream,
    CopyLost,
    Discard,
    Durable,
    Effect,
    Event,
    Freeze,
    FreezeFailed,
    Logged,
    Note,
    Over,
    PeerLost,
    Prepare,
    Propose,
    Received,
    Refuse,
    ReportReady,
    SendFinal,
    Sent,
    Settle,
    Start,
    StartFailed,
    StreamBroken,
    Superseded,
    Sync,
    Synced,
    Thaw,
)
from proto.machine import Persist, Send, WakeAt, Woken
from proto.state import State

RETRY = 1.0
"""Seconds between two attempts at something that must come true."""


class SourceState(StrEnum):
    """Where the source is; the guest runs here unless the comment says otherwise."""

    START = "start"
    PREPARING = "preparing"  # the destination gets ready
    PRECOPY = "precopy"  # passes
    NOTING = "noting"  # "releasing" is being made durable
    FREEZING = "freezing"
    SENDING = "sending"  # frozen: last difference, root, release
    CANCELLING = "cancelling"  # wants Cancel in the log
    RELEASED = "released"  # frozen: only the log decides
    KEPT = "kept"  # frozen: the guest runs at the destination, whose copy is not durable yet
    OVER = "over"


class DestinationState(StrEnum):
    """Where the destination is; nothing runs here unless the comment says otherwise."""

    START = "start"
    PREPARING = "preparing"  # process, devices and streams
    NOTING = "noting"  # "incoming" is being made durable
    READY = "ready"  # pages arrive
    SETTLING = "settling"  # closing the stream, unless the release was first
    WAITING = "waiting"  # all is here but a valid lease
    STARTING = "starting"  # told to run
    RUNNING = "running"  # runs; wants Done in the log
    SYNCING = "syncing"  # runs and owns; makes its copy durable
    REFUSING = "refusing"  # "refused" is being made durable
    DISCARDING = "discarding"
    REFUSED = "refused"  # wants Cancel in the log
    LOST = "lost"  # it may have run here and is gone; wants Failover in the log
    OVER = "over"


S, D = SourceState, DestinationState

SOURCE_TABLE: Mapping[SourceState, Mapping[str, str]] = {
    S.START: {"Begin": "begin", "Adopted": "adopted"},
    S.PREPARING: {"Prepared": "precopy", "Abort": "cancel", "StreamBroken": "cancel", "Settle": "cancel"},
    S.PRECOPY: {"Switch": "note", "Abort": "cancel", "StreamBroken": "cancel", "Settle": "cancel"},
    S.NOTING: {"Persisted": "freeze", "Abort": "cancel", "StreamBroken": "cancel", "Settle": "cancel"},
    S.FREEZING: {
        "Frozen": "send",
        "FreezeFailed": "cancel",
        "Abort": "remember",
        "StreamBroken": "remember",
        "Settle": "remember",
    },
    S.SENDING: {"Sent": "sent", "Abort": "cut", "Settle": "cut"},
    S.CANCELLING: {"Woken": "propose_cancel"},
    S.RELEASED: {"Woken": "ask_to_settle"},
    S.KEPT: {"Woken": "ask_durable", "Durable": "let_go"},
    S.OVER: {},
}
"""What the source does on which event; `Logged` and `Superseded` count in every state (`handle`)."""

DESTINATION_TABLE: Mapping[DestinationState, Mapping[str, str]] = {
    D.START: {"Begin": "begin", "Adopted": "adopted"},
    D.PREPARING: {"Prepared": "note", "Abort": "give_up", "StreamBroken": "give_up", "Settle": "give_up"},
    D.NOTING: {"Persisted": "ready", "Abort": "remember", "StreamBroken": "remember", "Settle": "remember"},
    D.READY: {"Received": "received", "StreamBroken": "refuse", "Abort": "settle", "Settle": "settle"},
    D.SETTLING: {"Received": "received", "StreamBroken": "refuse"},
    D.WAITING: {"LeaseValid": "start", "Abort": "refuse", "Settle": "refuse"},
    D.STARTING: {"Started": "started", "StartFailed": "start_failed"},
    D.RUNNING: {"Woken": "propose_done"},
    D.SYNCING: {"Synced": "synced", "Woken": "sync"},
    D.REFUSING: {"Persisted": "discard"},
    D.DISCARDING: {"Discarded": "propose_refusal"},
    D.REFUSED: {"Woken": "propose_refusal"},
    D.LOST: {"Woken": "report_lost"},
    D.OVER: {},
}
"""What the destination does on which event; `Logged` is handled by `logged` in every state."""


def is_superseded(migration: Migration, guest: Guest | None) -> bool:
    """Whether the right that this migration gives is not the last one for its guest. `guest` is what the
    catalog has under its name now."""
    return guest is None or guest.id != migration.guest_id or guest.epoch > migration.epoch + 1


def right_after_failover(state: State, peer: str, id: str, epoch: int) -> int:
    """The epoch by which `peer` has its copy of the guest `id`, which was made by the right `epoch`.

    It is a later one if a handover from there has failed over: nobody else's right is left,
    and the source's copy is the guest, whether the source ever knew that the handover was open or not.
    """
    failed = (
        migration
        for migration in state.migrations.values()
        if migration.state == "failed-over" and (migration.source, migration.guest_id) == (peer, id)
    )
    return epoch + 2 if any(migration.epoch == epoch for migration in failed) else epoch


def _reason(event: Event) -> str:
    match event:
        case Abort(reason) | StreamBroken(reason) | FreezeFailed(reason) | StartFailed(reason=reason):
            return reason
        case Settle():
            return "the time of the handover is over"
        case _:
            return ""


class _Machine:
    """What source and destination share: the table, the note, the retry."""

    def __init__(self, migration: Migration) -> None:
        self.migration = migration
        self.reason = ""
        """Why it came to nothing, if it did."""
        self._given_up = False
        self._log: HandoverState = "open"

    def _run(self, row: Mapping[str, str], event: Event, now: float) -> list[Effect]:
        name = row.get(type(event).__name__)
        if name is None:
            return []
        action: Callable[[Event, float], list[Effect]] = getattr(self, "_" + name)
        return action(event, now)

    def _persist(self, note: Note | None) -> Persist:
        return Persist(self.migration.id, note)

    def _again(self, now: float) -> WakeAt:
        return WakeAt(self.migration.id, now + RETRY)

    def _because(self, event: Event) -> None:
        self.reason = self.reason or _reason(event)

    def _remember(self, event: Event, _now: float) -> list[Effect]:
        """Something is under way that cannot be stopped; give up as soon as it has answered."""
        self._given_up = True
        self._because(event)
        return []


class Source(_Machine):
    """The machine at the peer where the guest runs."""

    def __init__(self, migration: Migration) -> None:
        super().__init__(migration)
        self.state = SourceState.START
        self._superseded = False

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; return the effects in order."""
        if isinstance(event, Logged):
            return self._logged(event.state, now)
        if isinstance(event, Superseded):
            self._superseded = True
            return self._let_go(event, now) if self.state == SourceState.KEPT else []
        return self._run(SOURCE_TABLE[self.state], event, now)

    def _begin(self, _event: Event, _now: float) -> list[Effect]:
        self.state = SourceState.PREPARING
        return [Prepare()]

    def _adopted(self, event: Event, now: float) -> list[Effect]:
        assert isinstance(event, Adopted)
        if event.note == "releasing" and event.copy != "running":
            return self._await_log(now)
        self.reason = "the source's peer was restarted"
        return self._cancel(event, now)

    def _precopy(self, _event: Event, _now: float) -> list[Effect]:
        self.state = SourceState.PRECOPY
        return []

    def _note(self, _event: Event, _now: float) -> list[Effect]:
        self.state = SourceState.NOTING
        return [self._persist("releasing")]

    def _freeze(self, _event: Event, _now: float) -> list[Effect]:
        self.state = SourceState.FREEZING
        return [Freeze()]

    def _send(self, event: Event, now: float) -> list[Effect]:
        if self._given_up or self._log != "open":
            return [Thaw(), *self._cancel(event, now)]
        self.state = SourceState.SENDING
        return [SendFinal()]

    def _cut(self, event: Event, _now: float) -> list[Effect]:
        """If the release is not on its way yet, it never will be; `Sent` tells."""
        self._because(event)
        return [CancelStream()]

    def _sent(self, event: Event, now: float) -> list[Effect]:
        assert isinstance(event, Sent)
        if event.released == "no":
            self.reason = self.reason or "the stream broke before the release"
            return [Thaw(), *self._cancel(event, now)]
        return self._await_log(now)

    def _cancel(self, event: Event, now: float) -> list[Effect]:
        """The guest runs, and nothing was released: say so in the log."""
        self._because(event)
        self.state = SourceState.CANCELLING
        if self._log != "open":
            return [CancelStream(), *self._end()]
        return [CancelStream(), *self._propose_cancel(event, now)]

    def _propose_cancel(self, _event: Event, now: float) -> list[Effect]:
        entry = Cancel(migration=self.migration.id, by=self.migration.source, reason=self.reason)
        return [Propose(entry), self._again(now)]

    def _await_log(self, now: float) -> list[Effect]:
        """The release may have left: the guest stays frozen until the log says what became of it."""
        self.state = SourceState.RELEASED
        if self._log != "open":
            return self._logged(self._log, now)
        return [self._again(now)]

    def _ask_to_settle(self, _event: Event, now: float) -> list[Effect]:
        return [Send(self.migration.destination, Settle(self.migration.id)), self._again(now)]

    def _ask_durable(self, _event: Event, now: float) -> list[Effect]:
        return [Send(self.migration.destination, AskDurable(self.migration.id)), self._again(now)]

    def _let_go(self, _event: Event, _now: float) -> list[Effect]:
        return [Discard(), *self._end()]

    def _logged(self, state: HandoverState, now: float) -> list[Effect]:
        self._log = state
        if state == "open":
            return []
        match self.state:
            case SourceState.RELEASED if state == "done":
                self.state = SourceState.KEPT
                after = self._let_go if self._superseded else self._ask_durable
                return after(Logged(state), now)
            case SourceState.RELEASED:
                return [Thaw(), *self._end()]
            case SourceState.PREPARING | SourceState.PRECOPY | SourceState.NOTING:
                self.reason = self.reason or "the handover was ended from elsewhere"
                return [CancelStream(), *self._end()]
            case SourceState.CANCELLING:
                return self._end()
        return []  # freezing and sending look at the log when they are done

    def _end(self) -> list[Effect]:
        self.state = SourceState.OVER
        return [self._persist(None), Over(self._log, self.reason)]


class Destination(_Machine):
    """The machine at the peer where the guest shall run. `lease_bound` guests wait for a valid lease."""

    def __init__(self, migration: Migration, lease_bound: bool = False) -> None:
        super().__init__(migration)
        self.state = DestinationState.START
        self._lease_bound = lease_bound

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; return the effects in order."""
        if isinstance(event, Logged):
            return self._logged(event.state)
        return self._run(DESTINATION_TABLE[self.state], event, now)

    def _begin(self, _event: Event, _now: float) -> list[Effect]:
        self.state = DestinationState.PREPARING
        return [Prepare()]

    def _adopted(self, event: Event, now: float) -> list[Effect]:
        assert isinstance(event, Adopted)
        self.reason = "the destination's peer was restarted"
        if event.note == "incoming" and event.copy == "none":
            return self._lose(now)
        if event.note != "refused" and event.copy in ("running", "frozen"):
            # Without a note it is not only running but done; the log, as known here, may be behind.
            return self._started(event, now)
        return self._refuse(event, now)

    def _give_up(self, event: Event, _now: float) -> list[Effect]:
        """Not ready yet, so nothing can have been released: the source will cancel."""
        self._because(event)
        self.state = DestinationState.OVER
        return [CancelStream(), Discard(), Over(self._log, self.reason)]

    def _note(self, _event: Event, _now: float) -> list[Effect]:
        self.state = DestinationState.NOTING
        return [self._persist("incoming")]

    def _ready(self, event: Event, now: float) -> list[Effect]:
        if self._given_up:
            return [CancelStream(), *self._refuse(event, now)]
        self.state = DestinationState.READY
        return [ReportReady()]

    def _settle(self, event: Event, _now: float) -> list[Effect]:
        self._because(event)
        self.state = DestinationState.SETTLING
        return [CancelStream()]

    def _received(self, event: Event, now: float) -> list[Effect]:
        assert isinstance(event, Received)
        if not event.match:
            self.reason = "what arrived is not what was sent: the roots differ"
            return self._refuse(event, now)
        if self._lease_bound:
            self.state = DestinationState.WAITING
            return []
        return self._start(event, now)

    def _start(self, _event: Event, _now: float) -> list[Effect]:
        self.state = DestinationState.STARTING
        return [Start()]

    def _started(self, event: Event, now: float) -> list[Effect]:
        self.reason = ""
        self.state = DestinationState.RUNNING
        return self._propose_done(event, now)

    def _propose_done(self, _event: Event, now: float) -> list[Effect]:
        return [Propose(Done(migration=self.migration.id)), self._again(now)]

    def _start_failed(self, event: Event, now: float) -> list[Effect]:
        assert isinstance(event, StartFailed)
        self._because(event)
        return self._lose(now) if event.ran else self._refuse(event, now)

    def _sync(self, _event: Event, _now: float) -> list[Effect]:
        return [Sync()]

    def _synced(self, event: Event, now: float) -> list[Effect]:
        assert isinstance(event, Synced)
        if not event.ok:
            return [self._again(now)]
        return [Send(self.migration.source, Durable(self.migration.id)), *self._end()]

    def _refuse(self, event: Event, _now: float) -> list[Effect]:
        """It never ran here; make sure that it never will, and only then say so."""
        self._because(event)
        self.state = DestinationState.REFUSING
        return [self._persist("refused")]

    def _discard(self, _event: Event, _now: float) -> list[Effect]:
        self.state = DestinationState.DISCARDING
        return [Discard()]

    def _propose_refusal(self, _event: Event, now: float) -> list[Effect]:
        self.state = DestinationState.REFUSED
        return [Refuse(self.reason), self._again(now)]

    def _lose(self, now: float) -> list[Effect]:
        self.state = DestinationState.LOST
        return self._report_lost(Begin(), now)

    def _report_lost(self, _event: Event, now: float) -> list[Effect]:
        return [Send("", CopyLost(self.migration.id)), self._again(now)]

    def _logged(self, state: HandoverState) -> list[Effect]:
        self._log = state
        if state == "open" or self.state == DestinationState.OVER:
            return []
        if state == "done" and self.state == DestinationState.LOST:
            return self._end()  # and never report it durable
        if state == "done":
            self.state = DestinationState.SYNCING
            return [Sync()]
        self.reason = self.reason or "the handover was ended from elsewhere"
        return [CancelStream(), Discard(), *self._end()]

    def _end(self) -> list[Effect]:
        self.state = DestinationState.OVER
        return [self._persist(None), Over(self._log, self.reason)]


class Coordinator:
    """Sees to it that an open handover ends; runs at the coordinator, one per open migration.

    `failover`: the guest is bound to a lease, so that its destination's silence for a lease and a margin
    proves that it does not run there. For other guests only the destination's word or an operator's counts.
    `now` is of a clock that never jumps: wall clocks may be wrong by days.
    """

    def __init__(self, migration: Migration, failover: bool) -> None:
        self.migration = migration
        self.over = False
        self._failover = failover
        self._failing = ""

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; return the effects in order."""
        if self.over:
            return []
        match event:
            case Begin():
                return [WakeAt(self.migration.id, now + self.migration.timeout)]
            case Logged(state) if state != "open":
                self.over = True
                return [Over(state, self._failing)]
            case CopyLost():
                return self._fail_over("the destination lost its copy", now)
            case Adopt():
                return self._fail_over("an operator said so", now)
            case PeerLost() if self._failover:
                return self._fail_over("the destination's lease ran out", now)
            case Woken() if self._failing:
                return self._fail_over(self._failing, now)
            case Woken():
                settle = Settle(self.migration.id)
                peers = (self.migration.source, self.migration.destination)
                return [*(Send(peer, settle) for peer in peers), WakeAt(self.migration.id, now + RETRY)]
        return []

    def _fail_over(self, reason: str, now: float) -> list[Effect]:
        self._failing = reason
        entry = Failover(migration=self.migration.id, reason=reason)
        return [Propose(entry), WakeAt(self.migration.id, now + RETRY)]
