# SPDX-License-Identifier: Apache-2.0
"""Fixtures every suite may use: where the built helper is, and short directories for sockets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.built import REPOSITORY, built_helper
from tests.ramdisk import build_ramdisk

# How long an example takes says how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def helper_binary() -> Path:
    """The built `mobi-helper`: `$MOBI_HELPER`, else the one of `build/helper`; skips if there is none."""
    path = built_helper()
    if not os.access(path, os.X_OK):
        pytest.skip(f"{path} is not built (meson setup build/helper; ninja -C build/helper)")
    return path


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A private directory with a path short enough for unix sockets (108 bytes)."""
    path = tempfile.mkdtemp(prefix="mobi-", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def standin_kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`standin_kernel.c`, built: speaks the freeze protocol and makes the mistake it is asked for."""
    program = tmp_path_factory.mktemp("standin") / "kernel"
    source = Path(__file__).parent / "standin_kernel.c"
    command = ["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)]
    subprocess.run(command, check=True, timeout=120)
    return program


@pytest.fixture(scope="session")
def guest_kernel() -> Path:
    """The guest's kernel: `$MOBI_KERNEL`, else what `kernel/uml/build.py` built; skips if there is none."""
    wanted = os.environ.get("MOBI_KERNEL")
    if wanted:
        return Path(wanted)
    command = [sys.executable, str(REPOSITORY / "kernel/uml/build.py"), "--print-path"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if found.returncode:
        pytest.skip("the guest's kernel is not built (kernel/uml/build.py)")
    return Path(found.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def checker_ramdisk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initial RAM disk with `guest/shim_init.c` as its only program."""
    return build_ramdisk(Path(__file__).parent / "guest/shim_init.c", tmp_path_factory.mktemp("checker"))
