# SPDX-License-Identifier: Apache-2.0
"""Linearizable reads: up to which index must be applied so that what is read was true after the question?

The leader answers with its commit index, once it is sure that nobody else can have committed more: at once
while its lease holds, else after a round that began after the question and that a quorum answered. Before
the first record of its term is committed it does not know what is committed, and waits. A round serves all
questions that came before it began, and only one is begun for them at a time.

Everybody else asks the leader and waits until the named index is applied. One message asks for all questions
that wait at that time; it is sent again until it is answered, also to a new leader, until the patience of a
question is over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from proto.raft.events import Read, ReadFailed, ReadReady
from proto.raft.messages import AskRead, Readable
from proto.raft.replica import NEVER, Replica
from proto.raft.replication import Leadership

PATIENCE = 2
"""A question is given up after so many `election`s."""

QUESTIONS = 10_000
"""So many may wait."""


@dataclass(slots=True)
class _Question:
    """A question; `peer` is "" for an own one, `cookie` None for that of a replica that recovers."""

    peer: str
    cookie: int | None
    fresh: bool
    until: float
    round: int = 0
    """At the leader: an answered round not older than this settles it."""
    index: int = 0
    """Once known: what must be applied."""


class Reads:
    """The questions that wait here."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._fresh: deque[_Question] = deque()
        self._leased: deque[_Question] = deque()
        """At the leader; those for which the lease will do."""
        self._own: deque[_Question] = deque()
        """Elsewhere: those that nobody was asked yet."""
        self._asked: list[_Question] = []
        """Those that the message under way asks for."""
        self._asked_of = ""
        self._asked_at = self._ask_at = NEVER
        self._asked_cookie = replica.rng.getrandbits(62)
        """Never that of an earlier life, from which an answer may still come."""
        self._known: deque[_Question] = deque()
        """Those that wait for their index to be applied."""
        self.recovery: bool | None = None
        """The question of `ask_for_recovery`: None if none waits, False if it does, True if it is settled."""

    @property
    def due(self) -> float:
        """When something must be given up or asked again."""
        waiting = (self._fresh, self._leased, self._own, self._known, self._asked)
        due = min((questions[0].until for questions in waiting if questions), default=float("inf"))
        if self._asked:
            return min(due, self._asked_at + self._resend)
        return min(due, self._ask_at) if self._own and self._ask_at > self._replica.now else due

    @property
    def _resend(self) -> float:
        return 3 * self._replica.settings.heartbeat

    def read(self, event: Read, leadership: Leadership | None) -> None:
        """A question of this peer."""
        if sum(map(len, (self._fresh, self._leased, self._own, self._asked, self._known))) >= QUESTIONS:
            self._replica.out.append(ReadFailed(event.cookie))
            return
        question = _Question("", event.cookie, event.fresh, self._patience())
        if leadership:
            self._lead(question, leadership)
        else:
            self._own.append(question)

    def ask_for_recovery(self) -> None:
        """Learn what was committed before now; `recovery` is True when all of it is applied here."""
        self.recovery = False
        self._own.append(_Question("", None, True, self._patience()))

    def asked(self, peer: str, message: AskRead, leadership: Leadership | None) -> None:
        """A question of another peer."""
        if leadership is None or len(self._fresh) + len(self._leased) >= QUESTIONS:
            self._replica.send(peer, Readable(message.cookie, None))
        else:
            self._lead(_Question(peer, message.cookie, message.fresh, self._patience()), leadership)

    def answered(self, peer: str, message: Readable) -> None:
        """The leader's answer to the message under way; any other is of no meaning."""
        if not self._asked or message.cookie != self._asked_cookie or peer != self._asked_of:
            return
        if message.index is None:
            self._own.extendleft(reversed(self._asked))
            self._ask_at = self._replica.now + self._replica.settings.heartbeat
        else:
            self._know(self._asked, message.index)
        self._asked = []

    def step_down(self) -> None:
        """No leader any more: others ask again, own questions wait for the next one."""
        for question in (*self._fresh, *self._leased):
            if question.peer:
                self._tell(question, None)
            else:
                self._own.append(question)
        self._fresh.clear()
        self._leased.clear()

    def settle(self, leadership: Leadership | None) -> None:
        """Answer what can be answered, ask what must be asked, give up what is too old."""
        if leadership:
            self._settle_leader(leadership)
        elif self._own or self._asked:
            self._ask()
        while self._known and self._known[0].index <= self._replica.applied:
            question = self._known.popleft()
            if question.cookie is None:
                self.recovery = True
            else:
                self._replica.out.append(ReadReady(question.cookie, question.index))
        for questions in (self._fresh, self._leased, self._own, self._known):
            while questions and questions[0].until <= self._replica.now:
                self._tell(questions.popleft(), None)

    def _patience(self) -> float:
        return self._replica.now + PATIENCE * self._replica.settings.election

    def _lead(self, question: _Question, leadership: Leadership) -> None:
        question.round = leadership.round + 1
        (self._fresh if question.fresh else self._leased).append(question)

    def _settle_leader(self, leadership: Leadership) -> None:
        """Questions that were asked of another leader before are this one's now."""
        for question in (*self._asked, *self._own):
            self._lead(question, leadership)
        self._asked = []
        self._own.clear()
        if not leadership.settled:
            return
        if self._replica.now < leadership.lease_until:
            while self._leased:
                self._tell(self._leased.popleft(), self._replica.commit)
        self._tell_agreed(leadership)
        if (self._fresh or self._leased) and leadership.agreed_round == leadership.round:
            leadership.begin_round()
            self._tell_agreed(leadership)

    def _tell_agreed(self, leadership: Leadership) -> None:
        for questions in (self._fresh, self._leased):
            while questions and questions[0].round <= leadership.agreed_round:
                self._tell(questions.popleft(), self._replica.commit)

    def _tell(self, question: _Question, index: int | None) -> None:
        if question.peer and question.cookie is not None:
            self._replica.send(question.peer, Readable(question.cookie, index))
        elif index is not None:
            self._know([question], index)
        elif question.cookie is None:
            self.recovery = None
        else:
            self._replica.out.append(ReadFailed(question.cookie))

    def _know(self, questions: list[_Question], index: int) -> None:
        for question in questions:
            question.index = index
        self._known.extend(questions)

    def _ask(self) -> None:
        replica = self._replica
        again = min(self._asked_at + self._resend, self._asked[0].until) if self._asked else 0.0
        if self._asked and (self._asked_of != replica.leader or replica.now >= again):
            self._own.extendleft(reversed(self._asked))
            self._asked = []
        while self._own and self._own[0].until <= replica.now:
            self._tell(self._own.popleft(), None)
        if not self._own or self._asked or not replica.leader or replica.now < self._ask_at:
            return
        self._asked, self._own = list(self._own), deque()
        self._asked_of, self._asked_at = replica.leader, replica.now
        self._asked_cookie += 1
        fresh = any(question.fresh for question in self._asked)
        replica.send(replica.leader, AskRead(self._asked_cookie, fresh))
