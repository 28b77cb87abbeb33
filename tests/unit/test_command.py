# SPDX-License-Identifier: Apache-2.0
"""The command line without a peer: wrong usage, unreachable peers, help, and what an exit code means."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from rich.console import Console

from mobictl.app import app
from mobictl.command import application, command, execute
from mobictl.session import Session
from mobictl.tables import page
from mobid.main import main as mobid_main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; gives its exit code, output and errors."""
    monkeypatch.setenv("MOBI_DIR", str(tmp_path / "mesh"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = execute(app, arguments)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


USAGE = [
    (["nothing"], "no such command"),
    (["peer", "ls", "--frob"], "no such option"),
    (
        ["vm", "migrate", "a", "--to", "b", "--downtime", "50"],
        "'50' needs a unit; write for example 50ms or 50s",
    ),
    (["vm", "migrate", "a"], "missing option '--to'"),
    (["net", "impair", "l:a", "--rate", "20"], "'20' needs a unit; write for example 20mbit or 20MB/s"),
    (["net", "impair", "l:a", "--loss", "1"], "'1' needs a percent sign; write for example 0.1%"),
    (["vm", "run", "mini", "--memory", "64Q"], "'64Q' has an unknown unit 'Q'"),
    (["up", "--peers", "0"], "--peers"),
    (
        ["peer", "token", "new", "--role", "king"],
        "'king' is not one of 'peer', 'viewer', 'operator', 'admin'",
    ),
    (["wan", "set", "a", "b"], "say what to change, such as --rtt 100ms"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE)
def test_wrong_usage_is_code_2_in_one_sentence(run: Run, arguments: list[str], words: str) -> None:
    code, out, errors = run(*arguments)
    assert (code, out) == (2, "")
    assert words in errors
    assert len(errors.splitlines()) == 2
    code, out, errors = run(*arguments, "--json")
    assert (code, errors) == (2, "")
    assert json.loads(out)["error"]["code"] == "bad-argument"


UNREACHABLE = [
    (["vm", "ls"], "there is no peer in"),
    (["vm", "ls", "--peer", "unix:/nonexistent"], "no such file or directory"),
    (["vm", "ls", "--peer", "nowhere"], "is neither an address nor a peer of"),
    (["vm", "ls", "--peer", "host:port"], "'host:port' is no peer's address"),
    (["down"], "no mesh was started in"),
    (["up", "--name", "../x"], "--name '../x' is no name"),
    (["up", "--listen", "x"], "'x' is no peer's address"),
    (["up", "--name", "a", "--peers", "2"], "are for a single peer"),
    (["down", "--dir", "/dev/null/x"], "not a directory"),
    (["up", "--dir", "/dev/null/x"], "not a directory"),
    (["lab", "validate", "/"], "/: is a directory"),
    (["lab", "up", "/"], "/: is a directory"),
    (["wan", "show"], "have no emulated WAN between them"),
    (["up", "--wan", "/nonexistent.yaml"], "no such file or directory"),
]


@pytest.mark.parametrize(("arguments", "words"), UNREACHABLE)
def test_what_cannot_be_reached_is_said(run: Run, arguments: list[str], words: str) -> None:
    code, out, errors = run(*arguments)
    assert (code, out) == (1, "")
    assert words in errors
    code, out, errors = run(*arguments, "--json")
    assert (code, errors) == (1, "")
    assert words in json.loads(out)["error"]["message"]


def commands() -> list[tuple[str, ...]]:
    """Every command that --help names, with its groups."""

    def below(group: typer.Typer, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        found = [(*path, str(c.name)) for c in group.registered_commands]
        for inner in group.registered_groups:
            if inner.typer_instance is not None:
                found += below(inner.typer_instance, (*path, str(inner.name)))
        return found

    return below(app, ())


def test_a_user_without_a_home_is_told_what_to_set(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "MOBI_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", _nobody)
    code, out, errors = run("status")
    assert (code, out) == (1, "")
    assert "no home directory" in errors
    assert "--dir" in errors


def test_mobid_without_a_home_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", _nobody)
    for arguments in (["run"], ["doctor"]):
        with pytest.raises(SystemExit) as ended:
            mobid_main(arguments)
        assert ended.value.code == 1
        assert "no home directory" in capsys.readouterr().err


def test_a_doctor_that_cannot_be_run_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    code, out, errors = run("doctor")
    assert (code, out) == (1, "")
    assert "/nonexistent/python: no such file or directory" in errors


def _nobody(uid: int) -> None:
    raise KeyError(uid)


def test_ctrl_c_says_what_becomes_of_the_work(capfd: pytest.CaptureFixture[str]) -> None:
    interruptible = application("Test.")

    @command(interruptible, "work", interrupted="it goes on")
    def work(session: Session) -> None:
        raise KeyboardInterrupt

    @command(interruptible, "other")
    def other(session: Session) -> None: ...

    assert execute(interruptible, ["work"]) == 130
    assert capfd.readouterr().err == "mobictl: interrupted\n  it goes on\n"


def test_a_long_list_is_counted_on_a_page() -> None:
    features = [f"feature{n}" for n in range(100)]
    console = Console(width=120)
    with console.capture() as captured:
        console.print(page({"cpu_features": features, "addresses": features[:3]}))
    text = captured.get()
    assert "100 (feature0, " in text
    assert "feature50" not in text
    assert "feature0, feature1, feature2\n" in "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_has_help_and_the_common_options(run: Run, path: tuple[str, ...]) -> None:
    code, out, errors = run(*path, "--help")
    assert (code, errors) == (0, "")
    for option in ("--peer", "--dir", "--json", "--quiet"):
        assert option in out
    options = re.findall(r"^ +(?:-\w, )?--([a-z-]+)", out, re.MULTILINE)
    variables = set(re.findall(r"MOBI_[A-Z_]+", out))
    prefix = "MOBI_" + "_".join(path).upper().replace("-", "_")
    for option in set(options) - {"help", "peer", "dir", "json", "quiet"}:
        assert any(variable.startswith(prefix) for variable in variables), option
    assert {"MOBI_PEER", "MOBI_DIR", "MOBI_JSON", "MOBI_QUIET"} <= variables


def test_no_arguments_show_help_with_code_2(run: Run) -> None:
    code, out, _ = run()
    assert code == 2
    assert "Usage: mobictl" in out
