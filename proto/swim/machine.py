# SPDX-License-Identifier: Apache-2.0
"""SWIM with Lifeguard: every member probes others in turn, and what they find out spreads by itself.

Once an interval a member pings the next member of its round. Without an answer it asks helpers to ping for
it; without any answer it suspects the member, and says so. The suspected member hears it, in the next ping
at the latest, and refutes it by a newer incarnation; else, after a time that shrinks as others suspect it
too, it is dead. News rides on all packets, and while there is news a few packets leave for it alone; now and
then two members tell one another everything. The load of a member does not depend on how many there are.

Das, Gupta and Motivala, *SWIM: scalable weakly-consistent infection-style process group membership protocol*,
DSN 2002; Dadgar, Phillips and Currey, *Lifeguard: local health awareness for more accurate failure
detection*, DSN 2018. What differs: who is a member says the catalog, so dead members stay and are probed now
and then, which joins healed halves; times follow the round trip of each pair, measured or estimated
(`proto/vivaldi.py`); a ping says what its sender believes of the receiver; and a process that stood still
draws no conclusions from what it missed.
"""

from __future__ import annotations

import math
import random

from proto.machine import Send, WakeAt, Woken
from proto.swim.agenda import Agenda
from proto.swim.awareness import Awareness
from proto.swim.beliefs import SUSPICION, Beliefs, Sight
from proto.swim.events import TIMER, Effect, Event, Members, Received, Roster, SetMeta, Settings, Turned
from proto.swim.packets import (
    ACK_BASE,
    GOSSIP_BASE,
    LIMIT,
    MOST_AGE,
    MOST_CLAIMS,
    NACK_BASE,
    PING_BASE,
    PING_FOR_BASE,
    PLACED_SIZE,
    SYNC_BASE,
    Ack,
    Claim,
    Gossip,
    Nack,
    Packet,
    Ping,
    PingFor,
    Placed,
    Sync,
    claim_size,
)
from proto.swim.probing import Probe, Probes, Relay, Rounds
from proto.vivaldi import Vivaldi

MOST_RELAYS = 256
"""Pings for others under way at once; more are refused by silence."""

LONGEST_RELAY = 20.0
TRIES = 100
"""Members looked at in search of one to probe: most of them may be dead."""

SYNC_PAUSE = 1.0
"""Seconds between two exchanges of everything known that somebody else causes: a replayed or forged packet
must not make this member send much."""

FIRST_SYNC_PAUSE = 2.0
"""Seconds until the first exchange is tried again with another member."""


class Swim:
    """The machine (`proto.machine`) of the member `own`.

    `incarnation` should be higher than in earlier runs, so that old claims about them are void at once;
    seconds since 1970 are. If it is not, the others' answers raise it.
    """

    def __init__(self, own: str, settings: Settings, rng: random.Random, incarnation: int = 0) -> None:
        self.own = own
        self.vivaldi = Vivaldi(rng)
        self._settings = settings
        self._rng = rng
        self._effects: list[Effect] = []
        self._awareness = Awareness(settings.worst_health)
        self._agenda = Agenda()
        self._beliefs = Beliefs(
            own,
            incarnation,
            settings,
            self._awareness,
            self._agenda,
            period=self._period,
            turned=self._turned,
        )
        self._probes = Probes()
        self._rounds = Rounds(rng, 0)
        self._asked = math.inf
        self._running = False
        self._gossiping = False
        self._raising = False
        self._synced = False
        self._sync_free = 0.0
        self._answer_free = 0.0
        self._told = 0

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take an event at `now` (seconds, never going back); the effects, to be carried out in order."""
        effects = self._effects = []
        if now - self._asked > self._settings.interval:
            self._stood_still(now - self._asked)
            self._asked = math.inf
        match event:
            case Received(peer, packet):
                self._receive(peer, packet, now)
            case Woken():
                self._asked = math.inf
                for kind, about in self._agenda.due(now):
                    self._due(kind, about, now)
            case Members(roster):
                self._enrol(roster, now)
            case SetMeta(meta):
                if meta != self._beliefs.meta:
                    self._beliefs.meta = meta
                    self._beliefs.renew()
        if self._beliefs.news and self._running and not self._gossiping:
            self._gossiping = True
            self._agenda.add(now + self._rng.random() * self._settings.gossip, "gossip")
        if self._agenda.next < self._asked:
            self._asked = self._agenda.next
            effects.append(WakeAt(TIMER, self._asked))
        return effects

    # What others may ask.

    def sight(self, peer: str) -> Sight:
        """How a member looks; one of whom nothing was heard looks alive. Do not change it."""
        return self._beliefs.sight(peer)

    @property
    def incarnation(self) -> int:
        """The own incarnation; never falls."""
        return self._beliefs.incarnation

    @property
    def health(self) -> int:
        """The doubt about the own health: 0 is good."""
        return self._awareness.score

    # Time.

    def _stood_still(self, seconds: float) -> None:
        """The timer came late: this process was stopped or starved, and what it missed says nothing."""
        self._probes.drop()
        self._beliefs.stood_still(seconds)
        self._awareness.note(1)

    def _due(self, kind: str, about: int | str, now: float) -> None:
        match kind, about:
            case "probe", _:
                self._next_probe(now)
            case "help", int(number):
                self._ask_helpers(number, now)
            case "again", int(number):
                self._try_again(number, now)
            case "verdict", int(number):
                self._fail(number, now)
            case "nack", int(number):
                self._nack(number)
            case "gossip", _:
                self._gossip(now)
            case "sync", _:
                self._next_sync(now)
            case "raise", _:
                self._raise_dead(now)
            case _, str(peer) if kind == SUSPICION:
                self._beliefs.suspicion_ended(peer, now)

    def _timeout(self, peer: str) -> float:
        settings, rtt = self._settings, self.vivaldi.rtt(peer)
        if rtt is None:
            return settings.timeout
        return min(settings.longest_timeout, max(settings.timeout, 3 * rtt))

    def _period(self, peer: str) -> float:
        """How long a probe of `peer` takes at most: its answer, then that of a helper, who may be far."""
        return max(self._settings.interval, self._settings.tries * self._timeout(peer))

    # Members.

    def _enrol(self, roster: Roster, now: float) -> None:
        for peer in sorted(self._beliefs.roster.known - roster.known):
            self.vivaldi.forget(peer)
        self._beliefs.enrol(roster)
        self._rounds = Rounds(self._rng, len(roster.ids))
        alone = not roster.known - {self.own}
        if not alone and not self._running:
            self._running = True
            self._beliefs.news.add(self._beliefs.own_claim())
            self._agenda.add(now + self._rng.random() * self._settings.interval, "probe")
            self._agenda.add(now + self._rng.random() * self._settings.interval, "sync")

    @property
    def _alone(self) -> bool:
        ids = self._beliefs.roster.ids
        return not ids or ids == (self.own,)

    def _turned(self, turned: Turned) -> None:
        self._effects.append(turned)
        if turned.state == "dead" and not self._raising:
            self._raising = True
            self._agenda.add(turned.since + self._settings.dead * (0.5 + self._rng.random()), "raise")

    def _some(self, count: int, without: str = "") -> list[str]:
        """Up to `count` random members that do not look dead."""
        ids, dead = self._beliefs.roster.ids, self._beliefs.dead
        chosen: list[str] = []
        for _ in range(4 * count + 8):
            if len(chosen) == count or not ids:
                break
            peer = ids[int(self._rng.random() * len(ids))]
            if peer not in (self.own, without) and peer not in dead and peer not in chosen:
                chosen.append(peer)
        return chosen

    def _send(self, peer: str, packet: Packet) -> None:
        self._effects.append(Send(peer, packet))

    # Probing.

    def _next_probe(self, now: float) -> None:
        if self._alone:
            self._running = False
            return
        self._agenda.add(now + self._settings.interval * self._awareness.factor, "probe")
        ids, dead = self._beliefs.roster.ids, self._beliefs.dead
        for _ in range(min(TRIES, len(ids))):
            peer = ids[self._rounds.next()]
            if peer != self.own and peer not in dead:
                self._probe(peer, now)
                return

    def _probe(self, peer: str, now: float) -> None:
        settings, factor = self._settings, self._awareness.factor
        # Poor health means a slow process, which adds the same to all distances: no long one is multiplied.
        timeout = min(settings.longest_timeout, factor * self._timeout(peer))
        patience = max(settings.interval * factor, settings.tries * timeout)
        probe = Probe(peer, now + patience, timeout)
        probe.hopeless = peer in self._beliefs.dead
        number = self._ping(probe, now)
        self._agenda.add(now + timeout, "help", number)

    def _ping(self, probe: Probe, now: float) -> int:
        number = self._probes.sent(probe, now)
        self._send(probe.target, self._ping_packet(number, probe.target))
        return number

    def _ping_packet(self, number: int, target: str) -> Ping:
        sight = self._beliefs.sight(target)
        return Ping(number, sight.state, sight.incarnation, self._beliefs.news.take(LIMIT - PING_BASE))

    def _ask_helpers(self, number: int, now: float) -> None:
        found = self._probes.find(number)
        if found is None:
            return
        probe, _ = found
        self._agenda.add(max(now, probe.verdict), "verdict", number)
        if probe.hopeless:
            return
        probe.helpers = tuple(self._some(self._settings.helpers, without=probe.target))
        wait = max(1, min(0xFFFF, int(800 * (probe.verdict - now))))
        for helper in probe.helpers:
            news = self._beliefs.news.take(LIMIT - PING_FOR_BASE)
            self._send(helper, PingFor(number, probe.target, wait, news))
        self._try_again(number, now)

    def _try_again(self, number: int, now: float) -> None:
        found = self._probes.find(number)
        if found is None:
            return
        probe, _ = found
        self._ping(probe, now)
        if len(probe.numbers) < self._settings.tries:
            self._agenda.add(now + probe.timeout, "again", number)

    def _fail(self, number: int, now: float) -> None:
        found = self._probes.find(number)
        if found is None:
            return
        probe, _ = found
        self._probes.end(probe)
        if probe.hopeless or probe.target not in self._beliefs.roster.known:
            return
        self._awareness.note(len(probe.helpers) - len(probe.nacks) if probe.helpers else 1)
        self._beliefs.suspect(probe.target, self._beliefs.sight(probe.target).incarnation, self.own, now)

    def _raise_dead(self, now: float) -> None:
        """Ask one that looks dead whether it is, so that it can say no."""
        dead = self._beliefs.dead
        self._raising = bool(dead)
        if dead:
            self._agenda.add(now + self._settings.dead * (0.5 + self._rng.random()), "raise")
            self._ask_dead(self._rng.choice(tuple(dead)), now)

    def _ask_dead(self, peer: str, now: float) -> None:
        self._beliefs.dead[peer] = now
        self._probe(peer, now)

    # Receiving.

    def _receive(self, peer: str, packet: Packet, now: float) -> None:
        beliefs = self._beliefs
        if peer not in beliefs.roster.known or peer == self.own:
            return
        looked_dead = peer in beliefs.dead
        for claim in packet.claims:
            beliefs.hear(claim, now, hearsay=type(packet) is Sync)
        match packet:
            case Ping():
                self._answer(peer, packet)
            case Ack():
                self._acknowledged(peer, packet, now)
            case PingFor():
                self._pass_on(peer, packet, now)
            case Nack():
                found = self._probes.find(packet.number)
                if found is not None and peer in found[0].helpers:
                    found[0].nacks.add(peer)
            case Sync():
                self._synchronised(peer, packet, now)
        if looked_dead:
            self._heard_from_dead(peer, now)

    def _heard_from_dead(self, peer: str, now: float) -> None:
        """What looks dead speaks: tell it, so that it can refute; or learn what it knows, if it has."""
        last = self._beliefs.dead.get(peer)
        if last is None:
            self._tell_everything(peer, now, ask=True)
        elif now - last >= self._settings.interval:
            self._ask_dead(peer, now)

    def _answer(self, peer: str, ping: Ping) -> None:
        beliefs = self._beliefs
        beliefs.told_of_self(ping.state, ping.incarnation)
        claims: tuple[Claim, ...] = ()
        room = LIMIT - ACK_BASE
        if (ping.state, ping.incarnation) != ("alive", beliefs.incarnation):
            claims = (beliefs.own_claim(),)
            room -= claim_size(claims[0])
        self._send(peer, Ack(ping.number, self.vivaldi.coordinate, claims + beliefs.news.take(room)))

    def _acknowledged(self, peer: str, ack: Ack, now: float) -> None:
        found = self._probes.find(ack.number)
        if found is not None:
            probe, sent = found
            if peer == probe.target:
                self.vivaldi.observe(peer, ack.place, now - sent)
            elif peer not in probe.helpers:
                return
            self.vivaldi.hear(probe.target, ack.place, now)
            self._probes.answered(probe.target, sent)
            self._awareness.note(-1)
            return
        relay = self._probes.relay(ack.number)
        if relay is not None and relay.target == peer:
            self._probes.take_relay(ack.number)
            self.vivaldi.hear(peer, ack.place, now)
            news = self._beliefs.news.take(LIMIT - ACK_BASE)
            self._send(relay.asker, Ack(relay.number, ack.place, news))

    def _pass_on(self, peer: str, asked: PingFor, now: float) -> None:
        target = asked.target
        if target not in self._beliefs.roster.known or target == self.own:
            return
        if self._probes.passing_on >= MOST_RELAYS:
            return
        number = self._probes.passed_on(Relay(peer, asked.number, target))
        self._send(target, self._ping_packet(number, target))
        self._agenda.add(now + min(LONGEST_RELAY, asked.wait / 1000), "nack", number)

    def _nack(self, number: int) -> None:
        relay = self._probes.take_relay(number)
        if relay is not None:
            self._send(relay.asker, Nack(relay.number, self._beliefs.news.take(LIMIT - NACK_BASE)))

    # Spreading.

    def _gossip(self, now: float) -> None:
        for peer in self._some(self._settings.fanout):
            claims = self._beliefs.news.take(LIMIT - GOSSIP_BASE)
            if not claims:
                break
            self._send(peer, Gossip(claims))
        self._gossiping = bool(self._beliefs.news) and not self._alone
        if self._gossiping:
            self._agenda.add(now + self._settings.gossip, "gossip")

    def _next_sync(self, now: float) -> None:
        if self._alone:
            return
        pause = self._settings.sync * (0.75 + self._rng.random() / 2) if self._synced else FIRST_SYNC_PAUSE
        self._agenda.add(now + pause, "sync")
        for peer in self._some(1):
            self._tell_everything(peer, now, ask=True)

    def _synchronised(self, peer: str, sync: Sync, now: float) -> None:
        for placed in sync.places:
            if placed.peer != self.own and placed.peer in self._beliefs.roster.known:
                self.vivaldi.hear(placed.peer, placed.place, now - placed.age)
        if not sync.ask:
            self._synced = True
        elif now >= self._answer_free:
            self._answer_free = now + SYNC_PAUSE
            self._send_everything(peer, now, ask=False)

    def _tell_everything(self, peer: str, now: float, *, ask: bool) -> None:
        if now >= self._sync_free:
            self._sync_free = now + SYNC_PAUSE
            self._send_everything(peer, now, ask=ask)

    def _send_everything(self, peer: str, now: float, *, ask: bool) -> None:
        """As much as fits into the packets allowed at once; the next time what comes behind it."""
        everything = list(self._beliefs.everything())
        start = self._told if self._told < len(everything) else 0
        parts: list[tuple[list[Claim], list[Placed]]] = [([], [])]
        room = LIMIT - SYNC_BASE
        for place in range(len(everything)):
            claim = everything[(start + place) % len(everything)]
            placed = self._placed(claim.peer, now) if claim.state == "alive" else None
            size = claim_size(claim) + (PLACED_SIZE if placed else 0)
            if size > room or len(parts[-1][0]) == MOST_CLAIMS:
                if len(parts) == self._settings.sync_packets:
                    self._told = (start + place) % len(everything)
                    break
                parts.append(([], []))
                room = LIMIT - SYNC_BASE
            parts[-1][0].append(claim)
            parts[-1][1].extend([placed] if placed else [])
            room -= size
        else:
            self._told = 0
        for number, (claims, places) in enumerate(parts):
            self._send(peer, Sync(ask and number == len(parts) - 1, tuple(claims), tuple(places)))

    def _placed(self, peer: str, now: float) -> Placed | None:
        """Where a member is, to be told; rounded so that hearsay never looks newer than it is."""
        if peer == self.own:
            return Placed(peer, 0, self.vivaldi.coordinate)
        place, heard = self.vivaldi.place(peer) or (None, 0.0)
        age = math.ceil(now - heard)
        return Placed(peer, age, place) if place is not None and age <= MOST_AGE else None
