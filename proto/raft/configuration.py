# SPDX-License-Identifier: Apache-2.0
"""Who votes: the configuration that a log carries with itself.

A change from one set of voters to another goes through a *joint* configuration, in which a decision needs a
majority of the new set and of the outgoing one, so that no two majorities can ever decide apart (Ongaro and
Ousterhout, *In search of an understandable consensus algorithm*, §6). Learners receive the log and decide
nothing; a peer is a learner until it has caught up. A configuration holds from the moment its record is
appended, not only once it is committed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from proto import wire
from proto.api import OperationError


@dataclass(frozen=True, slots=True)
class Configuration:
    """The voters and learners, by peer id. `outgoing` is not empty while a change is under way."""

    voters: frozenset[str] = frozenset()
    outgoing: frozenset[str] = frozenset()
    learners: frozenset[str] = frozenset()

    @property
    def joint(self) -> bool:
        return bool(self.outgoing)

    @property
    def deciding(self) -> frozenset[str]:
        """Everyone whose vote counts."""
        return self.voters | self.outgoing

    @property
    def replicas(self) -> frozenset[str]:
        """Everyone whom the leader sends its log."""
        return self.voters | self.outgoing | self.learners

    def quorum(self, agreeing: Collection[str]) -> bool:
        """Whether these are a majority of the voters and, while joint, of the outgoing ones too."""
        return _majority(self.voters, agreeing) and (not self.outgoing or _majority(self.outgoing, agreeing))


def _majority(voters: frozenset[str], agreeing: Collection[str]) -> bool:
    return 2 * len(voters.intersection(agreeing)) > len(voters)


def encode(configuration: Configuration) -> bytes:
    """The payload of a record of kind `config`."""
    return wire.pack(
        {
            "voters": sorted(configuration.voters),
            "outgoing": sorted(configuration.outgoing),
            "learners": sorted(configuration.learners),
        }
    )


def decode(data: bytes) -> Configuration:
    """The configuration in a record; raises `OperationError(bad-argument)`."""
    try:
        value = wire.unpack(data)
        return Configuration(*(_ids(value[part]) for part in ("voters", "outgoing", "learners")))
    except (wire.WireError, KeyError, TypeError) as error:
        raise OperationError("bad-argument", f"a configuration cannot be read: {error}") from None


def _ids(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(peer, str) for peer in value):
        raise TypeError("a set of peers is not a list of ids")
    return frozenset(value)
