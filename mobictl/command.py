# SPDX-License-Identifier: Apache-2.0
"""How a function becomes a command: common options added, errors turned into words and exit codes.

A command is a function whose first parameter is a `Session`; the rest are typer's arguments and options.
The decorator adds `--peer`, `--dir`, `--json` and `--quiet`, each of which may also stand before the
command's name or in the environment, and every other option has an environment variable too:
`MOBI_VM_MIGRATE_DOWNTIME`.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mobictl.document import DocumentError
from mobictl.session import Session, write_error
from proto.api import OperationError

PREFIX = "MOBI"

PeerOption = Annotated[
    str | None,
    typer.Option(
        "--peer",
        metavar="HOST:PORT|unix:PATH",
        envvar="MOBI_PEER",
        help="The peer to ask (default: a local one); if it dies half-way, others go on with the command.",
    ),
]
DirOption = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", envvar="MOBI_DIR", help="The directory of the local peers."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", envvar="MOBI_JSON", help="One JSON document on standard output.")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", envvar="MOBI_QUIET", help="Say nothing but errors.")
]
COMMON: dict[str, tuple[Any, Any]] = {
    "peer": (PeerOption, None),
    "dir": (DirOption, None),
    "json": (JsonOption, False),
    "quiet": (QuietOption, False),
}


class Exit(Exception):
    """Ends the command with this exit code, everything being said already."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def application(help: str, prefix: str | None = None) -> typer.Typer:
    """A group of commands with our settings; the outermost one sets the prefix of environment variables."""
    settings = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={**settings, "auto_envvar_prefix": prefix} if prefix else settings,
    )


def command(
    app: typer.Typer, name: str, *, interrupted: str = "", **settings: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register `function(session, …)` as the command `name` of `app`.

    `interrupted` says what becomes of the work when the command is ended by Ctrl-C.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        app.command(name, **settings)(_with_common_options(function, interrupted))
        return function

    return register


def _with_common_options(function: Callable[..., Any], interrupted: str) -> Callable[..., Any]:
    hints = typing.get_type_hints(function, include_extras=True)
    own = list(inspect.signature(function).parameters.values())[1:]
    parameters = [
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in own),
        *(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for key, (kind, default) in COMMON.items()
            if key not in hints
        ),
    ]

    @functools.wraps(function)
    def wrapper(context: typer.Context, **values: Any) -> Any:
        outer: dict[str, Any] = context.find_root().obj or {}
        given = {key: values.pop(key, None) or outer.get(key) for key in COMMON}
        session = Session(given["peer"], given["dir"], bool(given["json"]), bool(given["quiet"]))
        try:
            return function(session, **values)
        except KeyboardInterrupt:
            write_error(OperationError("failed", "interrupted", interrupted), as_json=session.json)
            raise Exit(130) from None

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del wrapper.__wrapped__
    return wrapper


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether errors shall be JSON; known before the arguments are understood."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in before or os.environ.get("MOBI_JSON", "") not in ("", "0", "false")


def execute(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 usage, 130 interrupted."""
    as_json = wants_json(arguments)
    try:
        result = typer.main.get_command(app).main(list(arguments), prog_name="mobictl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except Exit as error:
        return error.code
    except OperationError as error:
        write_error(error, as_json=as_json)
        return 1
    except DocumentError as error:
        _wrong_document(error, as_json)
        return 1
    except Exception as error:  # noqa: BLE001 - the parser's classes depend on typer's version
        return _click_error(error, as_json)


def _click_error(error: Exception, as_json: bool) -> int:
    """An exception of the argument parser (whichever click typer brings): its words and its exit code."""
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":
        show = getattr(error, "show", None)
        if show is not None:
            show(sys.stdout)
        return 2
    if kind == "Abort":
        write_error(OperationError("failed", "interrupted"), as_json=as_json)
        return 130
    words = getattr(error, "format_message", None)
    if words is None:
        raise error
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "mobictl"
    text = str(words()).strip().rstrip(".").replace("Value error, ", "")
    message = text[:1].lower() + text[1:]
    write_error(OperationError("bad-argument", message, f"see: {path} --help"), as_json=as_json)
    return int(getattr(error, "exit_code", 2))


def _wrong_document(error: DocumentError, as_json: bool) -> None:
    first = error.findings[0]
    count = len(error.findings)
    place = f"{error.source}:{first.line}:{first.column}"
    more = f" (and {count - 1} more)" if count > 1 else ""
    if not first.line:
        write_error(OperationError("bad-argument", f"{error.source}: {first.message}"), as_json=as_json)
        return
    if as_json:
        problems = [
            {"line": f.line, "column": f.column, "path": f.path, "message": f.message} for f in error.findings
        ]
        summary = OperationError("bad-argument", f"{place}: {first.message}{more}", "nothing was changed")
        write_error(summary, as_json=True, extra={"file": error.source, "problems": problems})
        return
    text = "\n".join(
        [
            *error.lines(),
            f"mobictl: {error.source} has {count} mistake{'s' * (count > 1)}; nothing was changed",
        ]
    )
    os.write(2, (text + "\n").encode(errors="replace"))
