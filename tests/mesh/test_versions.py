# SPDX-License-Identifier: Apache-2.0
"""Peers and commands of versions that share no protocol: both sides are told which ones there are."""

from __future__ import annotations

import ssl

import pytest
import trio

from mobid import tls
from mobid.identity import load_or_create
from mobid.links import connect_tls
from proto.api import OperationError
from tests.mesh.peers import Mesh


async def test_a_future_peer_is_refused_in_words(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    (tokyo,) = await mesh.start("tokyo")
    key = load_or_create(tokyo.directory / "identity.pem").public_key
    address = await tokyo.address()
    monkeypatch.setattr(tls.versions, "names", lambda: ["mobi/9", "mobi/8"])
    with pytest.raises(OperationError) as caught:
        await connect_tls(address, tls.client_context(None), key, "tokyo")
    assert caught.value.code == "unsupported"
    assert "(mobi/9, mobi/8): it speaks mobi/1" in caught.value.message


async def test_a_client_without_versions_gets_no_further_than_the_handshake(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    host, port = (await tokyo.address()).rsplit(":", 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with trio.fail_after(20):
        stream = trio.SSLStream(await trio.open_tcp_stream(host, int(port)), context)
        await stream.do_handshake()
        assert b"it speaks mobi/1" in await stream.receive_some()
        await trio.aclose_forcefully(stream)
    assert (await tokyo.ask("status"))["name"] == "tokyo"
    assert "Traceback" not in tokyo.log()
