# SPDX-License-Identifier: Apache-2.0
"""Tokens: what was copied wrongly is told apart from what is wrong."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import tokens
from proto.api import OperationError

doors = st.lists(st.tuples(st.text(max_size=30), st.binary(min_size=32, max_size=32)), max_size=3)
made = st.builds(
    tokens.Token,
    id=st.text(max_size=10),
    secret=st.binary(max_size=32),
    mesh=st.text(max_size=16),
    role=st.sampled_from(["peer", "viewer"]),
    expires=st.floats(0, 1e10),
    doors=doors.map(tuple),
)
EXAMPLE = tokens.Token("ab12", b"s" * 20, "mesh", "peer", 1000.0, (("127.0.0.1:7400", b"k" * 32),))


@given(made)
def test_round_trip(token: tokens.Token) -> None:
    assert tokens.decode(f"  {tokens.encode(token)}\n") == token


@given(st.integers(1, 400))
def test_a_truncated_token_is_named_as_such(cut: int) -> None:
    text = tokens.encode(EXAMPLE)
    with pytest.raises(OperationError, match=r"truncated or altered|is no token") as caught:
        tokens.decode(text[: max(0, len(text) - cut)])
    assert caught.value.code == "bad-argument"
    assert "copy the whole line" in caught.value.hint


@given(st.data())
def test_an_altered_token_is_named_as_such(draw: st.DataObject) -> None:
    text = tokens.encode(EXAMPLE)
    place = draw.draw(st.integers(len(tokens.PREFIX), len(text) - 2))
    letter = draw.draw(st.sampled_from("ABCabc019-_").filter(lambda letter: letter != text[place]))
    with pytest.raises(OperationError, match="truncated or altered"):
        tokens.decode(text[:place] + letter + text[place + 1 :])


def test_an_expired_token_is_refused_only_when_the_time_is_known() -> None:
    text = tokens.encode(EXAMPLE)
    assert tokens.decode(text) == EXAMPLE
    assert tokens.decode(text, now=999.0) == EXAMPLE
    with pytest.raises(OperationError, match="has expired"):
        tokens.decode(text, now=1000.0)


@pytest.mark.parametrize("text", ["", "hello", "mobi2-AAAA", "mobi1-", "mobi1-!!!"])
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(OperationError):
        tokens.decode(text)


def test_the_secret_is_in_no_representation() -> None:
    assert "sss" not in repr(EXAMPLE)


def test_hashes_depend_on_id_and_secret() -> None:
    kept = tokens.hash_secret("a", b"secret")
    assert tokens.secret_matches("a", b"secret", kept)
    assert not tokens.secret_matches("a", b"Secret", kept)
    assert not tokens.secret_matches("b", b"secret", kept)


@pytest.mark.parametrize("body", [b"\xc1", b"\x93", b"\x90\x90", b"\xc7\x00\x05"])
def test_a_token_with_the_right_checksum_round_rubbish_is_refused(body: bytes) -> None:
    text = base64.urlsafe_b64encode(body + tokens._checksum(body)).decode().rstrip("=")
    with pytest.raises(OperationError, match="another version") as caught:
        tokens.decode(tokens.PREFIX + text)
    assert caught.value.code == "unsupported"
