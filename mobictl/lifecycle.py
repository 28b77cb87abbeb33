# SPDX-License-Identifier: Apache-2.0
"""Starting the peers of a directory.

Peers are ordinary processes, each the leader of its own session: they neither end with the terminal nor
get its Ctrl-C. The first founds the mesh. The others start alone and are then told, over their own
sockets, to join it with a token: so the token is in no argument list, no environment and no log. The
manifest is written before the first process starts: whatever happens then, `takedown` finds all that
there is.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import mobictl
from mobictl import client, helpers, takedown
from mobictl.nest import nest_call
from mobictl.places import LocalPeer, Manifest, accepts, load_manifest
from mobictl.progress import Reporter
from proto import api
from proto.api import OperationError
from proto.wan import Wan

START_TIMEOUT: Final = 60.0
JOIN_TIMEOUT: Final = 60.0
TERM_TIMEOUT: Final = 5.0
POLL: Final = 0.05
WAN_PORT: Final = 7400
FIRST_PORT: Final = 7400


@dataclass
class Plan:
    """What `up` shall make true."""

    names: list[str]
    wan: Wan | None = None
    wan_file: Path | None = None
    listen: str | None = None


@dataclass
class Launch:
    """Processes started so far, to be watched while they come up."""

    manifest: Manifest
    plan: Plan
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    nested: list[int] = field(default_factory=list)


def run_up(directory: Path, plan: Plan, report: Reporter) -> Manifest:
    """Start the peers that do not run and wait until all answer as one mesh.

    When that fails, what it started is ended; peers that ran before go on.
    """
    before = load_manifest(directory)
    _leave_out(before, plan, report)
    running = {peer.name for peer in before.running()}
    if running.issuperset(plan.names):
        text = f"{len(running)} peer{'s are' if len(running) > 1 else ' is'} running in {directory}"
        hint = "mobictl down ends them; --dir starts others beside them"
        raise OperationError("exists", f"{text}: {', '.join(sorted(running))}", hint)
    manifest = _manifest(directory, before, plan)
    launch = Launch(manifest, plan)
    try:
        if not running:
            takedown.end_nest(manifest)
        manifest.save()
        if plan.wan is not None and not running:
            _start_nest(launch, report)
        for peer in manifest.peers:
            if peer.name not in running:
                _start_peer(launch, peer)
        _wait_for_all(launch, report)
        _join_all(launch, report)
        manifest.save()
    except BaseException:
        with uninterrupted():
            _undo(launch, before, bool(running))
        raise
    return manifest


def _leave_out(before: Manifest, plan: Plan, report: Reporter) -> None:
    """Peers that are no members any more take no part. Raises OperationError if there is no other."""
    for peer in [peer for peer in before.peers if peer.left and not peer.running()]:
        report.step(f"{peer.name}: left out, it is no member of its mesh any more ({peer.directory})")
        before.peers.remove(peer)
        plan.names = [name for name in plan.names if name != peer.name]
    if not plan.names:
        text = f"no peer in {before.directory} is a member of its mesh any more"
        raise OperationError("not-found", text, "start a new mesh with another --dir")


def _undo(launch: Launch, before: Manifest, some_ran: bool) -> None:
    if not some_ran:
        takedown.take_down(launch.manifest)
    _end_children(launch)
    if some_ran:
        before.save()
    elif not before.peers:
        launch.manifest.path.unlink(missing_ok=True)


def _end_children(launch: Launch) -> None:
    """End what was started a moment ago and had no lock yet by which `takedown` could find it."""
    for child in launch.children.values():
        child.terminate()
    for child in launch.children.values():
        try:
            child.wait(TERM_TIMEOUT)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(TERM_TIMEOUT)
    for pid in launch.nested:
        if helpers.alive(pid):
            os.kill(pid, signal.SIGKILL)


def _manifest(directory: Path, before: Manifest, plan: Plan) -> Manifest:
    """The peers that shall run; those that were there keep their addresses. Raises OperationError."""
    known = {peer.name: peer for peer in before.peers}
    missing = [name for name in known if name not in plan.names]
    if missing or (known and (before.wan is None) != (plan.wan is None)):
        kind = "an emulated WAN" if before.wan is not None else "no WAN"
        text = f"{directory} has the mesh of {', '.join(known)} with {kind}"
        raise OperationError("conflict", text, "start it as it was, or give another --dir")
    taken = {peer.listen for peer in before.peers}
    peers = []
    for name in plan.names:
        kept = name in known and plan.listen is None
        listen = known[name].listen if kept else _listen(directory, plan, name, taken)
        taken.add(listen)
        peers.append(LocalPeer(name, directory / name, listen))
    wan = str(plan.wan_file.absolute()) if plan.wan_file is not None else None
    return Manifest(directory, peers, wan)


def _listen(directory: Path, plan: Plan, name: str, taken: set[str]) -> str:
    if plan.wan is not None:
        return f"{plan.wan.address(name)}:{WAN_PORT}"
    if plan.listen is not None:
        return plan.listen
    digest = hashlib.sha256(str(directory).encode()).digest()
    first = FIRST_PORT + int.from_bytes(digest[:2], "big") % 20_000
    for port in range(first, first + 1000):
        address = f"127.0.0.1:{port}"
        if address not in taken and _free(port):
            return address
    raise OperationError(
        "no-room", f"none of the ports {first} to {first + 999} is free", "give one with --listen"
    )


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def mobid_command() -> list[str]:
    """How this installation's mobid is started."""
    return [sys.executable, "-m", "mobid"]


def environment() -> dict[str, str]:
    """The environment of a peer: ours, and where its code is when that is not installed."""
    root = str(Path(mobictl.__file__).resolve().parents[1])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *paths])}


def _arguments(plan: Plan, peer: LocalPeer) -> list[str]:
    arguments = [
        *mobid_command(),
        "run",
        "--dir",
        str(peer.directory),
        "--name",
        peer.name,
        "--listen",
        peer.listen,
    ]
    return [*arguments, "--site", peer.name] if plan.wan is not None else arguments


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done, so that no process is started and then forgotten."""
    caught: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


def _spawn(launch: Launch, name: str, arguments: list[str], directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with uninterrupted(), output_file(directory).open("wb") as log:
            launch.children[name] = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )
    except OSError as error:
        text = f"{name} cannot be started in {directory}: {(error.strerror or '').lower()}"
        raise OperationError("failed", text, "give another --dir, or mend its permissions") from None


def _start_peer(launch: Launch, peer: LocalPeer) -> None:
    arguments = _arguments(launch.plan, peer)
    if launch.plan.wan is None:
        _spawn(launch, peer.name, arguments, peer.directory)
        return
    peer.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with uninterrupted():
        log = str(output_file(peer.directory))
        started = nest_call(launch.manifest, "wan.start", {"site": peer.name, "argv": arguments, "log": log})
        launch.nested.append(int(started["pid"]))


def _start_nest(launch: Launch, report: Reporter) -> None:
    place = launch.manifest.directory / "wan"
    arguments = [*mobid_command(), "wan", "--dir", str(place), "--file", str(launch.manifest.wan)]
    _spawn(launch, "wan", arguments, place)
    deadline = time.monotonic() + START_TIMEOUT
    while not accepts(launch.manifest.wan_socket):
        _check_child(launch, "wan", place)
        _check_time(deadline, "the emulated WAN", place)
        time.sleep(POLL)
    report.step(f"wan: {len(launch.plan.names)} sites")


def output_file(directory: Path) -> Path:
    """Where the standard output and error of a process go: beside its directory, which is its own."""
    return directory.with_name(directory.name + ".out")


def last_words(directory: Path) -> str:
    """The last line that a process wrote: mostly why it ended."""
    try:
        lines = output_file(directory).read_bytes()[-8192:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]


def _where_to_look(directory: Path) -> str:
    return f"see {output_file(directory)} and {directory / 'mobid.log'}"


def _check_child(launch: Launch, name: str, directory: Path) -> None:
    child = launch.children.get(name)
    code = child.poll() if child is not None else None
    if code is not None:
        said = last_words(directory).removeprefix("mobid: ")
        text = f"{name} ended while starting" + (f": {said}" if said else f" with status {code}")
        raise OperationError("failed", text, _where_to_look(directory))


def _check_time(deadline: float, name: str, directory: Path) -> None:
    if time.monotonic() > deadline:
        text = f"{name} did not answer in time"
        raise OperationError("timeout", text, _where_to_look(directory))


def _wait_for_all(launch: Launch, report: Reporter) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    for peer in launch.manifest.peers:
        while not peer.answers() and not peer.left:
            _check_child(launch, peer.name, peer.directory)
            _check_time(deadline, peer.name, peer.directory)
            time.sleep(POLL)
        if peer.left:
            continue
        client.Mesh(peer.target).call("status", timeout=max(1.0, deadline - time.monotonic()))
        report.step(f"{peer.name}: running at {peer.listen}")
    _leave_out(launch.manifest, launch.plan, report)


def _join_all(launch: Launch, report: Reporter) -> None:
    """Every peer into the mesh of the first; those that are in it already (a restart) are left alone."""
    founder, *others = launch.manifest.peers
    mesh = client.Mesh(founder.target).call("status")["mesh"]
    strangers = [peer for peer in others if client.Mesh(peer.target).call("status")["mesh"] != mesh]
    if strangers:
        args = api.TokenNew(ttl=600.0, uses=len(strangers), role="peer")
        token = client.Mesh(founder.target).call("peer.token.new", args)["token"]
        for peer in strangers:
            client.Mesh(peer.target).call("peer.join", api.PeerJoin(token=token), timeout=JOIN_TIMEOUT)
            report.step(f"{peer.name}: joined the mesh of {founder.name}")
    _wait_until_seen(launch)
    _leave_out(launch.manifest, launch.plan, report)


def _wait_until_seen(launch: Launch) -> None:
    """Until every peer sees every other alive; one may hear only now that it is no member any more."""
    deadline = time.monotonic() + JOIN_TIMEOUT
    for peer in launch.manifest.peers:
        while not peer.left:
            rows = _peers_seen(peer)
            wanted = {other.name for other in launch.manifest.peers if not other.left}
            if wanted <= {row["name"] for row in rows if row["state"] == "alive"}:
                break
            _check_child(launch, peer.name, peer.directory)
            _check_time(deadline, f"the mesh as {peer.name} sees it", peer.directory)
            time.sleep(POLL)


def _peers_seen(peer: LocalPeer) -> list[dict[str, Any]]:
    """Its list of peers; nothing while it starts anew with the catalog of the mesh that it joined."""
    try:
        rows: list[dict[str, Any]] = client.Mesh(peer.target).call("peer.ls", timeout=10.0)
    except OperationError:
        return []
    return rows
