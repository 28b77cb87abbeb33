# SPDX-License-Identifier: Apache-2.0
"""Where the peers of this machine are: the directory of `mobictl up`, and the sockets below it.

`mobictl up` keeps one directory (`--dir`, default `${XDG_STATE_HOME:-~/.local/state}/mobitopolo`) with
one directory per peer in it, and `up.json`, which says which peers belong to it. A peer's own directory
links to its runtime directory (`run`), where its socket is. So whoever knows the directory finds the
peers, without asking anybody.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import platformdirs

from mobictl.files import replace_file
from proto.api import OperationError
from proto.jsontext import parse_json

FORMAT = 1
MANIFEST = "up.json"


def state_directory() -> Path:
    """`${XDG_STATE_HOME:-~/.local/state}/mobitopolo`; raises OperationError for a user without a home."""
    return _under_home(platformdirs.user_state_dir, "XDG_STATE_HOME or give --dir")


def config_directory() -> Path:
    """`${XDG_CONFIG_HOME:-~/.config}/mobitopolo`; raises OperationError for a user without a home."""
    return _under_home(platformdirs.user_config_dir, "XDG_CONFIG_HOME")


def _under_home(find: Callable[..., str], mend: str) -> Path:
    try:
        return Path(find("mobitopolo", appauthor=False))
    except RuntimeError:
        text = "this user has no home directory: HOME is not set, and the system knows none"
        raise OperationError("failed", text, f"set HOME, or {mend}") from None


@dataclass(frozen=True)
class LocalPeer:
    """A peer that `mobictl up` made. `directory` is its own, `listen` its TCP address."""

    name: str
    directory: Path
    listen: str = ""

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "mobid.sock"

    @property
    def target(self) -> str:
        """As `--peer` takes it, with the real path, which is short enough for a socket."""
        return f"unix:{self.socket.resolve()}"

    def answers(self) -> bool:
        """Whether somebody accepts connections at its socket."""
        return accepts(self.socket)

    @property
    def left(self) -> bool:
        """Whether it left its mesh or was evicted; its directory can only be removed then."""
        return (self.directory / "left").exists()

    def running(self) -> int:
        """The process id of the peer that holds this directory, or 0."""
        return lock_holder(self.directory / "mobid.pid")


def accepts(path: Path) -> bool:
    """Whether somebody accepts connections at a unix stream socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path.resolve()))
        except (OSError, ValueError):
            return False
    return True


def lock_holder(path: Path) -> int:
    """The process id in a locked pid file; 0 if nobody holds its lock, -1 if the holder wrote none yet."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(fd, 32, 0).decode(errors="replace").strip()
        return int(text) if text.isdecimal() else -1
    finally:
        os.close(fd)
    return 0


@dataclass
class Manifest:
    """What `mobictl up` made in a directory: peers, the founder first, and the WAN's file."""

    directory: Path
    peers: list[LocalPeer] = field(default_factory=list)
    wan: str | None = None

    @property
    def path(self) -> Path:
        return self.directory / MANIFEST

    @property
    def wan_socket(self) -> Path:
        """The control socket of the nest in which the peers of an emulated WAN live."""
        return self.directory / "wan" / "run" / "wan.sock"

    def running(self) -> list[LocalPeer]:
        return [peer for peer in self.peers if peer.running()]

    def save(self) -> None:
        """Write it, as a whole."""
        peers = [{**asdict(p), "directory": os.path.relpath(p.directory, self.directory)} for p in self.peers]
        text = json.dumps({"format": FORMAT, "peers": peers, "wan": self.wan}, indent=1)
        replace_file(self.path, f"{text}\n".encode())


def load_manifest(directory: Path) -> Manifest:
    """The manifest of a directory, empty if there is none. Raises OperationError for one that is no good."""
    path = directory / MANIFEST
    try:
        data = parse_json(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"it has format {data['format']}, this version reads {FORMAT}")
        peers = [LocalPeer(p["name"], directory / p["directory"], p["listen"]) for p in data["peers"]]
        return Manifest(directory, peers, data["wan"])
    except FileNotFoundError:
        return Manifest(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (error.strerror or "").lower() if isinstance(error, OSError) else error
        raise OperationError("failed", f"{path} cannot be read: {reason}", "give another --dir") from None


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Only one `up` or `down` at a time works in a directory. Raises OperationError(conflict)."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        text = f"the directory {directory} cannot be used: {(error.strerror or '').lower()}"
        raise OperationError("failed", text, "give another with --dir") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        text = f"another mobictl up or down is at work in {directory}"
        raise OperationError("conflict", text, "wait for it, or give another --dir") from None
    finally:
        os.close(fd)


def local_peers(directory: Path) -> list[LocalPeer]:
    """The peers below a directory or in it, whether they run or not."""
    return load_manifest(directory).peers or [
        LocalPeer(path.name, path)
        for path in (directory, *_subdirectories(directory))
        if (path / "run").exists()
    ]


def find_peer(directory: Path, name: str | None = None) -> LocalPeer:
    """The peer of this name, or the first one that answers, below a directory or in it.

    Raises OperationError(unreachable) that says what was looked at.
    """
    found = local_peers(directory)
    if name is not None:
        found = [peer for peer in found if peer.name == name]
        if not found:
            text = f"{name!r} is neither an address nor a peer of {directory}"
            raise OperationError(
                "bad-argument", text, "write HOST:PORT, unix:PATH, or a name from: mobictl status"
            )
    for peer in found:
        if peer.answers():
            return peer
    names = ", ".join(peer.name for peer in found)
    text = (
        f"none of the peers in {directory} answers ({names})" if found else f"there is no peer in {directory}"
    )
    raise OperationError(
        "unreachable", text, "start one with mobictl up, or name another with --peer or --dir"
    )


def _subdirectories(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_dir())
    except OSError:
        return []
