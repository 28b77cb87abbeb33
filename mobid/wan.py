# SPDX-License-Identifier: Apache-2.0
"""The nest of an emulated WAN: the places where the peers of one machine live, and the network between them.

`mobid wan --dir DIR --file FILE` makes a user namespace and in it one network namespace per site of the file,
each with a veth pair into the nest's own, where `mobi-helper wan` plays the Internet (`kernel/README.md` §8).
Each site has an address of its own and a real TCP stack. Only the network differs inside: files and unix
sockets are the same, so the peers are spoken to from outside as always. Whoever starts a peer asks the nest
to do it (`wan.start`), on its socket `DIR/run/wan.sock` (`proto/README.md`).

The nest remembers what the paths are like; a helper that died is started again and told so.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Final

import structlog
import trio
from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mobid import logs, rpc, server
from mobid.config import Config, prepare
from mobid.helpers import Helper, HelperError, Helpers, find_binary
from mobid.namespaces import NetworkNamespace, capable, enter_network_namespace, enter_user_namespace
from mobid.operations import Caller
from proto.api import Arguments, Nothing, OperationError, Role, parse
from proto.problems import nearest
from proto.wan import Wan, WanError, WanPath, parse_wan

PREFIX: Final = 15
"""All sites are in 198.18.0.0/15, which RFC 2544 sets aside for tests of networks."""

MTU: Final = 1500
TCP_BUFFER: Final = "4096 262144 67108864"
"""Long fat paths need windows far beyond the usual 6 MB."""

FILE_LIMIT: Final = 1 << 20
RESTARTS: Final = 5
"""A helper that dies more often than this is not started again."""

log = structlog.get_logger()


class WanStart(Arguments):
    """`wan.start`: a program in the namespace of a site; its output is appended to the file `log`."""

    site: str
    argv: Annotated[list[str], Field(min_length=1, max_length=1024)]
    log: str


class WanPair(Arguments):
    """`wan.cut`: two sites."""

    a: str
    b: str


class WanHeal(Arguments):
    """`wan.heal`: two sites, or all of them."""

    a: str | None = None
    b: str | None = None


class WanSet(WanPair):
    """`wan.set`: seconds, bytes/s (0: no limit), shares from 0 to 1; None leaves a value as it is."""

    rtt: Annotated[float | None, Field(ge=0, le=60)] = None
    rate: Annotated[int | None, Field(ge=0, le=1 << 40)] = None
    loss: Annotated[float | None, Field(ge=0, le=1)] = None
    jitter: Annotated[float | None, Field(ge=0, le=30)] = None


@dataclass(frozen=True)
class WanState:
    """What the path between two sites is like now, in seconds, bytes/s (None: no limit), shares."""

    a: str
    b: str
    rtt: float = 0.0
    rate: int | None = None
    loss: float = 0.0
    jitter: float = 0.0
    cut: bool = False

    def shown(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "rtt": self.rtt,
            "rate": self.rate,
            "loss": self.loss,
            "jitter": self.jitter,
            "cut": self.cut,
        }

    def told(self) -> dict[str, Any]:
        """As `mobi-helper wan` takes it."""
        return {
            "a": self.a,
            "b": self.b,
            "rtt_us": round(self.rtt * 1e6),
            "rate": self.rate or 0,
            "loss_ppm": round(self.loss * 1e6),
            "jitter_us": round(self.jitter * 1e6),
        }


@dataclass
class Place:
    """A site: its network namespace, and what was started there and has not ended."""

    name: str
    address: str
    mac: str
    interface: str
    """The near end of its veth pair, in the nest's own namespace."""
    network: NetworkNamespace
    processes: dict[int, str] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        running = [{"pid": pid, "program": program} for pid, program in self.processes.items()]
        return {"site": self.name, "address": self.address, "processes": running}


def read_file(path: Path) -> Wan:
    """The WAN file. Raises `OperationError(bad-argument)` that names each place where it is wrong."""
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise OperationError("too-large", f"{path} is larger than a WAN file may be ({FILE_LIMIT} bytes)")
        data = YAML(typ="safe", pure=True).load(path.read_text())
        return parse_wan(data)
    except WanError as error:
        wrong = "; ".join(f"{problem.where}: {problem.message}" for problem in error.problems[:5])
        raise OperationError("bad-argument", f"{path}: {wrong}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OperationError("bad-argument", f"{path} cannot be read: {error}") from None
    except (YAMLError, RecursionError) as error:
        raise OperationError("bad-argument", f"{path} is no YAML: {' '.join(str(error).split())}") from None


def first_paths(wan: Wan) -> dict[frozenset[str], WanState]:
    """Every pair of sites with what the file says of it."""
    told: dict[frozenset[str], WanPath] = {frozenset(path.between): path for path in wan.paths}
    paths = {}
    for a, b in combinations(wan.sites, 2):
        pair = frozenset((a, b))
        path = told.get(pair)
        paths[pair] = (
            WanState(a, b, path.rtt, path.rate, path.loss, path.jitter)
            if path is not None
            else WanState(a, b)
        )
    return paths


# Networks.


def run_ip(lines: Sequence[str], fds: Sequence[int] = ()) -> None:
    """Carry out commands of `ip` in the current network namespace. Raises `OperationError`."""
    program = shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        raise OperationError("unsupported", "the program ip is missing", "as root: apt-get install iproute2")
    with capable():
        done = subprocess.run(
            [program, "-batch", "-"],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            pass_fds=fds,
            timeout=30,
            check=False,
        )
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise OperationError("failed", f"ip cannot set up the emulated WAN: {said}", "see mobictl doctor")


def _tune(setting: str, value: str) -> None:
    """A setting of the current network namespace; without it the WAN is slower, not wrong."""
    try:
        (Path("/proc/sys/net") / setting).write_text(value)
    except OSError as error:
        log.warning("wan.untuned", setting=setting, reason=error.strerror)


def make_places(wan: Wan) -> list[Place]:
    """The network namespaces of all sites, with addresses and a cable each into the current one."""
    _tune("ipv6/conf/all/disable_ipv6", "1")
    places = []
    for number, name in enumerate(wan.sites, start=1):
        mac = f"02:c6:12:00:{number >> 8:02x}:{number & 255:02x}"
        place = Place(name, wan.address(name), mac, f"site{number}", NetworkNamespace.create())
        own = f"/proc/self/fd/{place.network.fd}"
        run_ip(
            [
                f"link add {place.interface} mtu {MTU} type veth peer name wan0 mtu {MTU} netns {own}",
                f"link set {place.interface} up",
            ],
            [place.network.fd],
        )
        places.append(place)
    for place in places:
        others = [other for other in places if other is not place]
        with place.network:
            _tune("ipv6/conf/all/disable_ipv6", "1")
            _tune("ipv4/tcp_rmem", TCP_BUFFER)
            _tune("ipv4/tcp_wmem", TCP_BUFFER)
            run_ip(
                [
                    "link set lo up",
                    f"link set wan0 address {place.mac}",
                    f"address add {place.address}/{PREFIX} dev wan0",
                    "link set wan0 up",
                    # Nobody asks for hardware addresses across an ocean.
                    *(f"neighbour add {o.address} lladdr {o.mac} dev wan0 nud permanent" for o in others),
                ]
            )
    return places


# The nest.


class Nest:
    """Answers on the socket, keeps the helper running, reaps what was started. `stop` ends `run`."""

    def __init__(
        self, places: Sequence[Place], paths: dict[frozenset[str], WanState], config: Config
    ) -> None:
        self._places = {place.name: place for place in places}
        self._paths = paths
        self._config = config
        self._helper: Helper | None = None
        self._nursery: trio.Nursery | None = None
        self._end = trio.Event()
        self._operations: dict[str, tuple[type[Arguments], Callable[[Any], Awaitable[Any]]]] = {
            "wan.show": (Nothing, self._show),
            "wan.start": (WanStart, self._start),
            "wan.set": (WanSet, self._set),
            "wan.cut": (WanPair, self._cut),
            "wan.heal": (WanHeal, self._heal),
            "stop": (Nothing, self._stop),
        }

    def end(self) -> None:
        self._end.set()

    async def run(self) -> None:
        """Until `end` or `stop`. Raises `OperationError` when the helper cannot be kept running."""
        path = self._config.runtime / "wan.sock"
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self._keep_helper)
                listener = server.open_unix(path)
                nursery.start_soon(trio.serve_listeners, self._accept, [listener])
                log.info("wan.ready", sites=list(self._places), socket=str(path))
                await self._end.wait()
                # The answer to `stop` is still on its way.
                await trio.sleep(0.05)
                if self._helper is not None:
                    await self._helper.quit()
                nursery.cancel_scope.cancel()
        finally:
            path.unlink(missing_ok=True)

    async def _accept(self, stream: trio.SocketStream) -> None:
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _pid, uid, _gid = struct.unpack("3i", credentials)
        if uid != os.getuid():
            await stream.aclose()
            return
        await rpc.ServerConnection(stream, Caller(Role.ADMIN, name="local"), self._answer).serve()

    async def _answer(self, request: rpc.ServedRequest, args: dict[str, Any]) -> Any:
        if request.op not in self._operations:
            known = ", ".join(self._operations)
            raise OperationError("unsupported", f"the emulated WAN has no operation {request.op!r}", known)
        model, handler = self._operations[request.op]
        try:
            return await handler(parse(model, args, request.op))
        except HelperError as error:
            raise OperationError(
                "failed", f"{request.op}: {error.message}", "see mobid.log of the WAN"
            ) from None

    # The helper.

    async def _keep_helper(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        for attempt in range(RESTARTS):
            async with trio.open_nursery() as nursery:
                helpers = Helpers(nursery, find_binary())
                control = self._config.runtime / "wan-helper.sock"
                with capable():
                    helper = await helpers.start(
                        "wan", [], control=control, log=self._config.path("helper.log")
                    )
                await self._tell(helper)
                self._helper = helper
                if attempt == 0:
                    task_status.started()
                await helper.exited.wait()
                helper.forget()
            self._helper = None
            if self._end.is_set():
                return
            log.error("wan.helper_ended", code=helper.returncode, attempt=attempt)
        raise OperationError("failed", f"the wan helper ended {RESTARTS} times", "see helper.log of the WAN")

    async def _tell(self, helper: Helper) -> None:
        """Everything a fresh helper has to know."""
        for path in self._paths.values():
            await helper.call("path", **path.told())
            if path.cut:
                await helper.call("cut", a=path.a, b=path.b)
        for place in self._places.values():
            await helper.call("attach", site=place.name, interface=place.interface)

    async def _call(self, op: str, **arguments: Any) -> None:
        if self._helper is None:
            raise OperationError("failed", "the wan helper is being started again", "try again")
        await self._helper.call(op, **arguments)

    # Operations.

    def _site(self, name: str) -> Place:
        if name in self._places:
            return self._places[name]
        near = nearest(name, self._places)
        hint = f"did you mean {near}?" if near else f"the sites are {', '.join(self._places)}"
        raise OperationError("not-found", f"there is no site {name!r}", hint)

    def _path(self, a: str, b: str) -> WanState:
        pair = frozenset((self._site(a).name, self._site(b).name))
        if len(pair) == 1:
            raise OperationError("bad-argument", f"both ends of the path are {a}", "name two sites")
        return self._paths[pair]

    def _keep(self, path: WanState) -> None:
        self._paths[frozenset((path.a, path.b))] = path

    async def _show(self, args: Nothing) -> dict[str, Any]:
        return {
            "sites": [place.shown() for place in self._places.values()],
            "paths": [path.shown() for path in self._paths.values()],
        }

    async def _set(self, args: WanSet) -> dict[str, Any]:
        changes = args.model_dump(include={"rtt", "loss", "jitter"}, exclude_none=True)
        if args.rate is not None:
            changes["rate"] = args.rate or None
        path = replace(self._path(args.a, args.b), **changes)
        await self._call("path", **path.told())
        self._keep(path)
        return path.shown()

    async def _cut(self, args: WanPair) -> dict[str, Any]:
        path = self._path(args.a, args.b)
        await self._call("cut", a=path.a, b=path.b)
        self._keep(replace(path, cut=True))
        return await self._show(Nothing())

    async def _heal(self, args: WanHeal) -> dict[str, Any]:
        if (args.a is None) != (args.b is None):
            raise OperationError("bad-argument", "one site alone is no path", "name two sites, or none")
        healed = (
            [self._path(args.a, args.b)]
            if args.a is not None and args.b is not None
            else list(self._paths.values())
        )
        for path in healed:
            if path.cut:
                await self._call("heal", a=path.a, b=path.b)
                self._keep(replace(path, cut=False))
        return await self._show(Nothing())

    async def _start(self, args: WanStart) -> dict[str, Any]:
        place = self._site(args.site)
        assert self._nursery is not None
        try:
            log_fd = os.open(args.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OperationError(
                "bad-argument", f"the log {args.log} cannot be opened: {error.strerror}"
            ) from None
        try:
            with place.network:
                child = subprocess.Popen(
                    args.argv, stdin=subprocess.DEVNULL, stdout=log_fd, stderr=log_fd, start_new_session=True
                )
        except (OSError, ValueError) as error:
            raise OperationError("bad-argument", f"{args.argv[0]} cannot be started: {error}") from None
        finally:
            os.close(log_fd)
        place.processes[child.pid] = args.argv[0]
        self._nursery.start_soon(self._reap, place, child)
        log.info("wan.started", site=place.name, pid=child.pid, program=args.argv[0])
        return {"pid": child.pid}

    async def _reap(self, place: Place, child: subprocess.Popen[bytes]) -> None:
        pidfd = os.pidfd_open(child.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        log.info("wan.ended", site=place.name, pid=child.pid, code=child.wait())
        del place.processes[child.pid]

    async def _stop(self, args: Nothing) -> dict[str, Any]:
        self.end()
        return {}


def _reason(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one refusal in a group of tasks' exceptions; the group itself if there is more in it."""
    if len(group.exceptions) != 1:
        return group
    error = group.exceptions[0]
    if isinstance(error, BaseExceptionGroup):
        return _reason(error)
    if isinstance(error, HelperError):
        return OperationError(
            "failed", f"the emulated WAN: {error.message}", "see helper.log beside mobid.log"
        )
    return error if isinstance(error, OperationError) else group


async def _serve(nest: Nest) -> None:
    async def end_on_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                nest.end()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_on_signal)
        await nest.run()
        nursery.cancel_scope.cancel()


def run(directory: Path, file: Path) -> int:
    """The command `mobid wan`. Raises `OperationError`."""
    wan = read_file(file)
    find_binary()
    os.umask(0o077)
    config = Config(directory=directory.absolute())
    lock = prepare(config)
    try:
        logs.configure(config.path("mobid.log"))
        enter_user_namespace()
        enter_network_namespace()
        trio.run(_serve, Nest(make_places(wan), first_paths(wan), config))
    except BaseExceptionGroup as group:
        raise _reason(group) from None
    finally:
        lock.release()
    return 0
