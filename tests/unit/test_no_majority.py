# SPDX-License-Identifier: Apache-2.0
"""What needs a decision is refused as soon as it is known that nobody can decide, and waited for else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import mobid.driver
import mobid.quorum
from mobid.catalog import Catalog
from mobid.lease import boottime
from mobid.store import Store
from mobid.tasks import background
from proto import entries
from proto.api import OperationError
from proto.log import Record
from proto.peer import found
from proto.peer_events import Settings
from proto.raft import configuration
from proto.raft.configuration import Configuration
from proto.raft.events import Became, Durable
from tests.unit.identities import known

OWN, B, C = (known(name).member(name, "door") for name in ("tokyo", "virginia", "amsterdam"))
VOTERS = Configuration(voters=frozenset({OWN.id, B.id, C.id}))

Asked = Callable[[Catalog], Awaitable[Any]]


def token(id: str) -> entries.AddToken:
    return entries.AddToken(token=entries.Token(id=id, secret_hash=b"", role="peer", uses=2, expires=4e9))


def log_of_three() -> Durable:
    """A log in which three peers vote."""
    first = found(OWN.id, OWN, "m" * 16, 1.0)
    others = [token("door"), entries.AddPeer(member=B), entries.AddPeer(member=C)]
    payloads = [entries.encode(entries.Proposal(entry=entry, time=1.0)) for entry in others]
    records = [Record(1, 3 + place, payload, "command") for place, payload in enumerate(payloads)]
    voters = Record(1, 6, configuration.encode(VOTERS), "config")
    return Durable(ballot=first.ballot, records=(*first.records, *records, voters))


async def propose(catalog: Catalog) -> Any:
    return await catalog.propose(token("new"))


QUESTIONS: list[Asked] = [propose, lambda catalog: catalog.read(), lambda catalog: catalog.wait_leader(10.0)]


@pytest.fixture
def catalog(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Catalog]:
    """That of the voter tokyo, whose mesh has two others; boot time goes as trio's does."""
    begun = boottime()
    start = autojump_clock.current_time()
    for module in (mobid.quorum, mobid.driver):
        monkeypatch.setattr(module, "boottime", lambda: begun + autojump_clock.current_time() - start)
    store = Store(tmp_path / "catalog")
    store.write([log_of_three()])
    store.note_commit(6)
    store.close()
    made = Catalog(Store(tmp_path / "catalog"), OWN.id, lambda *_: None, Settings())
    made.begin()
    yield made
    made.close()


async def refusal(catalog: Catalog, asked: Asked) -> tuple[OperationError, float]:
    """The refusal of a question, and after how many seconds it came."""
    begun = trio.current_time()
    with pytest.raises(OperationError) as caught:
        await asked(catalog)
    return caught.value, trio.current_time() - begun


@pytest.mark.parametrize("asked", QUESTIONS)
async def test_with_a_majority_missing_the_answer_is_no_at_once(
    catalog: Catalog, asked: Asked, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(60.0)
    error, waited = await refusal(catalog, asked)
    assert error.code == "no-majority"
    assert "1 of 3 voters answer; missing: amsterdam (silent for 60 s), virginia" in error.message
    assert waited == 0.0


@pytest.mark.parametrize("asked", QUESTIONS)
async def test_while_others_answer_an_election_is_waited_for(
    catalog: Catalog, asked: Asked, autojump_clock: trio.testing.MockClock
) -> None:
    await trio.sleep(60.0)
    catalog.sight(B.id, "alive")
    error, waited = await refusal(catalog, asked)
    assert error.code == "no-leader"
    assert waited == 10.0


@pytest.mark.parametrize("asked", QUESTIONS)
async def test_who_waits_is_told_when_the_others_are_found_missing(
    catalog: Catalog, asked: Asked, autojump_clock: trio.testing.MockClock
) -> None:
    async with background(catalog.run):
        error, waited = await refusal(catalog, asked)
    assert error.code == "no-majority"
    assert 0.0 < waited < 10.0


@pytest.mark.parametrize("asked", QUESTIONS)
async def test_a_coordinator_that_answers_is_enough(
    catalog: Catalog, asked: Asked, autojump_clock: trio.testing.MockClock
) -> None:
    """This peer may see less of the voters than the coordinator does."""
    await trio.sleep(60.0)
    catalog.sight(B.id, "alive")
    catalog.sight(C.id, "suspect")
    catalog._deliver(Became("follower", 2, B.id))
    if asked is QUESTIONS[2]:
        assert await asked(catalog) == B.id
    else:
        error, _ = await refusal(catalog, asked)
        assert error.code == "no-leader"
