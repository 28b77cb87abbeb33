# SPDX-License-Identifier: Apache-2.0
"""Child processes below Python, and how they are spoken to.

Every role of `mobi-helper` serves a control socket (`kernel/README.md`, section 1): one MessagePack map per
datagram, descriptors beside it, replies in any order, events in between. `Helper` is one such conversation. A
helper is started in a session of its own and outlives this process; after a restart its socket is found again
and *adopted*. Whether it started the process or found it, `Helper` learns of its end at once, from a pidfd.

    helpers = Helpers(nursery, find_binary())
    disk = await helpers.start("disk", ["--socket", vhost, "--base", image], control=path, log=log)
    reply, fds = await disk.call("share")
    async for event in disk.events: ...
"""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import structlog
import trio

logger = structlog.get_logger(__name__)

MESSAGE_MAX = 65536
FDS_MAX = 8
EVENTS_MAX = 256
CALLS_MAX = 256
PROTOCOL = 1
CONNECT_INTERVAL = 0.01
LOG_TAIL = 2000


class HelperError(Exception):
    """A request that was refused or never answered.

    `code` is one of the helper's codes (`kernel/README.md`, section 1), or `gone` (the process or connection
    ended), `timeout` (no answer in time; it may still be carried out), `failed` (could not be started).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def find_binary() -> Path:
    """`$MOBI_HELPER`, else `mobi-helper` on the path, else the one built in this source tree."""
    wanted = os.environ.get("MOBI_HELPER") or shutil.which("mobi-helper")
    built = Path(__file__).resolve().parent.parent / "build/helper/kernel/helper/mobi-helper"
    path = Path(wanted) if wanted else built
    if not os.access(path, os.X_OK):
        raise HelperError("failed", f"{path} is not there; `make setup` builds it, MOBI_HELPER names another")
    return path


@dataclass
class _Call:
    """A request that waits for its reply."""

    done: trio.Event = field(default_factory=trio.Event)
    reply: dict[str, Any] | None = None
    fds: list[int] = field(default_factory=list)


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


class Helper:
    """One running helper process. Made by `Helpers`, whose nursery owns its task."""

    def __init__(
        self, role: str, control: Path, connection: trio.socket.SocketType, pidfd: int, pid: int
    ) -> None:
        self.role = role
        self.control = control
        self.pid = pid
        self.exited = trio.Event()
        self.returncode: int | None = None
        """Of a process this one started, once `exited` is set; negative: the signal. None if adopted."""
        self.lost_events = 0
        self._connection = connection
        self._pidfd = pidfd
        self._child: subprocess.Popen[bytes] | None = None
        self._calls: dict[int, _Call] = {}
        self._last_id = 0
        self._connected = True
        self._scope = trio.CancelScope()
        self._events_in, self._events = trio.open_memory_channel[dict[str, Any]](EVENTS_MAX)

    def __repr__(self) -> str:
        return f"<Helper {self.role} pid={self.pid}>"

    @property
    def events(self) -> trio.MemoryReceiveChannel[dict[str, Any]]:
        """Events until the connection ends. When 256 wait, the oldest is dropped (`lost_events`)."""
        return self._events

    @property
    def alive(self) -> bool:
        return self._connected and not self.exited.is_set()

    async def call(
        self, op: str, fds: Sequence[int] = (), timeout: float = 10.0, **arguments: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """Sends a request (descriptors are duplicated, ours stay open) and waits for its reply.

        Returns the reply and the descriptors that came with it, which the caller has to close. Raises
        `HelperError`.
        """
        if not self._connected:
            raise HelperError("gone", f"the {self.role} helper (pid {self.pid}) is gone")
        if len(self._calls) >= CALLS_MAX:
            raise HelperError("limit", f"{CALLS_MAX} requests to the {self.role} helper are unanswered")
        self._last_id += 1
        call_id = self._last_id
        call = self._calls[call_id] = _Call()
        handed_over = False
        try:
            with trio.fail_after(timeout):
                await self._send({"id": call_id, "op": op, **arguments}, fds)
                await call.done.wait()
            reply = self._checked(op, call.reply)
            handed_over = True
            return reply, call.fds
        except trio.TooSlowError:
            raise HelperError("timeout", f"{self.role}: no answer to {op} within {timeout:g} s") from None
        finally:
            del self._calls[call_id]
            if not handed_over:
                _close_all(call.fds)

    def _checked(self, op: str, reply: dict[str, Any] | None) -> dict[str, Any]:
        if reply is None:
            raise HelperError("gone", f"the {self.role} helper (pid {self.pid}) ended during {op}")
        if reply.get("ok") is not True:
            raise HelperError(str(reply.get("error")), f"{self.role}: {reply.get('message')}")
        return reply

    async def _send(self, request: dict[str, Any], fds: Sequence[int]) -> None:
        data = msgpack.packb(request)
        if len(data) > MESSAGE_MAX or len(fds) > FDS_MAX:
            raise HelperError("bad-request", f"{self.role}: {request['op']} is larger than a datagram may be")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            await self._connection.sendmsg([data], rights)
        except (OSError, trio.ClosedResourceError) as error:
            raise HelperError("gone", f"the {self.role} helper (pid {self.pid}) is gone: {error}") from None

    async def quit(self, timeout: float = 10.0) -> None:
        """Asks the helper to end and waits for it; kills it if it has not ended in time."""
        with trio.move_on_after(timeout):
            with contextlib.suppress(HelperError):
                await self.call("quit", timeout=timeout)
            await self.exited.wait()
        if not self.exited.is_set():
            logger.warning("helper does not end, killed", role=self.role, pid=self.pid)
            self.kill()
            with trio.fail_after(timeout):
                await self.exited.wait()

    def kill(self) -> None:
        """SIGKILL, by the pidfd: never another process that got the same number."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def disconnect(self) -> None:
        """Ends the conversation and leaves the process alone (it can be adopted again)."""
        if not self._connected:
            return
        self._connected = False
        self._connection.close()
        self._events_in.close()
        for call in self._calls.values():
            call.done.set()

    async def run(self) -> None:
        """The helper's task: reads messages and waits for the process's end. `forget` ends it."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_messages)
                nursery.start_soon(self._watch_process)

    def forget(self) -> None:
        """Ends the conversation, and watching the process too."""
        self.disconnect()
        self._scope.cancel()

    async def _read_messages(self) -> None:
        try:
            while True:
                data, ancillary, flags, _ = await self._connection.recvmsg(
                    MESSAGE_MAX, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
                )
                fds = [fd for _, _, rights in ancillary for fd in array.array("i", rights)]
                if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    _close_all(fds)
                    return
                self._dispatch(data, fds)
        except (OSError, trio.ClosedResourceError) as error:
            logger.debug("helper connection ended", role=self.role, pid=self.pid, error=str(error))
        finally:
            self.disconnect()

    def _dispatch(self, data: bytes, fds: list[int]) -> None:
        try:
            message = msgpack.unpackb(data)
        except ValueError as error:
            logger.error("helper sent no MessagePack", role=self.role, error=str(error))
            message = None
        if isinstance(message, dict) and "event" in message:
            self._keep_event(message)
        elif isinstance(message, dict) and (call := self._call_of(message.get("id"))):
            call.reply, call.fds = message, fds
            call.done.set()
            return
        _close_all(fds)

    def _call_of(self, number: object) -> _Call | None:
        return self._calls.get(number) if isinstance(number, int) else None

    def _keep_event(self, event: dict[str, Any]) -> None:
        try:
            self._events_in.send_nowait(event)
        except trio.WouldBlock:
            self._events.receive_nowait()
            self.lost_events += 1
            self._events_in.send_nowait(event)
        except trio.BrokenResourceError:
            self.lost_events += 1

    async def _watch_process(self) -> None:
        try:
            await trio.lowlevel.wait_readable(self._pidfd)
            if self._child is not None:
                self.returncode = self._child.wait()
            logger.info("helper ended", role=self.role, pid=self.pid, code=self.returncode)
            self.exited.set()
        finally:
            os.close(self._pidfd)
            self._pidfd = -1


class Helpers:
    """Starts and adopts helpers. Leaving `nursery` ends the conversations, not the processes."""

    def __init__(self, nursery: trio.Nursery, binary: Path) -> None:
        self._nursery = nursery
        self._binary = binary

    async def start(
        self,
        role: str,
        arguments: Sequence[str | Path],
        *,
        control: Path,
        log: Path,
        timeout: float = 10.0,
    ) -> Helper:
        """Starts `mobi-helper ROLE --control CONTROL ARGUMENTS…` in a session of its own.

        Its stderr is appended to `log`, which the helper keeps under 1 MiB. Returns once it answers `hello`;
        otherwise raises `HelperError` `failed` with the last line of the log, and leaves no process.
        """
        command = [str(self._binary), role, "--control", str(control), *map(str, arguments)]
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd, start_new_session=True
            )
        except OSError as error:
            raise HelperError("failed", f"{self._binary}: {error.strerror}") from None
        finally:
            os.close(log_fd)
        try:
            with trio.fail_after(timeout):
                connection = await self._connect(control, child)
                while connection is None:
                    await trio.sleep(CONNECT_INTERVAL)
                    connection = await self._connect(control, child)
                return await self._converse(role, control, connection, child)
        except trio.TooSlowError:
            self._abandon(child)
            raise HelperError(
                "failed", f"{role} helper did not answer on {control} in {timeout:g} s"
            ) from None
        except _EndedEarly:
            raise HelperError("failed", f"{role} helper ended at once: {_last_line(log)}") from None
        except HelperError as error:
            self._abandon(child)
            if error.code != "gone":
                raise
            raise HelperError("failed", f"{role} helper ended at once: {_last_line(log)}") from None
        except BaseException:
            self._abandon(child)
            raise

    async def adopt(self, control: Path, *, role: str, timeout: float = 5.0) -> Helper:
        """Takes over the helper that runs behind a socket. Raises `HelperError`, `not-found` if none does."""
        try:
            with trio.fail_after(timeout):
                connection = await self._connect(control, None)
                if connection is None:
                    raise HelperError("not-found", f"no helper serves {control}")
                return await self._converse(role, control, connection, None)
        except trio.TooSlowError:
            raise HelperError("timeout", f"the helper behind {control} does not answer") from None

    @staticmethod
    async def _connect(control: Path, child: subprocess.Popen[bytes] | None) -> trio.socket.SocketType | None:
        if child is not None and child.poll() is not None:
            raise _EndedEarly
        connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            await connection.connect(str(control))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise HelperError("failed", f"{control}: {error.strerror or error}") from None
            raise
        return connection

    async def _converse(
        self,
        role: str,
        control: Path,
        connection: trio.socket.SocketType,
        child: subprocess.Popen[bytes] | None,
    ) -> Helper:
        helper = self._attach(role, control, connection)
        helper._child = child
        self._nursery.start_soon(helper.run)
        try:
            hello, _ = await helper.call("hello")
            if hello.get("role") != role or hello.get("protocol") != PROTOCOL:
                raise HelperError("mismatch", f"{control} is served by {hello}, not by a {role} helper")
        except BaseException:
            helper.forget()
            raise
        return helper

    @staticmethod
    def _attach(role: str, control: Path, connection: trio.socket.SocketType) -> Helper:
        """The process behind a socket is told by the kernel, not by what it says of itself."""
        try:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, _ = struct.unpack("3i", credentials)
            if uid != os.getuid():
                raise HelperError("failed", f"{control} is served by another user (uid {uid})")
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            connection.close()
            raise HelperError("gone", f"{control}: {error.strerror}") from None
        except HelperError:
            connection.close()
            raise
        return Helper(role, control, connection, pidfd, pid)

    @staticmethod
    def _abandon(child: subprocess.Popen[bytes]) -> None:
        if child.returncode is None:
            child.kill()
            child.wait()


class _EndedEarly(Exception):
    """The process ended before it served its socket."""


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
