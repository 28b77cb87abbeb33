# SPDX-License-Identifier: Apache-2.0
"""`mobid`: the command that runs a peer in the foreground, examines this machine, or emulates a WAN on it.

    mobid run [--dir D] [--name N] [--site S] [--listen ADDR:PORT] [--found | --join TOKEN]
              [--heartbeat TIME --election TIME]
    mobid doctor [--json]
    mobid wan --dir D --file FILE

SIGTERM and SIGINT end the peer in order and leave its guests running; `mobictl down` ends both.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog
import trio

from mobid import doctor, logs, peer, wan
from mobid.config import (
    DEFAULT_PORT,
    LEFT,
    Config,
    Times,
    parse_listen,
    prepare,
    state_directory,
    unwritable,
    write_durably,
)
from mobid.identity import load_or_create
from mobid.peer import Outcome
from mobid.tasks import background
from proto import api, tokens, units
from proto.api import OperationError

log = structlog.get_logger()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits 0 when all went well, 1 with one sentence on stderr, 2 for wrong usage."""
    arguments = _parser().parse_args(argv)
    try:
        code = _COMMANDS[arguments.command](arguments)
    except OperationError as error:
        _say(error)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _say(error: OperationError) -> None:
    hint = f" ({error.hint})" if error.hint else ""
    sys.stderr.write(f"mobid: {error.message}{hint}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mobid", description="A peer of a Mobitopolo mesh.")
    parser.add_argument("--version", action="version", version=f"mobid {peer.version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a peer until it is told to stop")
    run.add_argument(
        "--dir", type=Path, help="the peer's own directory (default: mobitopolo/peer in the user's state)"
    )
    run.add_argument("--name", help="its name in the mesh (default: this host's)")
    run.add_argument("--site", default="", help="the name of the place it is at")
    run.add_argument(
        "--listen",
        default=f"0.0.0.0:{DEFAULT_PORT}",
        metavar="ADDR:PORT",
        help="where others reach it; port 0 is any free one (%(default)s)",
    )
    run.add_argument("--advertise", metavar="HOST:PORT", help="what to tell others instead")
    start = run.add_mutually_exclusive_group()
    start.add_argument("--found", action="store_true", help="found a mesh, if it is in none yet (default)")
    start.add_argument(
        "--join",
        metavar="TOKEN",
        help="join a mesh; - reads the token from standard input, @FILE from a file",
    )
    run.add_argument(
        "--heartbeat",
        metavar="TIME",
        help="of the mesh that is founded: how often the coordinator is heard (100ms)",
    )
    run.add_argument(
        "--election",
        metavar="TIME",
        help="of the mesh that is founded: how long the coordinator may be silent before another one is "
        "elected, at least 5 heartbeats (1s)",
    )
    examine = commands.add_parser("doctor", help="what this machine can do, what is missing, how to mend it")
    examine.add_argument("--json", action="store_true", help="one JSON document")
    nest = commands.add_parser("wan", help="run the network namespaces of an emulated WAN (mobictl up --wan)")
    nest.add_argument("--dir", type=Path, required=True, help="where its socket and logs are")
    nest.add_argument("--file", type=Path, required=True, help="the WAN file: sites and paths")
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    facts = doctor.examine()
    if arguments.json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    else:
        for check in facts["checks"]:
            mark = "ok     " if check["ok"] else "MISSING" if check["needed"] else "without"
            sys.stdout.write(f"{mark} {check['name']}: {check['detail']}\n")
            if not check["ok"] and check["mend"]:
                sys.stdout.write(f"        mend: {check['mend']}\n")
    return 0 if facts["ok"] else 1


def _config(arguments: argparse.Namespace) -> Config:
    for name, value in (("--name", arguments.name), ("--site", arguments.site)):
        if value:
            api.check_name(value, name)
    return Config(
        directory=(arguments.dir or state_directory() / "peer").absolute(),
        name=arguments.name,
        site=arguments.site,
        listen=parse_listen(arguments.listen),
        advertise=arguments.advertise,
        join=_token(arguments.join),
        times=_times(arguments.heartbeat, arguments.election),
    )


def _times(heartbeat: str | None, election: str | None) -> Times | None:
    """What the command line asks for; None if it says nothing, which leaves it to the mesh."""
    if heartbeat is None and election is None:
        return None
    usual = Times()
    times = Times(
        usual.heartbeat if heartbeat is None else _seconds(heartbeat, "--heartbeat"),
        usual.election if election is None else _seconds(election, "--election"),
    )
    if times.election < 5 * times.heartbeat:
        raise OperationError(
            "bad-argument",
            f"{times.options}: an election time shorter than 5 heartbeats lets a few late ones look like a "
            "dead coordinator",
            "give --heartbeat 100ms --election 1s, for example",
        )
    return times


def _seconds(text: str, option: str) -> float:
    try:
        seconds = units.parse_time(text)
    except units.UnitError as error:
        raise OperationError("bad-argument", f"{option}: {error}") from None
    if not 0.001 <= seconds <= 60:
        raise OperationError("bad-argument", f"{option} {text} is not between 1ms and 60s")
    return seconds


def _token(argument: str | None) -> str | None:
    """A token's text, from where the command line says; checked before anything is made."""
    if argument is None:
        return None
    if argument == "-":
        text = sys.stdin.readline()
    elif argument.startswith("@"):
        try:
            text = Path(argument[1:]).read_text()
        except OSError as error:
            raise OperationError("bad-argument", f"{argument[1:]} cannot be read: {error.strerror}") from None
    else:
        text = argument
    tokens.decode(text)
    return text.strip()


def _run(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    os.umask(0o077)
    lock = prepare(config)
    left = config.path(LEFT)
    try:
        if left.exists() and config.join is None:
            raise _no_member(config)
        logs.configure(config.path("mobid.log"))
        outcome = trio.run(_serve, config)
        if outcome in (Outcome.LEFT, Outcome.EVICTED):
            write_durably(left, f"{outcome.value}\n".encode())
        else:
            left.unlink(missing_ok=True)
    except Exception as error:  # noqa: BLE001 - the last boundary before a person
        raise _explained(error, config) from None
    finally:
        lock.release()
    if outcome is Outcome.EVICTED:
        raise _no_member(config)
    return 0


def _no_member(config: Config) -> OperationError:
    return OperationError(
        "forbidden",
        f"the peer in {config.directory} is no member of its mesh any more: it left or was evicted",
        "join again with a new token and an empty --dir",
    )


def _wan(arguments: argparse.Namespace) -> int:
    return wan.run(arguments.dir, arguments.file)


def _explained(error: BaseException, config: Config) -> OperationError:
    """What to tell a person of whatever ended the peer."""
    first = error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, OperationError):
        return first
    if isinstance(first, OSError) and first.errno in (errno.ENOSPC, errno.EDQUOT):
        return unwritable(Path(first.filename) if first.filename else config.directory, first)
    log.error("peer.failed", exc_info=error)
    return OperationError(
        "internal",
        f"the peer ended by a mistake in itself: {first!r}",
        f"{config.path('mobid.log')} has the details; its guests go on, start it again",
    )


async def _serve(config: Config) -> Outcome:
    """Run the peer, and run it again whenever it has joined another mesh."""
    identity = load_or_create(config.path("identity.pem"))
    while True:
        running = peer.load(config, identity)
        try:
            outcome = await _run_until_signal(running)
        finally:
            await running.close()
        if outcome is not Outcome.REPLACED:
            return outcome
        config = replace(config, join=None)


async def _run_until_signal(running: peer.Peer) -> Outcome:
    opening = trio.CancelScope()

    async def end_on_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                opening.cancel()
                running.end()

    async with background(end_on_signal):
        with opening:
            await running.open()
        if opening.cancelled_caught:
            return Outcome.STOPPED
        return await running.run(lambda: _announce(running))


def _announce(running: peer.Peer) -> None:
    log.info("peer.ready", name=running.name, address=running.address)
    sys.stdout.write(f"{running.name} is ready: {running.address} unix:{running.config.socket}\n")
    sys.stdout.flush()


_COMMANDS = {"run": _run, "doctor": _doctor, "wan": _wan}


if __name__ == "__main__":
    main()
