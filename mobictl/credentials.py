# SPDX-License-Identifier: Apache-2.0
"""Who the user is to a mesh: an Ed25519 key of its own, and the keys of the peers it may trust.

`mobictl login TOKEN` makes the key (once), shows it to a peer that the token names, and writes down the
members of that mesh. From then on any of them can be spoken to over TCP, both sides proving their keys.
All of it is in `${XDG_CONFIG_HOME:-~/.config}/mobitopolo`: `identity.pem` (private, mode 0600) and
`meshes.json`.
"""

from __future__ import annotations

import json
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from mobictl.doors import Known
from mobictl.files import replace_file
from mobictl.places import config_directory
from proto.api import OperationError
from proto.identity import to_pem
from proto.jsontext import parse_json

FORMAT = 1


@dataclass
class Credentials:
    """This user's key file, and the members of the meshes it logged into: mesh id → {name, address, key}."""

    directory: Path
    meshes: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    @property
    def identity(self) -> Path:
        return self.directory / "identity.pem"

    @property
    def peer_keys(self) -> set[bytes]:
        """Raw public keys of all peers that may be trusted."""
        return {bytes.fromhex(member["key"]) for members in self.meshes.values() for member in members}

    @classmethod
    def load(cls, directory: Path | None = None) -> Credentials:
        """What is there; raises OperationError(unauthenticated) when the user never logged in."""
        found = cls(directory or config_directory())
        found._read()
        known = Known.load(found.directory)
        found.meshes = {mesh: known.members(mesh) or members for mesh, members in found.meshes.items()}
        if not found.meshes or not found.identity.exists():
            raise OperationError(
                "unauthenticated",
                "this user has not logged into a mesh, so no peer can be spoken to over TCP",
                "mobictl login TOKEN, with a token from: mobictl peer token new --role operator",
            )
        return found

    @classmethod
    def load_or_create(cls, directory: Path | None = None) -> Credentials:
        """What is there, with a key made now if there is none."""
        found = cls(directory or config_directory())
        found._read()
        if not found.identity.exists():
            key = Ed25519PrivateKey.generate()
            _write(found.identity, to_pem(key, x509.random_serial_number()))
        return found

    def _read(self) -> None:
        path = self.directory / "meshes.json"
        try:
            data: Any = parse_json(path.read_text()) if path.exists() else {"format": FORMAT, "meshes": {}}
            if data["format"] != FORMAT:
                raise ValueError(f"it has format {data['format']}, this version reads {FORMAT}")
            self.meshes = data["meshes"]
            self.peer_keys  # noqa: B018 - reading it checks its shape
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OperationError(
                "failed", f"{path} cannot be read: {error}", "remove it and log in again"
            ) from None

    def use(self, context: ssl.SSLContext) -> None:
        """Show this user's key on connections made with `context`."""
        path = self.identity
        try:
            mode = path.stat().st_mode
            if stat.S_IMODE(mode) & 0o077:
                raise OperationError("forbidden", f"{path} can be read by others", f"chmod 600 {path}")
            context.load_cert_chain(path)
        except (OSError, ssl.SSLError) as error:
            text = f"the user's key in {path} cannot be read: {error}"
            raise OperationError("failed", text, "remove it and log in again") from None

    def certificate(self) -> bytes:
        """The user's certificate, DER."""
        pem = x509.load_pem_x509_certificate(self.identity.read_bytes())
        return pem.public_bytes(Encoding.DER)

    def remember(self, mesh: str, members: list[dict[str, str]]) -> None:
        """Write down the members of a mesh: `{name, address, key}`, key in hex."""
        self.meshes[mesh] = members
        text = json.dumps({"format": FORMAT, "meshes": self.meshes}, indent=1)
        _write(self.directory / "meshes.json", text.encode())
        Known.load(self.directory).put(mesh, members)


def _write(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data)
    except OSError as error:
        raise OperationError("failed", f"{path} cannot be written: {error.strerror}") from None
