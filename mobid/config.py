# SPDX-License-Identifier: Apache-2.0
"""Where a peer keeps its things, and what it was told on its command line.

Three kinds of places: the peer's own directory (`--dir`), which is its whole memory and can be copied to
another machine; the cache, shared by all peers of a user, which can be deleted at any time; and a runtime
directory for unix sockets, whose path must be short (a socket's path has at most 108 bytes) and which only
its owner may enter. The directory carries a format version, so that a future version never guesses.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from proto.api import OperationError

APPLICATION = "mobitopolo"
FORMAT = 2
DEFAULT_PORT = 7400
LEFT = "left"
"""The file in a directory whose peer is no member of its mesh any more."""

LOCK_ATTEMPTS = 10
LOCK_PAUSE = 0.05


def cache_directory() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/mobitopolo`; raises `OperationError` for a user without a home."""
    return _under_home(platformdirs.user_cache_dir, "XDG_CACHE_HOME")


def state_directory() -> Path:
    """`${XDG_STATE_HOME:-~/.local/state}/mobitopolo`; raises `OperationError` for a user without a home."""
    return _under_home(platformdirs.user_state_dir, "XDG_STATE_HOME")


def _under_home(find: Callable[..., str], variable: str) -> Path:
    try:
        return Path(find(APPLICATION, appauthor=False))
    except RuntimeError:
        raise OperationError(
            "failed",
            "this user has no home directory: HOME is not set, and the system knows none",
            f"set HOME, or {variable}",
        ) from None


def runtime_directory(directory: Path) -> Path:
    """The short path where a peer's sockets live: `${XDG_RUNTIME_DIR or /tmp/mobitopolo-UID}/HASH`."""
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/{APPLICATION}-{os.getuid()}"
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]
    return Path(base) / digest


@dataclass(frozen=True)
class Times:
    """How fast the mesh notices that its coordinator is gone, in seconds.

    The coordinator is heard every `heartbeat`; `election` after it was last heard another one is elected.
    Leases rely on it that no voter is more impatient than the coordinator believes, so the times are fixed
    when a mesh is founded, told to every newcomer, and kept in its directory (`recovery.py`).
    """

    heartbeat: float = 0.1
    election: float = 1.0

    @classmethod
    def of(cls, value: Any) -> Times:
        """From what was kept or told; raises `KeyError`, `TypeError` or `ValueError`."""
        return cls(float(value["heartbeat"]), float(value["election"]))

    @property
    def options(self) -> str:
        """As one writes them on the command line."""
        return f"--heartbeat {1000 * self.heartbeat:g}ms --election {1000 * self.election:g}ms"


def agreed(asked: Times | None, mesh: Times | None) -> Times:
    """The times to use: the mesh's, or, if it has none yet, those asked for, or the usual ones.

    Raises `OperationError(bad-argument)` if others are asked for than the mesh has.
    """
    if mesh is None:
        return asked or Times()
    if asked not in (None, mesh):
        assert asked is not None
        raise OperationError(
            "bad-argument",
            f"{asked.options} is not what this mesh was founded with: {mesh.options}",
            "leave both options out: every peer uses the times of its mesh",
        )
    return mesh


@dataclass(frozen=True)
class Config:
    """What a peer is told at its start.

    `directory` is its own; `listen` the (address, port) of its TCP socket, port 0 for any free one;
    `advertise` the address others reach it at, if that is not the one it listens on. `peer_name` is None
    when the directory knows it already, and `times` when they are the mesh's, whatever these are.
    """

    directory: Path
    name: str | None = None
    site: str = ""
    listen: tuple[str, int] = ("0.0.0.0", DEFAULT_PORT)
    advertise: str | None = None
    join: str | None = None
    times: Times | None = None

    @property
    def runtime(self) -> Path:
        return runtime_directory(self.directory)

    @property
    def socket(self) -> Path:
        """The API for this user: same uid, role admin."""
        return self.runtime / "mobid.sock"

    @property
    def cache(self) -> Path:
        return cache_directory()

    @property
    def images(self) -> Path:
        return self.cache / "images"

    @property
    def guests(self) -> Path:
        """`guests/ID/` per guest that lives here."""
        return self.directory / "guests"

    def path(self, name: str) -> Path:
        """A file of the peer's directory."""
        return self.directory / name


def parse_listen(text: str) -> tuple[str, int]:
    """`ADDRESS:PORT` or `[ADDRESS]:PORT`; raises `OperationError(bad-argument)`."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise OperationError(
            "bad-argument", f"--listen {text!r} is not ADDRESS:PORT", "for example 0.0.0.0:7400, or [::]:7400"
        )
    return host, int(port)


def prepare(config: Config) -> DirectoryLock:
    """Make the directories, check their format and owner, and take the directory for this process.

    Raises `OperationError`: `unsupported` for another format, `exists` if a peer runs there, `forbidden`
    for a runtime directory that somebody else owns.
    """
    directory = config.directory
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = DirectoryLock(directory)
        _check_format(directory)
        config.guests.mkdir(mode=0o700, exist_ok=True)
        _private_directory(config.runtime)
        _link_runtime(directory, config.runtime)
    except OSError as error:
        raise OperationError(
            "failed",
            f"the directory {directory} cannot be used: {error.strerror} ({error.filename})",
            "give another with --dir, or mend its permissions",
        ) from None
    return lock


def _check_format(directory: Path) -> None:
    path = directory / "format"
    if not path.exists():
        if any(entry.name not in ("mobid.pid", "mobid.log") for entry in directory.iterdir()):
            raise OperationError(
                "bad-argument",
                f"{directory} is neither empty nor a peer's directory",
                "give an empty or a new directory with --dir",
            )
        write_durably(path, f"{FORMAT}\n".encode())
        return
    text = path.read_text(errors="replace").strip()
    if text != str(FORMAT):
        raise OperationError(
            "unsupported",
            f"{path} says format {text[:20]!r}; this version reads format {FORMAT}",
            "use the version of Mobitopolo that wrote it, or another --dir",
        )


def _private_directory(path: Path) -> None:
    for part in (path.parent, path):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = part.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            raise OperationError(
                "forbidden", f"{part} does not belong to this user", "remove it, or set XDG_RUNTIME_DIR"
            )
    path.chmod(0o700)


def _link_runtime(directory: Path, runtime: Path) -> None:
    link = directory / "run"
    if link.is_symlink() and os.readlink(link) == str(runtime):
        return
    link.unlink(missing_ok=True)
    link.symlink_to(runtime)


class DirectoryLock:
    """Holds `mobid.pid` locked as long as the peer runs; a dead peer's lock is gone with it."""

    def __init__(self, directory: Path) -> None:
        path = directory / "mobid.pid"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._lock():
            pid = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise OperationError(
                "exists",
                f"a peer is running in {directory} already (process {pid or 'unknown'})",
                "give another --dir, or end that one first",
            )
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _lock(self) -> bool:
        """Whether the lock is ours. Somebody who only looks may hold it shared for a moment."""
        for _ in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(LOCK_PAUSE)
        return False

    def release(self) -> None:
        """Let another process have the directory."""
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file as a whole: whoever looks, also after a crash, sees the old content or the new.

    Raises `OperationError`, `no-room` when the disk is full; the old content is there then.
    """
    try:
        replace_file(path, [data], mode)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> OperationError:
    """What to tell a person of a file that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = (error.strerror or str(error)).lower()
    mend = "make room on the disk" if full else "mend its permissions or its disk"
    return OperationError("no-room" if full else "failed", f"{path} cannot be written: {reason}", mend)


def replace_file(path: Path, parts: Iterable[bytes], mode: int) -> None:
    """Replace a file as a whole by these bytes, durably; after an `OSError` the old content is there."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.writelines(parts)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
