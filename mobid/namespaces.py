# SPDX-License-Identifier: Apache-2.0
"""User and network namespaces, entered by this process itself, without privilege.

A user namespace gives its maker every capability *inside* of it, also to a process that has none and may get
none; in it network namespaces, veth pairs and packet sockets can be had. Our ids are mapped to themselves,
so files, sockets and directories look the same from inside and outside.

Namespaces belong to threads, and a user namespace can only be made by a process with one thread:
`enter_user_namespace` comes before trio starts. Later the main thread steps into a network namespace only
for the moment in which it starts a child, which stays there. Children are ordinary processes: they lose
the capabilities at exec, unless they are started inside `with capable()`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from proto.api import OperationError

CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000
CAPABILITIES: Final = (12, 13)
"""CAP_NET_ADMIN and CAP_NET_RAW: interfaces, and packet sockets."""

_PR_CAP_AMBIENT: Final = 47
_AMBIENT_RAISE: Final = 2
_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION: Final = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def _setns(fd: int, kind: int) -> None:
    _check(_libc.setns(fd, kind), "setns")


def enter_user_namespace() -> None:
    """Put this process, which must have one thread, into a user namespace of its own.

    Root's ids stay all mapped, an ordinary user's only her own. Raises `OperationError(unsupported)` with
    the mend where the host forbids it.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Outside of the namespace, since only from there root may map more than one id.
        status = 1
        try:
            os.close(writer)
            if os.read(reader, 1):
                _write_maps(Path(f"/proc/{os.getppid()}"))
                status = 0
        except OSError as error:
            status = error.errno or 1
        finally:
            os._exit(status)
    os.close(reader)
    try:
        _unshare(CLONE_NEWUSER)
        os.write(writer, b"1")
        failure: OSError | None = None
    except OSError as error:
        failure = error
    finally:
        os.close(writer)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if failure is None and code == 0:
        return
    number = failure.errno if failure is not None else code
    raise OperationError(
        "unsupported",
        f"this host does not let this user make user namespaces: {os.strerror(number or errno.EPERM)}",
        _mend(),
    )


def _write_maps(process: Path) -> None:
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        every = [line.split() for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
        identity = "".join(f"{inside} {inside} {count}\n" for inside, _, count in every)
        try:
            (process / f"{kind}_map").write_text(identity)
        except PermissionError:
            if kind == "gid":
                (process / "setgroups").write_text("deny")
            (process / f"{kind}_map").write_text(f"{own} {own} 1\n")


def _mend() -> str:
    """What to do about a host that forbids user namespaces."""
    for name, bad, good in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("user/max_user_namespaces", "0", "15000"),
    ):
        path = Path("/proc/sys") / name
        if path.exists() and path.read_text().strip() == bad:
            return f"as root: sysctl -w {name.replace('/', '.')}={good}"
    return "let the container's seccomp profile or its host allow user namespaces"


def enter_network_namespace() -> None:
    """Put this thread into a new network namespace; there is no way back into the host's own.

    Raises `OperationError(unsupported)` with the mend.
    """
    try:
        _unshare(CLONE_NEWNET)
    except OSError as error:
        text = f"this host does not let this user make network namespaces: {error.strerror}"
        raise OperationError("unsupported", text, _mend()) from None


@contextmanager
def capable() -> Iterator[None]:
    """Children started inside keep the capabilities for networks (as root they have them anyway)."""
    _set_inheritable(sum(1 << capability for capability in CAPABILITIES))
    try:
        for capability in CAPABILITIES:
            _check(_libc.prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, capability, 0, 0), "prctl")
        yield
    finally:
        _check(_libc.prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl")
        _set_inheritable(0)


def _set_inheritable(bits: int) -> None:
    header = _CapabilityHeader(_CAPABILITY_VERSION, 0)
    data = (_CapabilityData * 2)()
    _check(_libc.capget(ctypes.byref(header), ctypes.byref(data)), "capget")
    data[0].inheritable = bits
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(data)), "capset")


class NetworkNamespace:
    """A network namespace, held by a descriptor. `with` steps into it for as long as nothing awaits."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._outside = -1

    @classmethod
    def current(cls) -> NetworkNamespace:
        return cls(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    @classmethod
    def create(cls) -> NetworkNamespace:
        """A new one; this thread, which must be in one of our own, stays where it is."""
        before = cls.current()
        try:
            enter_network_namespace()
            made = cls.current()
            _setns(before.fd, CLONE_NEWNET)
            return made
        finally:
            before.close()

    def __enter__(self) -> NetworkNamespace:
        self._outside = NetworkNamespace.current().fd
        _setns(self.fd, CLONE_NEWNET)
        return self

    def __exit__(self, *_: object) -> None:
        _setns(self._outside, CLONE_NEWNET)
        os.close(self._outside)
        self._outside = -1

    def close(self) -> None:
        os.close(self.fd)
