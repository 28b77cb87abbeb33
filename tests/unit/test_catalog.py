# SPDX-License-Identifier: Apache-2.0
"""The catalog as a function of its log: deterministic, all or nothing, and one right to run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import entries as e
from proto.api import OperationError
from proto.catalog import Refused, State, apply, skip
from proto.state import REQUESTS, SESSION_WINDOW
from tests.unit.identities import known

A, B, C = known("a"), known("b"), known("c")
FOUND = e.Found(mesh="m" * 16, member=A.member("tokyo"))


def run(state: State, *steps: e.Entry, client: str = "", time: float = 0.0) -> State:
    for entry in steps:
        index = state.index + 1
        state = apply(state, index, e.Proposal(entry=entry, client=client, sequence=index, time=time))
    return state


def token(id: str = "t", role: Any = "peer", uses: int = 5, expires: float = 100.0) -> e.AddToken:
    return e.AddToken(token=e.Token(id=id, secret_hash=b"h", role=role, uses=uses, expires=expires))


def guest(key: str = "lab/vm", owner: str = A.id, **more: Any) -> e.Guest:
    return e.Guest(key=key, id=key.replace("/", ""), image="mini", memory=64 << 20, owner=owner, **more)


@pytest.fixture
def mesh() -> State:
    """Three peers and a guest at tokyo."""
    members = (e.AddPeer(member=B.member("virginia", "t")), e.AddPeer(member=C.member("amsterdam", "t")))
    return run(State(), FOUND, token(), *members, e.AddGuest(guest=guest()))


def refused(state: State, entry: e.Entry, words: str, client: str = "", time: float = 0.0) -> OperationError:
    with pytest.raises(Refused, match=words) as caught:
        run(state, entry, client=client, time=time)
    return caught.value


HANDOVER = e.Handover(
    migration="1" * 32, guest="lab/vm", epoch=1, source=A.id, destination=B.id, timeout=50.0
)


# Members, users, tokens.


def test_the_first_entry_founds_the_mesh() -> None:
    refused(State(), token(), "must found the mesh")
    state = run(State(), FOUND, time=7.0)
    assert (state.mesh, state.time, list(state.members)) == ("m" * 16, 7.0, [A.id])
    refused(state, FOUND, "belongs to mesh")


def test_a_token_is_spent_by_what_it_admits() -> None:
    state = run(State(), FOUND, token(uses=1), e.AddPeer(member=B.member("virginia", "t")))
    assert state.tokens["t"].uses == 0
    refused(state, e.AddPeer(member=C.member("amsterdam", "t")), "is spent")


@pytest.mark.parametrize(
    ("prepared", "time", "words"),
    [
        ([], 0.0, "not known"),
        ([token(expires=10.0)], 10.0, "has expired"),
        ([token(), e.RevokeToken(token="t")], 0.0, "was revoked"),
        ([token(role="admin")], 0.0, "is a user's"),
    ],
)
def test_a_bad_token_admits_nobody(prepared: list[e.Entry], time: float, words: str) -> None:
    state = run(State(), FOUND, *prepared)
    error = refused(state, e.AddPeer(member=B.member("virginia", "t")), words, time=time)
    assert error.code == "unauthenticated"


def test_time_within_a_log_never_goes_back_so_an_expired_token_stays_expired() -> None:
    state = run(State(), FOUND, token(expires=10.0))
    state = run(state, token("u"), time=20.0)
    refused(state, e.AddPeer(member=B.member("virginia", "t")), "has expired", time=5.0)


def test_the_role_of_a_user_is_the_token_s() -> None:
    user = e.User(id=B.id, name="ann", role="admin", certificate=B.certificate, token="t")
    state = run(State(), FOUND, token(role="viewer"), e.AddUser(user=user))
    assert state.users[B.id].role == "viewer"
    refused(state, e.AddPeer(member=B.member("x", "t")), "belongs to user ann")


def test_names_and_keys_are_taken_once(mesh: State) -> None:
    refused(mesh, e.AddPeer(member=known("d").member("tokyo", "t")), "a peer named tokyo already")
    refused(mesh, e.AddPeer(member=B.member("other", "t")), "is a member already")
    forged = B.member("forged", "t").model_copy(update={"id": "0" * 16})
    refused(mesh, e.AddPeer(member=forged), "does not belong to id")


def test_a_peer_with_guests_leaves_only_by_force(mesh: State) -> None:
    mesh = run(mesh, e.AddGuest(guest=guest("lab/other", B.id)))
    assert refused(mesh, e.RemovePeer(peer=B.id), "still has guests: lab/other").hint
    mesh = run(mesh, e.RemovePeer(peer=B.id, force=True))
    assert mesh.members[B.id].status == "left"
    assert mesh.guests["lab/other"].state == "lost"
    with pytest.raises(OperationError, match="there is no peer 'virginia'"):
        mesh.find_peer("virginia")
    alone = run(mesh, e.RemovePeer(peer=A.id, force=True))
    refused(alone, e.RemovePeer(peer=C.id, force=True), "is the only peer of its mesh")


def test_a_peer_that_a_guest_is_coming_to_leaves_only_by_force(mesh: State) -> None:
    """The guest may run there already; without its record of that the source's older copy would go on."""
    mesh = run(mesh, HANDOVER)
    refused(mesh, e.RemovePeer(peer=B.id), "lab/vm is being moved to virginia")
    evicted = run(mesh, e.RemovePeer(peer=B.id, force=True))
    hint = refused(evicted, e.SetWanted(guest="lab/vm", wanted="stopped"), "is being moved to virginia").hint
    assert hint is not None
    assert "mobictl vm adopt lab/vm" in hint
    run(evicted, e.Failover(migration=HANDOVER.migration, reason="an operator said so"))


# Looking up.


def test_references(mesh: State) -> None:
    mesh = run(mesh, e.AddGuest(guest=guest("zoo/vm")), e.AddGuest(guest=guest("zoo/cat")))
    assert mesh.find_peer("tokyo").id == mesh.find_peer(A.id).id == mesh.find_peer(A.id[:6]).id == A.id
    assert mesh.find_guest("cat").key == "zoo/cat"
    assert mesh.find_guest("lab/vm").key == "lab/vm"
    with pytest.raises(OperationError, match="lab/vm, zoo/vm") as caught:
        mesh.find_guest("vm")
    assert caught.value.code == "ambiguous"
    with pytest.raises(OperationError, match="there is no guest 'dog'") as caught:
        mesh.find_guest("dog")
    assert "zoo/cat" in caught.value.hint


# Labs and networks.


def test_network_ids_are_given_by_the_catalog_and_not_reused_at_once(mesh: State) -> None:
    def net(name: str) -> e.PutNetwork:
        return e.PutNetwork(network=e.Network(key=f"lab:{name}", lab="lab", kind="network"))

    mesh = run(mesh, net("one"), net("two"), e.RemoveNetwork(network="lab:two"), net("three"))
    assert {network.key: network.id for network in mesh.networks.values()} == {"lab:one": 1, "lab:three": 3}


def test_a_lab_goes_after_all_that_is_in_it(mesh: State) -> None:
    mesh = run(mesh, e.PutLab(lab=e.Lab(name="lab", model={"name": "lab"})))
    refused(mesh, e.PutLab(lab=e.Lab(name="lab", model={})), "a lab lab already")
    refused(mesh, e.RemoveLab(lab="lab"), "still has lab/vm")
    assert not run(mesh, e.RemoveGuest(guest="lab/vm"), e.RemoveLab(lab="lab")).labs


def test_a_lab_that_was_changed_meanwhile_is_not_replaced(mesh: State) -> None:
    lab = e.Lab(name="lab", model={"name": "lab"})
    mesh = run(mesh, e.PutLab(lab=lab), e.PutLab(lab=lab, replace=True, revision=1))
    assert mesh.labs["lab"].revision == 2
    refused(mesh, e.PutLab(lab=lab, replace=True, revision=1), "changed meanwhile")


def test_a_network_changes_and_keeps_its_id(mesh: State) -> None:
    network = e.Network(key="lab:lan", lab="lab", kind="network", members=(("lab/vm", "eth1"),))
    refused(mesh, e.ChangeNetwork(network=network), "no network lab:lan")
    mesh = run(mesh, e.PutNetwork(network=network))
    bigger = network.model_copy(update={"members": (*network.members, ("lab/b", "eth1")), "mtu": 1300})
    changed = run(mesh, e.ChangeNetwork(network=bigger)).networks["lab:lan"]
    assert (changed.id, changed.mtu, len(changed.members)) == (mesh.networks["lab:lan"].id, 1300, 2)
    wrong = bigger.model_copy(update={"impairments": (e.Impairment(),)})
    refused(mesh, e.ChangeNetwork(network=wrong), "one impairment per member")


def test_what_is_asked_of_a_guest_changes_but_not_while_it_moves(mesh: State) -> None:
    changed = run(mesh, e.ChangeGuest(guest="lab/vm", memory=96 << 20, env={"A": "b"})).guests["lab/vm"]
    before = mesh.guests["lab/vm"]
    assert changed == before.model_copy(update={"memory": 96 << 20, "env": {"A": "b"}})
    nowhere = e.Interface(name="eth1", mac="02:00:00:00:00:01", network="lab:none")
    refused(mesh, e.ChangeGuest(guest="lab/vm", interfaces=(nowhere,)), "no network lab:none")
    refused(run(mesh, HANDOVER), e.ChangeGuest(guest="lab/vm", cpus=2), "is being moved")


def test_a_peer_that_drains_gets_no_guest_that_rests(mesh: State) -> None:
    mesh = run(mesh, e.DrainPeer(peer=B.id, draining=True))
    refused(mesh, e.MoveGuest(guest="lab/vm", epoch=1, owner=B.id), "is being drained")
    assert run(mesh, e.MoveGuest(guest="lab/vm", epoch=1, owner=C.id)).guests["lab/vm"].owner == C.id


def test_a_batch_is_all_or_nothing(mesh: State) -> None:
    bad = e.Batch(entries=(e.SetWanted(guest="lab/vm", wanted="stopped"), e.RemoveGuest(guest="lab/none")))
    refused(mesh, bad, "there is no guest lab/none")
    assert mesh.guests["lab/vm"].wanted == "running"
    refused(mesh, e.Batch(entries=(e.Batch(entries=()),)), "cannot hold another batch")


# The right to run.


def test_a_report_of_another_epoch_is_refused(mesh: State) -> None:
    mesh = run(mesh, e.Report(guest="lab/vm", owner=A.id, epoch=1, state="running", started=3.0), time=4.0)
    assert (mesh.guests["lab/vm"].state, mesh.guests["lab/vm"].state_since) == ("running", 4.0)
    refused(mesh, e.Report(guest="lab/vm", owner=A.id, epoch=2, state="running"), "in epoch 1")
    refused(mesh, e.Report(guest="lab/vm", owner=B.id, epoch=1, state="running"), "belongs to tokyo")


def test_a_handover_moves_the_right_to_run_once(mesh: State) -> None:
    mesh = run(mesh, HANDOVER)
    refused(mesh, HANDOVER.model_copy(update={"migration": "2" * 32}), "is being moved to virginia")
    refused(mesh, e.RemoveGuest(guest="lab/vm"), "is being moved")
    refused(mesh, e.Done(migration="1" * 32), "only the destination", client=A.id)
    mesh = run(mesh, e.Done(migration="1" * 32), client=B.id)
    moved = mesh.guests["lab/vm"]
    assert (moved.owner, moved.epoch, moved.state) == (B.id, 2, "running")
    refused(mesh, e.Done(migration="1" * 32), "is done already", client=B.id)
    again = HANDOVER.model_copy(update={"source": B.id, "destination": A.id, "epoch": 2})
    refused(mesh, again, "its token is spent")


def test_a_cancel_after_a_release_needs_the_destination_s_signature(mesh: State) -> None:
    mesh = run(mesh, HANDOVER)
    bare = e.Cancel(migration="1" * 32, by=B.id)
    refused(mesh, bare, "only its source", client=B.id)
    text = e.refusal_text("1" * 32, "lab/vm", 1)
    forged = bare.model_copy(update={"refusal": C.key.sign(text)})
    refused(mesh, forged, "not signed by virginia", client=B.id)
    signed = bare.model_copy(update={"refusal": B.key.sign(text)})
    closed = run(mesh, signed, client=A.id)
    assert closed.migrations["1" * 32].state == "cancelled"
    assert (closed.guests["lab/vm"].owner, closed.guests["lab/vm"].epoch) == (A.id, 1)
    assert run(mesh, e.Cancel(migration="1" * 32, by=A.id), client=A.id).open_migration("lab/vm") is None


def test_a_failover_outdates_the_destination(mesh: State) -> None:
    mesh = run(mesh, HANDOVER, e.Failover(migration="1" * 32))
    assert (mesh.guests["lab/vm"].owner, mesh.guests["lab/vm"].epoch) == (A.id, 3)
    refused(mesh, e.Done(migration="1" * 32), "is failed-over already", client=B.id)


def test_what_the_source_gets_back_is_bound_to_no_lease_before_it_was_made_anew(mesh: State) -> None:
    """It is the copy that the source froze, which was begun before its policy was changed."""
    mesh = run(mesh, e.ChangeGuest(guest="lab/vm", on_partition="freeze"), HANDOVER)
    assert run(mesh, e.Done(migration="1" * 32), client=B.id).guests["lab/vm"].held_to == "freeze"
    mesh = run(mesh, e.Failover(migration="1" * 32))
    assert (mesh.guests["lab/vm"].epoch, mesh.guests["lab/vm"].held_to) == (3, "run")


steps = st.lists(
    st.tuples(
        st.sampled_from(["handover", "done", "cancel", "failover", "move", "report"]),
        st.sampled_from([A, B, C]),
        st.sampled_from([A, B, C]),
        st.integers(1, 4),
    ),
    max_size=25,
)


@given(steps)
def test_whatever_is_tried_each_epoch_has_one_owner(tried: list[Any]) -> None:
    members = (e.AddPeer(member=B.member("virginia", "t")), e.AddPeer(member=C.member("amsterdam", "t")))
    state = run(State(), FOUND, token(), *members, e.AddGuest(guest=guest()))
    owners = {1: A.id}
    for place, (what, one, other, drawn) in enumerate(tried):
        now = state.guests["lab/vm"]
        epoch = now.epoch if drawn == 1 else drawn
        id = next((m.id for m in state.migrations.values() if m.state == "open"), "none")
        entry: e.Entry = {
            "handover": e.Handover(
                migration=str(place),
                guest="lab/vm",
                epoch=epoch,
                source=now.owner,
                destination=other.id,
                timeout=9.0,
            ),
            "done": e.Done(migration=id),
            "cancel": e.Cancel(migration=id, by=one.id),
            "failover": e.Failover(migration=id),
            "move": e.MoveGuest(guest="lab/vm", epoch=epoch, owner=other.id),
            "report": e.Report(guest="lab/vm", owner=one.id, epoch=epoch, state="stopped"),
        }[what]
        try:
            state = run(state, entry, client=one.id)
        except Refused:
            continue
        after = state.guests["lab/vm"]
        assert after.epoch >= now.epoch
        assert owners.setdefault(after.epoch, after.owner) == after.owner
        assert sum(m.state == "open" for m in state.migrations.values()) <= 1


# Exactly once, and the same everywhere.


def test_a_proposal_sent_twice_is_applied_once(mesh: State) -> None:
    proposal = e.Proposal(entry=token("once"), client=B.id, boot=5, sequence=1)
    mesh = apply(mesh, mesh.index + 1, proposal)
    again = apply(mesh, mesh.index + 1, proposal)
    assert again.tokens is mesh.tokens
    assert again.index == mesh.index + 1
    with pytest.raises(Refused, match="earlier start"):
        apply(mesh, mesh.index + 1, proposal.model_copy(update={"boot": 4, "sequence": 9}))


def test_only_the_last_proposals_are_remembered(mesh: State) -> None:
    for sequence in range(1, 3 * SESSION_WINDOW):
        entry = e.SetWanted(guest="lab/vm", wanted="running")
        proposal = e.Proposal(entry=entry, client=B.id, boot=1, sequence=sequence)
        mesh = apply(mesh, mesh.index + 1, proposal)
    assert len(mesh.sessions[B.id].applied) <= 2 * SESSION_WINDOW
    with pytest.raises(Refused, match="came too late"):
        apply(mesh, mesh.index + 1, e.Proposal(entry=token("x"), client=B.id, boot=1, sequence=1))


def asked(state: State, entry: e.Entry, request: str, client: str = A.id) -> State:
    index = state.index + 1
    return apply(state, index, e.Proposal(entry=entry, client=client, sequence=index, request=request))


def test_a_command_s_step_is_applied_once_whoever_proposes_it(mesh: State) -> None:
    add = e.AddGuest(guest=guest("lab/two"))
    once = asked(mesh, add, "k#vm.run")
    gone = run(once, e.RemoveGuest(guest="lab/two"))
    again = asked(gone, add, "k#vm.run", client=B.id)
    assert (again.guests, again.index) == (gone.guests, gone.index + 1)
    assert again.requests == {"k#vm.run": once.index}
    assert again.sessions[B.id].applied == {again.index: once.index}
    other = asked(gone, add, "k#vm.run.2", client=B.id)
    assert "lab/two" in other.guests


def test_a_refused_step_may_be_asked_again(mesh: State) -> None:
    with pytest.raises(Refused):
        asked(mesh, e.RemoveGuest(guest="lab/other"), "k#vm.rm")
    made = run(mesh, e.AddGuest(guest=guest("lab/other")))
    assert "lab/other" not in asked(made, e.RemoveGuest(guest="lab/other"), "k#vm.rm").guests


def test_the_newest_steps_are_remembered(mesh: State) -> None:
    wanted = e.SetWanted(guest="lab/vm", wanted="running")
    state = mesh
    for number in range(2 * REQUESTS + 10):
        state = asked(state, wanted, f"k#{number}")
    assert REQUESTS <= len(state.requests) < 2 * REQUESTS
    newest = sorted(state.requests.values())
    assert newest == list(range(newest[0], state.index + 1))


def test_a_refused_record_is_skipped_alike_everywhere(mesh: State) -> None:
    after = skip(mesh, mesh.index + 1)
    assert after.index == mesh.index + 1
    assert run(after, token("next")).index == mesh.index + 2
    with pytest.raises(ValueError, match="does not follow"):
        apply(mesh, mesh.index + 2, e.Proposal(entry=token("x")))


texts = st.text(max_size=8)
impairments = st.builds(e.Impairment, delay=st.floats(0, 1), rate=st.integers(0, 2**40))
interfaces = st.builds(
    e.Interface, name=texts, mac=texts, network=texts, addresses=st.lists(texts, max_size=2).map(tuple)
)
plain = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | texts, st.lists, max_leaves=4)
any_entry = st.one_of(
    st.builds(e.Report, guest=texts, owner=texts, epoch=st.integers(0, 9), state=st.just("running")),
    st.builds(e.SetImpairments, network=texts, impairments=st.lists(impairments, max_size=3).map(tuple)),
    st.builds(
        e.AddGuest,
        guest=st.builds(
            e.Guest,
            key=texts,
            id=texts,
            image=texts,
            memory=st.integers(0, 2**40),
            owner=texts,
            interfaces=st.lists(interfaces, max_size=2).map(tuple),
            env=st.dictionaries(texts, texts, max_size=2),
        ),
    ),
    st.builds(e.PutLab, lab=st.builds(e.Lab, name=st.just("lab"), model=st.dictionaries(texts, plain))),
    st.builds(e.Cancel, migration=texts, by=texts, refusal=st.binary(max_size=64)),
    st.builds(e.AddToken, token=st.builds(e.Token, id=texts, secret_hash=st.binary(), role=st.just("peer"),
                                          uses=st.integers(0, 9), expires=st.floats(0, 1e10))),
)  # fmt: skip
entries = any_entry | st.lists(any_entry, max_size=3).map(lambda parts: e.Batch(entries=tuple(parts)))
proposals = st.builds(
    e.Proposal,
    entry=entries,
    client=texts,
    boot=st.integers(0, 2**63),
    sequence=st.integers(0, 2**40),
    time=st.floats(0, 1e10),
)


@given(proposals)
def test_entries_survive_messagepack(proposal: e.Proposal) -> None:
    assert e.decode(e.encode(proposal)) == proposal


@given(st.lists(proposals, max_size=6))
def test_the_same_log_makes_the_same_state(tail: list[e.Proposal]) -> None:
    def replay() -> State:
        state = run(State(), FOUND, token())
        for proposal in tail:
            carried = e.decode(e.encode(proposal))
            try:
                state = apply(state, state.index + 1, carried)
            except Refused:
                state = skip(state, state.index + 1)
        return state

    assert replay() == replay()


def test_another_format_is_refused_in_words() -> None:
    from proto import wire

    for value, words in (
        ({"format": 2}, "reads format 1"),
        ({"format": 1, "entry": {"kind": "x"}}, "malformed"),
    ):
        with pytest.raises(OperationError, match=words):
            e.decode(wire.pack(value))
    with pytest.raises(OperationError, match="cannot be read"):
        e.decode(b"\xc1")
