# SPDX-License-Identifier: Apache-2.0
"""What all peers of a world compute alike is computed once.

Every peer reads the same records and applies them to the same state. That is a pure function of values that
never change, so in a simulation the first result serves all; with hundreds of peers nothing else would be
fast enough. A world calls `forget` when it begins.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from proto import entries, peer, state_codec
from proto.entries import Proposal
from proto.state import State

MOST = 20_000

_decode = lru_cache(MOST)(entries.decode)
_decode_state = lru_cache(64)(state_codec.decode)
_decide = peer._decided
_decided: dict[tuple[int, int, int], tuple[State, Proposal, Any]] = {}


def _decided_once(state: State, index: int, proposal: Proposal) -> Any:
    """Keyed by identity, with what is identified kept alive."""
    key = (id(state), index, id(proposal))
    known = _decided.get(key)
    if known is None:
        if len(_decided) >= MOST:
            _decided.clear()
        known = _decided[key] = (state, proposal, _decide(state, index, proposal))
    return known[2]


def share() -> None:
    """From now on, in this process."""
    entries.decode = _decode
    state_codec.decode = _decode_state
    peer._decided = _decided_once


def forget() -> None:
    """Nothing of an earlier world is kept."""
    _decode.cache_clear()
    _decode_state.cache_clear()
    _decided.clear()
