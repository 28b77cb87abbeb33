# SPDX-License-Identifier: Apache-2.0
"""What this machine can do for guests, what is missing, and how to mend it.

Every check is a fact that was looked up now, on this machine, by this user; none of them changes anything.
A check that is not needed for guests to run (`needed` false) may fail without making the whole verdict bad.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobid import host
from mobid.config import cache_directory, state_directory
from mobid.helpers import HelperError, find_binary

MIN_SHM = 256 << 20
PROBE_TIMEOUT = 10.0
LANDLOCK_CREATE_RULESET = 444  # system call number, the same on every architecture
LANDLOCK_CREATE_RULESET_VERSION = 1


@dataclass(frozen=True)
class Check:
    """One fact. `mend` says what to do when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    mend: str = ""
    needed: bool = True


def examine() -> dict[str, Any]:
    """All facts as one document: `{ok, helper_path, cpu_features, …, checks: [{name, ok, detail, mend,
    needed}]}`."""
    checks = [check() for check in _CHECKS]
    processor = host.processor()
    return {
        "ok": all(check.ok or not check.needed for check in checks),
        "helper_path": _helper_path(),
        "kernel": _kernel(),
        "images": _images(),
        "cache": str(cache_directory()),
        "state": str(state_directory()),
        "host": {
            "system": platform.platform(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory": host.memory_total(),
            "memory_free": host.memory_available(),
        },
        "cpu_features": sorted(processor.features),
        "xsave_size": processor.xsave_size,
        "checks": [asdict(check) for check in checks],
    }


def _helper_path() -> str | None:
    try:
        return str(find_binary())
    except HelperError:
        return None


def _kernel() -> str | None:
    named = os.environ.get("MOBI_KERNEL")
    if named:
        return named if os.access(named, os.X_OK) else None
    pages = cache_directory().glob("kernel/*/kernel.json")
    built = [path for page in pages if os.access(path := page.with_name("linux"), os.X_OK)]
    return str(max(built, key=lambda path: path.stat().st_mtime)) if built else None


def _images() -> list[str]:
    return sorted(path.parent.name for path in cache_directory().glob("images/*/image.json"))


def _check_system() -> Check:
    ok = platform.system() == "Linux" and platform.machine() == "x86_64"
    detail = f"{platform.system()} {platform.release()} on {platform.machine()}"
    return Check("system", ok, detail, "guests need Linux on x86-64")


def _check_helper() -> Check:
    path = _helper_path()
    if path is None:
        return Check(
            "helper", False, "mobi-helper is not built", "make setup builds it; MOBI_HELPER names another"
        )
    ran = _run([path, "--version"])
    return Check("helper", ran is not None, f"{path} ({ran or 'does not run'})", "make setup builds it anew")


def _check_kernel() -> Check:
    path = _kernel()
    mend = "make setup builds it; MOBI_KERNEL names another"
    return Check("kernel", path is not None, path or "there is no guest kernel", mend)


def _check_images() -> Check:
    names = _images()
    detail = ", ".join(names) if names else f"none in {cache_directory() / 'images'}"
    return Check("images", bool(names), detail, "make setup builds the base images")


def _check_shared_memory() -> Check:
    stat = os.statvfs("/dev/shm") if Path("/dev/shm").is_dir() else None
    free = stat.f_bavail * stat.f_frsize if stat else 0
    detail = f"{free >> 20} MiB free in /dev/shm" if stat else "there is no /dev/shm"
    mend = "mount a tmpfs there: mount -t tmpfs tmpfs /dev/shm"
    return Check("shared memory", free >= MIN_SHM, detail, mend, needed=False)


def _check_memory() -> Check:
    free = host.memory_available()
    return Check("memory", free >= MIN_SHM, f"{free >> 20} MiB available", "end other programs")


def _check_user_namespaces() -> Check:
    ran = _run(["unshare", "-Urn", "true"])
    knobs = {
        "kernel.unprivileged_userns_clone": "1",
        "user.max_user_namespaces": "15000",
        "kernel.apparmor_restrict_unprivileged_userns": "0",
    }
    wrong = [
        f"sysctl -w {knob}={good}"
        for knob, good in knobs.items()
        if _sysctl(knob) in ({"0"} - {good} or {"1"})
    ]
    mend = (
        "as root: " + "; ".join(wrong)
        if wrong
        else "install util-linux, or ask who forbids user namespaces here"
    )
    detail = "allowed" if ran is not None else "forbidden: no emulated WAN, and a thinner sandbox for guests"
    return Check("user namespaces", ran is not None, detail, mend, needed=False)


def _check_landlock() -> Check:
    # Asked of the kernel itself: /sys/kernel/security is often not mounted where Landlock works.
    version = ctypes.CDLL(None).syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    ok = version > 0
    detail = f"version {version}" if ok else "not active: a thinner sandbox for guests"
    return Check("landlock", ok, detail, "boot with landlock in lsm= (kernel 5.13 or newer)", needed=False)


def _check_dirty_tracking() -> Check:
    numbers = re.match(r"(\d+)\.(\d+)", platform.release())
    ok = numbers is not None and (int(numbers[1]), int(numbers[2])) >= (6, 7)
    detail = f"kernel {platform.release()}" + ("" if ok else ": dirty pages are found by comparison")
    return Check("dirty tracking", ok, detail, "a host kernel 6.7 or newer has PAGEMAP_SCAN", needed=False)


def _check_files() -> Check:
    import resource

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Check(
        "open files", hard >= 4096, f"at most {hard}", "raise the limit: ulimit -Hn 65536", needed=False
    )


_CHECKS: tuple[Callable[[], Check], ...] = (
    _check_system,
    _check_helper,
    _check_kernel,
    _check_images,
    _check_memory,
    _check_shared_memory,
    _check_user_namespaces,
    _check_landlock,
    _check_dirty_tracking,
    _check_files,
)


def _run(command: list[str]) -> str | None:
    """First line of what a program prints; None if it cannot be run or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]


def _sysctl(name: str) -> str:
    return _read(Path("/proc/sys") / name.replace(".", "/")).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
