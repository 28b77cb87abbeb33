#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make a fresh machine ready: `make setup`.

Five steps, each idempotent and each skipped in a moment when its result is there: Debian packages
(the only one that needs root), the Python environment, the C helper, the guest kernel (built once
per machine and content) and the guest images. What is fetched is kept in the cache directory, so a
second machine with a copy of it works offline. Each step says in one line what it did and how long
it took. It runs on the system's own Python with nothing installed.

    setup.py [STEP…]        packages, python, helper, kernel, images (default: all)

"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobitopolo"
VENV = ROOT / ".venv"
BUILD = ROOT / "build" / "helper"
STEP_TIMEOUT = 3600


class SetupError(Exception):
    """A sentence that says what is missing and how to mend it."""


def run(command: list[str], why: str, *, show: bool = False) -> str:
    """Run a command; `show` passes its output on as it comes, otherwise it is shown only when it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=STEP_TIMEOUT,
        check=False,
        cwd=ROOT,
    )
    if done.returncode:
        tail = "\n".join((done.stdout or "").splitlines()[-20:])
        raise SetupError(
            f"{why} failed (status {done.returncode} of {' '.join(command[:3])} …)\n{tail}".rstrip()
        )
    return done.stdout or ""


def installed(package: str) -> bool:
    query = ["dpkg-query", "-W", "-f=${db:Status-Status}", package]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout == "installed"


def missing_packages() -> list[list[str]]:
    """Alternatives of every line of the list none of which is installed."""
    lines = (ROOT / "deploy" / "debian-packages.txt").read_text().splitlines()
    wanted = [
        [name.strip() for name in line.split("|")] for line in lines if line and not line.startswith("#")
    ]
    return [alternatives for alternatives in wanted if not any(installed(name) for name in alternatives)]


def offered(package: str) -> bool:
    shown = subprocess.run(["apt-cache", "show", package], capture_output=True, check=False)
    return shown.returncode == 0


def packages() -> str:
    missing = missing_packages()
    if not missing:
        return "all there"
    if os.geteuid() != 0:
        names = " ".join(alternatives[0] for alternatives in missing)
        raise SetupError(
            f"Debian packages are missing; as root: apt-get install --no-install-recommends {names}"
        )
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    run(["apt-get", "update"], "apt-get update")
    chosen = [next((n for n in alternatives if offered(n)), alternatives[0]) for alternatives in missing]
    run(["apt-get", "install", "-y", "--no-install-recommends", *chosen], "installing Debian packages")
    return f"installed {len(chosen)}"


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        *project["dependencies"],
        *(r for group in project["optional-dependencies"].values() for r in group),
    ]


def python() -> str:
    wanted = requirements()
    stamp = hashlib.sha256(repr((wanted, sys.version, str(ROOT))).encode()).hexdigest()[:32]
    marker = VENV / ".complete"
    if marker.is_file() and marker.read_text() == stamp:
        return "up to date"
    wheels = CACHE / "wheels" / hashlib.sha256(repr((wanted, sys.version)).encode()).hexdigest()[:16]
    if VENV.is_symlink():
        VENV.unlink()
    venv.create(VENV, with_pip=True, clear=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not (wheels / ".complete").is_file():
        shutil.rmtree(wheels, ignore_errors=True)
        run([*pip, "download", "--dest", str(wheels), *wanted], "fetching Python packages from PyPI")
        (wheels / ".complete").touch()
    run([*pip, "install", "--no-index", "--find-links", str(wheels), *wanted], "installing Python packages")
    install_checkout()
    marker.write_text(stamp)
    return f"{len(list(wheels.iterdir())) - 1} packages"


def install_checkout() -> None:
    """Make the checkout importable and give it the two commands, without building a wheel at every change."""
    site = next((VENV / "lib").glob("python3*/site-packages"))
    (site / "mobitopolo-checkout.pth").write_text(f"{ROOT}\n")
    for name in ("mobid", "mobictl"):
        script = VENV / "bin" / name
        script.write_text(
            f"#!{VENV / 'bin' / 'python'}\nimport sys\n\nfrom {name}.main import main\n\nsys.exit(main())\n"
        )
        script.chmod(0o755)


def helper() -> str:
    meson, ninja = str(VENV / "bin" / "meson"), str(VENV / "bin" / "ninja")
    if not (BUILD / "build.ninja").is_file():
        run([meson, "setup", str(BUILD), str(ROOT)], "configuring the helper")
    said = run([ninja, "-C", str(BUILD)], "compiling the helper")
    return "up to date" if "no work to do" in said else "compiled"


def kernel() -> str:
    run([sys.executable, str(ROOT / "kernel" / "uml" / "build.py")], "building the guest kernel", show=True)
    return "ready"


def images() -> str:
    run([sys.executable, str(ROOT / "kernel" / "guest" / "build.py")], "building guest images", show=True)
    return "ready"


STEPS: dict[str, tuple[str, Callable[[], str]]] = {
    "packages": ("Debian packages", packages),
    "python": ("Python environment", python),
    "helper": ("C helper", helper),
    "kernel": ("guest kernel (3 to 8 minutes the first time)", kernel),
    "images": ("guest images (2 to 4 minutes the first time)", images),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Make this machine ready.")
    parser.add_argument("steps", nargs="*", choices=[[], *STEPS], metavar="STEP", help=", ".join(STEPS))
    chosen = parser.parse_args().steps or list(STEPS)
    for name in chosen:
        title, step = STEPS[name]
        print(f"setup: {title} …", flush=True)
        started = time.monotonic()
        try:
            outcome = step()
        except (SetupError, subprocess.TimeoutExpired, OSError) as error:
            print(f"setup: {title}: {error}", file=sys.stderr)
            return 1
        print(f"setup: {title}: {outcome} ({time.monotonic() - started:.1f} s)", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; run it again to go on")
