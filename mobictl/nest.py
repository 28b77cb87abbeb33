# SPDX-License-Identifier: Apache-2.0
"""The nest of an emulated WAN, as its clients see it: `proto/README.md` has its operations."""

from __future__ import annotations

from typing import Any

from mobictl import client
from mobictl.places import Manifest
from proto.api import OperationError


def nest_call(manifest: Manifest, op: str, args: dict[str, Any] | None = None) -> Any:
    """Ask the nest of the emulated WAN. Raises OperationError."""
    if manifest.wan is None:
        text = f"the peers of {manifest.directory} have no emulated WAN between them"
        raise OperationError("unsupported", text, "start them with: mobictl up --wan FILE")
    return client.Mesh(f"unix:{manifest.wan_socket.resolve()}").call(op, args, timeout=30.0)
