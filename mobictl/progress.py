# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar for a person, a line per step for a file, nothing when quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mobictl.session import Session


class Reporter(Protocol):
    """What long work calls as it goes on."""

    def step(self, text: str) -> None:
        """Something was done, or another phase begins."""
        ...

    def amount(self, label: str, done: float, total: float | None) -> None:
        """How far the present phase is."""
        ...

    def done(self, label: str) -> None:
        """A phase is over."""
        ...


class _Lines:
    def __init__(self, session: Session) -> None:
        self._session = session

    def step(self, text: str) -> None:
        self._session.note(text)

    def amount(self, label: str, done: float, total: float | None) -> None:
        pass

    def done(self, label: str) -> None:
        pass


class _Bar:
    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._title = title

    def step(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def amount(self, label: str, done: float, total: float | None) -> None:
        task = self._tasks.get(label)
        if task is None:
            task = self._tasks[label] = self._progress.add_task(label, total=total)
        self._progress.update(task, completed=done, total=total)

    def done(self, label: str) -> None:
        task = self._tasks.pop(label, None)
        if task is not None:
            self._progress.remove_task(task)


@contextmanager
def reporting(session: Session, title: str) -> Iterator[Reporter]:
    """A reporter that fits the place where standard error goes."""
    if not session.interactive:
        yield _Lines(session)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=session.err, transient=True) as progress:
        yield _Bar(progress, title)
