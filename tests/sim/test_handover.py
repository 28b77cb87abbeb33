# SPDX-License-Identifier: Apache-2.0
"""The handover under simulated faults: at most one copy at any time, the right one in the end."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import pytest

from proto import handover
from proto import handover_events as ev
from proto.entries import Guest, Migration
from proto.handover import DESTINATION_TABLE, SOURCE_TABLE, Destination, Source
from proto.machine import Persist, Persisted, Send, WakeAt, Woken
from proto.state import State
from tests.sim.handover_world import MIGRATION, Violation, World
from tests.sim.run import replay_command

SEEDS = 600
CHUNK = 100


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_the_right_copy_and_only_it_runs(start: int) -> None:
    for seed in range(start, start + CHUNK):
        world = World(seed)
        try:
            world.run()
        except Violation as violation:
            pytest.fail(f"{violation}; replay: {replay_command('handover', seed)}")


def test_the_simulated_faults_reach_every_outcome() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(400):
        world = World(seed)
        world.run()
        outcomes[world.log.migrations[MIGRATION].state] += 1
    assert outcomes["done"] > 50
    assert outcomes["cancelled"] > 50
    assert outcomes["failed-over"] > 2


def found(monkeypatch: pytest.MonkeyPatch, machine: type, name: str, wrong: Any) -> int:
    """How many seeds notice a planted mistake."""
    monkeypatch.setattr(machine, name, wrong)
    count = 0
    for seed in range(600):
        try:
            World(seed).run()
        except AssertionError:
            count += 1
    return count


def thaw_at_once(self: Any, event: Any, now: float) -> list[ev.Effect]:
    return [ev.Thaw(), *self._cancel(event, now)]


def refuse_on_any_doubt(self: Any, now: float) -> list[ev.Effect]:
    effects: list[ev.Effect] = self._refuse(ev.Begin(), now)
    return effects


def ready_without_a_note(self: Any, _event: Any, _now: float) -> list[ev.Effect]:
    self.state = handover.DestinationState.READY
    return [ev.ReportReady()]


def cancel_the_release(self: Any, now: float) -> list[ev.Effect]:
    effects: list[ev.Effect] = self._cancel(ev.Begin(), now)
    return effects


@pytest.mark.parametrize(
    ("machine", "name", "wrong"),
    [
        (Source, "_sent", thaw_at_once),
        (Source, "_adopted", thaw_at_once),
        (Source, "_await_log", cancel_the_release),
        (Destination, "_note", ready_without_a_note),
        (Destination, "_lose", refuse_on_any_doubt),
    ],
)
def test_the_simulation_notices_planted_mistakes(
    monkeypatch: pytest.MonkeyPatch, machine: type, name: str, wrong: Any
) -> None:
    assert found(monkeypatch, machine, name, wrong) > 0


# The tables, and a few walks through them by hand.


def migration() -> Migration:
    return Migration(id="m", guest="lab/g", guest_id="g", epoch=1, source="s", destination="d", timeout=10.0)


def test_every_row_names_an_event_and_an_action() -> None:
    for table, machine in ((SOURCE_TABLE, Source), (DESTINATION_TABLE, Destination)):
        for row in table.values():
            for event, action in row.items():
                assert hasattr(ev, event)
                assert callable(getattr(machine, "_" + action))
    assert set(SOURCE_TABLE) == set(handover.SourceState)
    assert set(DESTINATION_TABLE) == set(handover.DestinationState)


def source_in(state: handover.SourceState) -> Source:
    source = Source(migration())
    walk: list[ev.Event] = [ev.Begin(), ev.Prepared(), ev.Switch(), Persisted("m"), ev.Frozen()]
    for event in walk:
        if source.state == state:
            break
        source.handle(event, 0.0)
    assert source.state == state
    return source


def test_the_note_is_durable_before_the_freeze() -> None:
    source = source_in(handover.SourceState.PRECOPY)
    assert source.handle(ev.Switch(), 0.0) == [Persist("m", "releasing")]
    assert source.handle(Persisted("m"), 0.0) == [ev.Freeze()]


def test_a_release_that_did_not_leave_thaws_at_once() -> None:
    source = source_in(handover.SourceState.SENDING)
    effects = source.handle(ev.Sent("no"), 0.0)
    assert effects[0] == ev.Thaw()
    assert source.state == "cancelling"


@pytest.mark.parametrize("released", ["yes", "maybe"])
def test_a_release_that_may_have_left_thaws_only_by_the_log(released: ev.Released) -> None:
    source = source_in(handover.SourceState.SENDING)
    source.handle(ev.Sent(released), 0.0)
    for event in (ev.StreamBroken("x"), ev.Abort("x"), ev.Settle("m"), ev.Logged("open")):
        assert ev.Thaw() not in source.handle(event, 0.0)
    assert source.handle(ev.Logged("cancelled"), 0.0)[0] == ev.Thaw()


def test_a_source_keeps_its_copy_until_the_other_is_durable() -> None:
    source = source_in(handover.SourceState.SENDING)
    source.handle(ev.Sent("yes"), 0.0)
    assert ev.Discard() not in source.handle(ev.Logged("done"), 0.0)
    assert source.handle(ev.Durable("m"), 0.0)[0] == ev.Discard()


def test_a_source_that_waits_for_a_destination_in_vain_lets_go_once_the_guest_has_moved_on() -> None:
    source = source_in(handover.SourceState.SENDING)
    source.handle(ev.Sent("yes"), 0.0)
    source.handle(ev.Logged("done"), 0.0)
    assert source.handle(ev.Superseded(), 0.0)[0] == ev.Discard()
    assert source.state == "over"


def test_that_the_guest_has_moved_on_is_remembered_until_the_release_is_certain() -> None:
    source = source_in(handover.SourceState.SENDING)
    assert source.handle(ev.Superseded(), 0.0) == []
    source.handle(ev.Sent("maybe"), 0.0)
    assert source.handle(ev.Logged("done"), 0.0)[0] == ev.Discard()


def test_only_the_copy_of_the_moved_guest_is_its_sources_after_a_failover() -> None:
    """Another guest of that name, made later, may be in the same epoch."""
    made = migration()
    for state, epoch in (("failed-over", 3), ("cancelled", 1), ("done", 1)):
        log = State(migrations={"m": made.model_copy(update={"state": state})})
        assert handover.right_after_failover(log, made.source, made.guest_id, made.epoch) == epoch
        assert handover.right_after_failover(log, made.destination, made.guest_id, made.epoch) == 1
        assert handover.right_after_failover(log, made.source, "later", made.epoch) == 1


def test_only_a_later_right_supersedes() -> None:
    made = migration()
    guest = Guest(
        key=made.guest, id="g", image="i", memory=1 << 26, owner=made.destination, epoch=made.epoch + 1
    )
    assert not handover.is_superseded(made, guest)
    assert handover.is_superseded(made, guest.model_copy(update={"epoch": made.epoch + 2}))
    assert handover.is_superseded(made, guest.model_copy(update={"id": "later"}))
    assert handover.is_superseded(made, None)


def destination_ready() -> Destination:
    destination = Destination(migration())
    for event in (ev.Begin(), ev.Prepared(), Persisted("m")):
        destination.handle(event, 0.0)
    assert destination.state == "ready"
    return destination


def test_a_destination_is_ready_only_after_its_note() -> None:
    destination = Destination(migration())
    assert destination.handle(ev.Begin(), 0.0) == [ev.Prepare()]
    assert destination.handle(ev.Prepared(), 0.0) == [Persist("m", "incoming")]
    assert destination.handle(Persisted("m"), 0.0) == [ev.ReportReady()]


def test_unequal_roots_are_refused_durably() -> None:
    destination = destination_ready()
    assert destination.handle(ev.Received(False), 0.0) == [Persist("m", "refused")]
    assert destination.handle(Persisted("m"), 0.0) == [ev.Discard()]
    assert isinstance(destination.handle(ev.Discarded(), 0.0)[0], ev.Refuse)


def test_a_lost_copy_is_never_refused_nor_called_durable() -> None:
    destination = Destination(migration())
    effects = destination.handle(ev.Adopted("incoming", "none"), 0.0)
    assert destination.state == "lost"
    effects += destination.handle(ev.Logged("done"), 0.0)
    assert not any(isinstance(effect, ev.Refuse | ev.Sync) for effect in effects)


@pytest.mark.parametrize("copy", ["running", "frozen"])
def test_what_runs_is_not_refused_by_a_log_that_is_behind(copy: Literal["running", "frozen"]) -> None:
    """The peer died between taking its note away, as all was done, and giving the guest to its keeper."""
    destination = Destination(migration())
    effects = destination.handle(ev.Adopted(None, copy), 0.0)
    assert not any(isinstance(effect, Persist | ev.Discard) for effect in effects)
    assert destination.handle(ev.Logged("done"), 0.0) == [ev.Sync()]


def test_a_lease_bound_guest_waits_for_its_lease() -> None:
    destination = Destination(migration(), lease_bound=True)
    for event in (ev.Begin(), ev.Prepared(), Persisted("m")):
        destination.handle(event, 0.0)
    assert destination.handle(ev.Received(True), 0.0) == []
    assert destination.handle(ev.LeaseValid(), 0.0) == [ev.Start()]


def test_the_coordinator_asks_both_sides_to_settle_by_no_clock_but_its_own() -> None:
    """A handover opened by a peer whose wall clock is days ahead ends like every other."""
    now = 77.0
    coordinator = handover.Coordinator(migration(), failover=False)
    (wake,) = coordinator.handle(ev.Begin(), now)
    assert wake == WakeAt("m", now + migration().timeout)
    settle, again = ev.Settle("m"), WakeAt("m", wake.at + handover.RETRY)
    assert coordinator.handle(Woken("m"), wake.at) == [Send("s", settle), Send("d", settle), again]


def test_the_coordinator_fails_over_only_what_a_lease_binds() -> None:
    for bound in (False, True):
        coordinator = handover.Coordinator(migration(), failover=bound)
        coordinator.handle(ev.Begin(), 0.0)
        assert bool(coordinator.handle(ev.PeerLost(), 0.0)) is bound
    assert handover.Coordinator(migration(), False).handle(ev.Adopt(), 0.0)
