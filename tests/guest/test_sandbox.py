# SPDX-License-Identifier: Apache-2.0
"""The wall round a guest, tried from inside: a hostile program in the place of the guest's kernel."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shim import Shim

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120)]

FREE_ANYWHERE = {
    "read /etc/passwd",
    "list /",
    "write /tmp",
    "execute a program",
    "bind a socket",
    "signal the parent",
}
"""What the hostile program can do as any user without a sandbox: proves that the attempts are real."""

# In a user namespace where the helper may make no further ones: Landlock, seccomp and rights are left.
NO_NAMESPACES = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$0" "$@"'


Bystander = subprocess.Popen[bytes]


@pytest.fixture
def bystander() -> Iterator[Bystander]:
    """A process of the same user, to be signalled and traced."""
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def attempts(shim: Shim) -> dict[str, str]:
    """What the hostile program tried, and how it went."""
    assert shim.wait_exit()["reason"] == "poweroff"
    lines = shim.console_log.read_text().replace("\r", "").splitlines()
    return dict(line.split(": ") for line in lines)


def hostile(
    helper: Path, kernel: Path, directory: Path, bystander: Bystander, *arguments: str
) -> dict[str, str]:
    options = ("--append", f"standin=escape outside={bystander.pid}", *arguments)
    with Shim(helper, kernel, directory / "c", *options) as shim:
        return attempts(shim)


def possible(found: dict[str, str]) -> set[str]:
    assert len(found) >= 25
    return {what for what, how in found.items() if how == "possible"}


@pytest.mark.parametrize("mode", ["seccomp", "ptrace"])
def test_nothing_can_be_done_from_inside(
    helper_binary: Path, standin_kernel: Path, socket_dir: Path, bystander: Bystander, mode: str
) -> None:
    found = hostile(helper_binary, standin_kernel, socket_dir, bystander, "--mode", mode)
    assert possible(found) == set()
    assert bystander.poll() is None


def test_without_the_sandbox_it_could(
    helper_binary: Path, standin_kernel: Path, socket_dir: Path, bystander: Bystander
) -> None:
    found = hostile(helper_binary, standin_kernel, socket_dir, bystander, "--no-sandbox")
    assert possible(found) >= FREE_ANYWHERE
    assert bystander.wait(10) == -signal.SIGKILL


@pytest.fixture
def helper_without_namespaces(helper_binary: Path, socket_dir: Path) -> Path:
    wrapper = socket_dir / "helper"
    wrapper.write_text(f"#!/bin/sh\nexec unshare -U -r -- sh -c '{NO_NAMESPACES}' {helper_binary} \"$@\"\n")
    wrapper.chmod(0o700)
    probe = subprocess.run([wrapper, "--version"], capture_output=True, text=True, timeout=20)
    if probe.returncode:
        pytest.skip(f"no user namespace to try this in: {probe.stderr.strip()}")
    return wrapper


def test_landlock_and_seccomp_are_enough(
    helper_without_namespaces: Path, standin_kernel: Path, socket_dir: Path, bystander: Bystander
) -> None:
    options = ("--append", f"standin=escape outside={bystander.pid}")
    with Shim(helper_without_namespaces, standin_kernel, socket_dir / "c", *options) as shim:
        assert possible(attempts(shim)) == set()
        assert "no namespaces" in shim.log
    assert bystander.poll() is None


def test_a_guest_without_namespaces_runs_and_is_killed_whole(
    helper_without_namespaces: Path, guest_kernel: Path, checker_ramdisk: Path, socket_dir: Path
) -> None:
    with Shim(helper_without_namespaces, guest_kernel, socket_dir / "c", "--initrd", checker_ramdisk) as shim:
        status = shim.wait_state("running")
        assert "namespaces" not in status["sandbox"]
        assert {"landlock-files", "seccomp", "rights"} <= set(status["sandbox"])
        shim.freeze()
        shim.call("thaw")
        children = Path(f"/proc/{shim.process.pid}/task/{shim.process.pid}/children")
        shim.call("kill")
        assert shim.status()["exit"]["reason"] == "killed"
        assert children.read_text() == ""


def test_a_real_guest_has_every_layer_this_host_offers(
    helper_binary: Path, guest_kernel: Path, checker_ramdisk: Path, socket_dir: Path
) -> None:
    with Shim(helper_binary, guest_kernel, socket_dir / "c", "--initrd", checker_ramdisk) as shim:
        status = shim.wait_state("running")
        layers = set(status["sandbox"])
        assert {"seccomp", "rights"} <= layers
        process = Path(f"/proc/{status['pid']}")
        facts = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        assert facts["NoNewPrivs"] == "1"
        assert facts["Seccomp"] == "2"
        assert int(facts["CapPrm"], 16) == int(facts["CapEff"], 16) == int(facts["CapBnd"], 16) == 0
        if "namespaces" in layers:
            for name in ("user", "mnt", "pid", "net", "ipc", "uts"):
                assert os.readlink(process / "ns" / name) != os.readlink(f"/proc/self/ns/{name}")
        if "root" in layers and os.geteuid() == 0:
            assert sorted(os.listdir(process / "root")) == ["initrd", "proc"]
            assert os.listdir(process / "root/proc") == ["cpuinfo"]


def test_only_what_belongs_to_the_guest_is_open(
    helper_binary: Path, standin_kernel: Path, socket_dir: Path
) -> None:
    with Shim(helper_binary, standin_kernel, socket_dir / "c") as shim:
        pid = shim.wait_state("running")["pid"]
        if os.geteuid() != 0:
            pytest.skip("another user namespace's descriptors can only be listed by root")
        assert sorted(map(int, os.listdir(f"/proc/{pid}/fd"))) == [0, 1, 2, 100, 101, 102]
