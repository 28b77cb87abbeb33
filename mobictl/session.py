# SPDX-License-Identifier: Apache-2.0
"""What every command has: which peer to ask, and how to speak to the person or program that called.

Results go to standard output: a table or text, or with `--json` exactly one JSON document. Everything else
(progress, notes, errors) goes to standard error, so that a pipe only ever sees results.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.text import Text

from mobictl import client, places
from mobictl.doors import Doors
from mobictl.persist import Attempt, Persistence
from proto.api import OperationError

ResultT = TypeVar("ResultT")
Call = Callable[[dict[str, Any]], None]

OF_THE_ASKED_PEER = ("stop", "peer.join", "peer.leave")
"""Operations on the asked peer itself: nobody else can go on with them."""


@dataclass
class Session:
    """The options that every command has, and what they mean."""

    peer: str | None = None
    directory: Path | None = None
    json: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        self.out = Console(highlight=False, width=_width(1))
        self.err = Console(stderr=True, highlight=False)
        self._remarked: set[str] = set()

    @property
    def root(self) -> Path:
        """The directory of `mobictl up`."""
        return (self.directory or places.state_directory()).absolute()

    def target(self) -> str:
        """Where the peer is: `unix:PATH` or `HOST:PORT`. Raises OperationError(unreachable)."""
        return Doors(self.root, self.peer).first()

    def call(
        self,
        op: str,
        args: client.Args = None,
        *,
        timeout: float = client.CALL_TIMEOUT,
        on_item: Call | None = None,
    ) -> Any:
        """The result of an operation, of the peer or of another one when that dies half-way."""
        if op in OF_THE_ASKED_PEER:
            return client.Mesh(self.target()).call(op, args, timeout=timeout, on_item=on_item)
        key, deadline = client.new_key(), time.monotonic() + timeout

        async def attempt(connection: client.Client) -> Any:
            left = max(1.0, deadline - time.monotonic())
            return await connection.call(op, args, timeout=left, on_item=on_item, key=key)

        return self.persist(attempt)

    def persist(self, attempt: Attempt[ResultT]) -> ResultT:
        """Run `attempt` under trio with a connection to the peer, and again with others when it dies.

        It must carry the same key each time, and go on where it was.
        """
        return client.run(Persistence(Doors(self.root, self.peer), self.note, self.remark).run, attempt)  # type: ignore[no-any-return]

    def run(self, work: Callable[[client.Client], Awaitable[Any]]) -> Any:
        """Run `work` under trio with a connection to the peer, once."""
        target = self.target()

        async def connected() -> Any:
            async with client.connect(target) as connection:
                return await work(connection)

        return client.run(connected)

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[client.Client, None]:
        """A connection to the peer, for work that is under trio already."""
        async with client.connect(self.target()) as connection:
            yield connection

    @property
    def interactive(self) -> bool:
        """Whether a person watches standard error."""
        return self.err.is_terminal and not self.json and not self.quiet

    def show(self, document: Any, *renderables: RenderableType) -> None:
        """The result: the document with --json, else what is made for people (nothing with --quiet)."""
        if self.json:
            write_json(document)
        elif not self.quiet:
            with self.out.capture() as captured:
                for renderable in renderables:
                    plain = isinstance(renderable, str | Text)
                    self.out.print(renderable, markup=False, soft_wrap=plain)
            sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
            sys.stdout.flush()

    def remark(self, text: str) -> None:
        """A line about the result, on standard error also with --json."""
        if not self.quiet and text not in self._remarked:
            self._remarked.add(text)
            self.err.print(text, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line about the work, for people."""
        if not self.quiet and not self.json:
            self.err.print(text, markup=False, soft_wrap=True)


def _width(fd: int) -> int | None:
    """A table in a file or pipe is as wide as it likes."""
    return None if os.isatty(fd) or "COLUMNS" in os.environ else 400


def write_json(document: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document, default=_plain, ensure_ascii=False))  # noqa: T201 - this is the output
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def write_error(error: OperationError, *, as_json: bool, extra: Mapping[str, Any] | None = None) -> None:
    """An error as `{"error": …}` on standard output, or as a sentence and its hint on standard error."""
    if as_json:
        write_json({"error": {**error.as_dict(), **(extra or {})}})
        return
    lines = [f"mobictl: {error.message}"]
    if error.hint:
        lines.append(f"  {error.hint}")
    text = "\n".join("".join(c if c.isprintable() or c == "\n" else "?" for c in line) for line in lines)
    os.write(2, (text + "\n").encode(errors="replace"))
